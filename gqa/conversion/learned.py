"""Methods whose pooling is trained: a tree with more leaves while uptraining, plain at the end.

`expand` puts two leaves beside the kernels of each attention that loses heads, `key_pool` and
`value_pool`; the kernels keep all their heads. `fold` gives the plain grouped parameters, and a
training step differentiates through it:

    weighted (WGQA)   [L, K, G]      the group's head is the weighted sum of its members, from 1 / G
    fuse (DHA)        [L, K, G, G]   each head becomes a mixture of its group's, from the identity;
                                     the mixtures are drawn together and then are one head

For `weighted` run `fold(tree)` at every step, in the grouped config. For `fuse` run
`blend(tree, progress)`, in the config of the parent, and `fold` at the end.
"""

import jax.numpy as jnp
from jax import Array

from gqa.conversion.attention_kernels import in_groups, kernels_of, with_kernels
from gqa.conversion.calibration import ATTENTIONS

METHODS = ("weighted", "fuse")
MERGED_AT = 0.5  # the share of uptraining after which the mixtures of a group are one


def expand(params: dict, num_kv_heads: dict[str, int], method: str) -> dict:
    """The trainable tree of "weighted" or "fuse"; as it starts, `fold` of it is the mean."""
    for name, K in num_kv_heads.items():
        kernels = kernels_of(params, name)
        L, _, N, _ = kernels["key"].shape
        if K == N:
            continue
        G, dtype = N // K, kernels["key"].dtype
        start = jnp.full((G,), 1 / G, dtype) if method == "weighted" else jnp.eye(G, dtype=dtype)
        # Two arrays, since a training step consumes each of its own.
        pools = {f"{x}_pool": jnp.tile(start, (L, K) + (1,) * start.ndim) for x in ("key", "value")}
        params = with_kernels(params, name, kernels | pools)
    return params


def without_pools(tree: dict) -> dict:
    """A tree like `expand`'s (parameters, or a state a leaf) without what it added."""
    for name in ATTENTIONS:
        kernels = kernels_of(tree, name).items()
        tree = with_kernels(tree, name, {k: x for k, x in kernels if not k.endswith("_pool")})
    return tree


def fold(tree: dict) -> dict:
    """Plain parameters of the grouped config: one head a group, no leaf more."""

    def pooled(kernel: Array, pool: Array) -> Array:
        weights = pool if pool.ndim == 3 else pool.mean(2)
        return jnp.einsum("LDKGH,LKG->LDKH", in_groups(kernel, pool.shape[1]), weights)

    return _on_pools(tree, pooled)


def blend(tree: dict, progress: Array | float) -> dict:
    """Plain parameters of the parent's config for "fuse", at `progress` in [0, 1] of uptraining.

    At 0 with fresh mixtures they are the parent's own. From `pull(progress)` = 1 the heads of a
    group are equal, and the network is that of `fold(tree)`.
    """
    share = pull(progress)

    def mixed(kernel: Array, pool: Array) -> Array:
        drawn = (1 - share) * pool + share * pool.mean(2, keepdims=True)
        groups = in_groups(kernel, pool.shape[1])
        return jnp.einsum("LDKGH,LKIG->LDKIH", groups, drawn).reshape(kernel.shape)

    return _on_pools(tree, mixed)


def pull(progress: Array | float) -> Array:
    """How far the mixtures of a group are drawn to their mean: linear, 1 from MERGED_AT on."""
    return jnp.clip(progress / MERGED_AT, 0.0, 1.0)


def _on_pools(tree: dict, change) -> dict:
    for name in ATTENTIONS:
        kernels = dict(kernels_of(tree, name))
        pools = {side: kernels.pop(f"{side}_pool", None) for side in ("key", "value")}
        if pools["key"] is not None:
            kernels |= {side: change(kernels[side], pool) for side, pool in pools.items()}
            tree = with_kernels(tree, name, kernels)
    return tree
