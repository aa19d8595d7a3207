"""T5's optimizer, Adafactor (Shazeer and Stern, 2018), and T5's learning rates.

Adafactor divides each gradient by the root of a running mean of its squares, the second moments. In
place of a matrix of second moments it keeps the means of the matrix' rows and columns, if both
sides are at least 128 long. The step is relative to the size of the parameter: it is scaled by the
parameter's root mean square.

All three need to know what a matrix is. T5 stores one matrix for each layer, [D, heads * H] or
[heads * H, D]. Our kernels have an axis of heads, and a leading axis L of scanned layers. So each
leaf is reshaped to T5's matrices, and the rule is mapped over L. For example, query [L, D, N, H]
becomes L matrices [D, N * H], and out [L, N, H, D] becomes L matrices [N * H, D].

How a conversion changes this state is in `gqa/conversion/optimizer_state.py`.
"""

from functools import cache

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import DictKey

# Decay 1 - (t + 1)^-0.8, no momentum, no weight decay, updates clipped at a root mean square of 1;
# the epsilons are 1e-30 for squared gradients and 1e-3 for the size of a parameter (T5X).
RULE = optax.chain(
    optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=128, epsilon=1e-30),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(1e-3),
)


def adafactor() -> optax.GradientTransformation:
    """Return T5's Adafactor with the settings of T5X, without the learning rate.

    The optimizer's state is a tree like the parameters, with a state of `RULE` for each leaf. An
    update has the sign of the gradient: the caller subtracts learning rate times update.
    """

    def init(params):
        return _map_leaves(RULE.init, params)

    def update(grads, state, params):
        def one(grad, leaf_state, param):
            return RULE.update(grad, leaf_state, param)

        # Each leaf becomes a pair (update, state); the pairs are taken apart into two trees.
        pairs = _map_leaves(one, grads, state, params)
        updates, state = (
            jax.tree.map(lambda _, pair, i=i: pair[i], params, pairs) for i in range(2)
        )
        return jax.tree.map(lambda u, p: u.reshape(p.shape), updates, params), state

    return optax.GradientTransformation(init, update)


def _map_leaves(rule, tree, state=None, params=None):
    """Apply `rule` to every leaf as a matrix, mapped over the layer axis of stacked leaves.

    The rule takes a matrix alone (`RULE.init`) or a gradient, its state and its parameter.
    """

    def on_leaf(path, leaf, *rest):
        args: tuple = (_as_matrix(path, leaf),)
        if rest:
            args += (rest[0], _as_matrix(path, rest[1]))
        return (jax.vmap(rule) if _is_stacked(path) else rule)(*args)

    trees = () if state is None else (state, params)
    return jax.tree_util.tree_map_with_path(on_leaf, tree, *trees)


def _is_stacked(path) -> bool:
    """Return whether the leaf at `path` has a leading axis of layers."""
    return DictKey("layers") in path


def _as_matrix(path, leaf: Array) -> Array:
    """Merge the head axis of a kernel with its head dim, as T5 stores it; keep the layer axis."""
    lead = leaf.shape[:1] if _is_stacked(path) else ()
    shape = leaf.shape[len(lead) :]
    if len(shape) < 3:
        return leaf

    # out [N, H, D] has its heads in front, query, key and value [D, N, H] have them behind.
    sides = (-1, shape[-1]) if path[-1] == DictKey("out") else (shape[0], -1)
    return leaf.reshape(*lead, *sides)


# Cached, so that equal numbers give the same function object. `jax.jit` compares functions by
# identity, and a new object would be compiled again.
@cache
def rsqrt(warmup: int, scale: float = 1.0):
    """Return T5's learning rate for training and uptraining: scale / sqrt(max(step, warmup)).

    The rate is constant for the first `warmup` steps; it does not rise from zero.
    """
    return lambda step: scale * jax.lax.rsqrt(jnp.maximum(step, warmup).astype(jnp.float32))


@cache
def constant(rate: float):
    """Return T5's learning rate for fine-tuning: `rate` at every step."""
    return lambda step: jnp.full_like(step, rate, dtype=jnp.float32)
