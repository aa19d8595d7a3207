"""Methods whose pooling weights are trained during uptraining and folded into plain heads at last.

`expand` adds two leaves to each attention that loses heads, `key_pool` and `value_pool`; its
kernels keep all their heads. `fold` applies these weights and returns plain grouped parameters. A
training step differentiates through `fold`. The weights are:

    weighted (WGQA)   [L, K, G]      a group's head is the weighted sum of its members, from 1/G
    fuse (DHA)        [L, K, G, G]   each head is a mixture of its group, from the identity; the
                                     mixtures are pulled to their mean until they are one head

For "weighted" the step runs `fold(tree)` in the grouped config. For "fuse" it runs
`blend(tree, progress)` in the parent's config, and `fold` comes at the end. The training itself is
in the uptrain stage of the pipeline.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from gqa.conversion.attention_kernels import in_groups, kernels_of, with_kernels
from gqa.conversion.calibration import ATTENTIONS

METHODS = ("weighted", "fuse")
MERGED_AT = 0.5  # share of uptraining after which all mixtures of a group are equal


def expand(params: dict, num_kv_heads: dict[str, int], method: str) -> dict:
    """Add the pooling weights of "weighted" or "fuse"; `fold` of the result is the mean."""
    for name, K in num_kv_heads.items():
        kernels = kernels_of(params, name)
        L, _, N, _ = kernels["key"].shape
        if K == N:
            continue

        # weighted: G numbers 1/G. fuse: the identity [G, G], a row of mixing weights for each head.
        G, dtype = N // K, kernels["key"].dtype
        start = jnp.full((G,), 1 / G, dtype) if method == "weighted" else jnp.eye(G, dtype=dtype)

        # Keys and values need arrays of their own, because a training step donates its inputs.
        pools = {f"{x}_pool": jnp.tile(start, (L, K) + (1,) * start.ndim) for x in ("key", "value")}
        params = with_kernels(params, name, kernels | pools)
    return params


def without_pools(tree: dict) -> dict:
    """Remove the leaves that `expand` added, from parameters or from an optimizer's state."""
    for name in ATTENTIONS:
        kernels = kernels_of(tree, name).items()
        tree = with_kernels(tree, name, {k: x for k, x in kernels if not k.endswith("_pool")})
    return tree


def fold(tree: dict) -> dict:
    """Return plain parameters of the grouped config: one head per group, no added leaves."""

    def pooled(kernel: Array, pool: Array) -> Array:
        # The mean of the rows of "fuse" is the row that all heads of a group have in the end.
        weights = pool if pool.ndim == 3 else pool.mean(2)
        return jnp.einsum("LDKGH,LKG->LDKH", in_groups(kernel, pool.shape[1]), weights)

    return _on_pools(tree, pooled)


def blend(tree: dict, progress: Array | float) -> dict:
    """Return plain parameters of the parent's config for "fuse", with mixed heads.

    With fresh weights and progress 0 they equal the parent's. Once `pull(progress)` is 1 the heads
    of a group are equal, and the network computes the same function as `fold(tree)`.

    Args:
        progress: the share of uptraining that is done, from 0 to 1.
    """
    share = pull(progress)

    def mixed(kernel: Array, pool: Array) -> Array:
        # Head i of a group becomes the sum over g of weights[i, g] times head g.
        weights = (1 - share) * pool + share * pool.mean(2, keepdims=True)
        groups = in_groups(kernel, pool.shape[1])
        return jnp.einsum("LDKGH,LKIG->LDKIH", groups, weights).reshape(kernel.shape)

    return _on_pools(tree, mixed)


def pull(progress: Array | float) -> Array:
    """Return how far mixtures are pulled to their mean: linear from 0, and 1 from MERGED_AT on."""
    return jnp.clip(progress / MERGED_AT, 0.0, 1.0)


def _on_pools(tree: dict, change: Callable[[Array, Array], Array]) -> dict:
    """Replace each kernel that has pooling weights by `change(kernel, weights)`."""
    for name in ATTENTIONS:
        kernels = dict(kernels_of(tree, name))
        pools = {side: kernels.pop(f"{side}_pool", None) for side in ("key", "value")}
        if pools["key"] is not None:
            kernels |= {side: change(kernels[side], pool) for side, pool in pools.items()}
            tree = with_kernels(tree, name, kernels)
    return tree
