"""T5's Adafactor, its learning rates, and what becomes of its state when a checkpoint is converted.

T5 sees every weight as one matrix a layer, [D, heads * H] or [heads * H, D], factors its second
moment if both sides are at least 128, and scales the step by the root mean square of that matrix.
Our kernels have a head axis and scanned layers a leading axis L, so each leaf is reshaped to
matrices and the rule is mapped over L.
"""

from functools import cache

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import DictKey

RULE = optax.chain(
    optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=128, epsilon=1e-30),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(1e-3),
)


def adafactor() -> optax.GradientTransformation:
    """T5's Adafactor without the learning rate; the state is a tree like params, a state a leaf.

    Settings of T5X: decay 1 - (t+1)^-0.8, no momentum, clipping at 1.0, epsilons 1e-30 and 1e-3,
    no weight decay.
    """

    def init(params):
        return _map_leaves(RULE.init, params)

    def update(grads, state, params):
        def one(grad, leaf_state, param):
            return RULE.update(grad, leaf_state, param)

        pairs = _map_leaves(one, grads, state, params)
        updates, state = (
            jax.tree.map(lambda _, pair, i=i: pair[i], params, pairs) for i in range(2)
        )
        return jax.tree.map(lambda u, p: u.reshape(p.shape), updates, params), state

    return optax.GradientTransformation(init, update)


def _map_leaves(rule, tree, state=None, params=None):
    """`rule` on every leaf as a matrix, mapped over the layer axis of stacked leaves."""

    def on_leaf(path, leaf, *rest):
        args: tuple = (_as_matrix(path, leaf),)
        if rest:
            args += (rest[0], _as_matrix(path, rest[1]))
        return (jax.vmap(rule) if _is_stacked(path) else rule)(*args)

    trees = () if state is None else (state, params)
    return jax.tree_util.tree_map_with_path(on_leaf, tree, *trees)


def _is_stacked(path) -> bool:
    return DictKey("layers") in path


def _as_matrix(path, leaf: Array) -> Array:
    lead = leaf.shape[:1] if _is_stacked(path) else ()
    shape = leaf.shape[len(lead) :]
    if len(shape) < 3:
        return leaf
    sides = (-1, shape[-1]) if path[-1] == DictKey("out") else (shape[0], -1)
    return leaf.reshape(*lead, *sides)


# The same function for the same numbers: a step that was compiled with it is found again.
@cache
def rsqrt(warmup: int, scale: float = 1.0):
    """scale / sqrt(max(step, warmup)): T5's rate for training and uptraining, without a ramp."""
    return lambda step: scale * jax.lax.rsqrt(jnp.maximum(step, warmup).astype(jnp.float32))


@cache
def constant(rate: float):
    """T5's rate for fine-tuning."""
    return lambda step: jnp.full_like(step, rate, dtype=jnp.float32)
