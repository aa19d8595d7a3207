"""Methods that make a group's head of its members' kernels alone; queries and outputs stay.

A method is a function of this file from the keys and values of an attention, each seen as
[L, D, K, G, H], and a random key to the new ones [L, D, K, H].
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import variance_scaling

Kernels = tuple[Array, Array]

METHODS = ("mean", "first", "random", "medoid", "largest")


def mean(keys: Array, values: Array, rng: Array) -> Kernels:
    """Mean of the heads of each group: the paper's choice."""
    del rng
    return keys.mean(3), values.mean(3)


def first(keys: Array, values: Array, rng: Array) -> Kernels:
    """The first head of each group (paper, section 3.3 "First")."""
    del rng
    return keys[:, :, :, 0], values[:, :, :, 0]


def random(keys: Array, values: Array, rng: Array) -> Kernels:
    """Fresh heads from the initialiser (paper, section 3.3 "Random")."""

    def fresh(groups: Array, rng: Array) -> Array:
        L, D, K, _, H = groups.shape
        init = variance_scaling(1.0, "fan_in", "normal", 0, (1, 2))
        return jax.vmap(lambda key: init(key, (D, K, H), groups.dtype))(jax.random.split(rng, L))

    return tuple(fresh(x, jax.random.fold_in(rng, i)) for i, x in enumerate((keys, values)))


def medoid(keys: Array, values: Array, rng: Array) -> Kernels:
    """The head nearest to the others of its group: least sum of distances, K and V joined."""
    del rng
    apart = sum(
        jnp.square(x[:, :, :, :, None] - x[:, :, :, None]).sum((1, 5)) for x in (keys, values)
    )
    return _take(keys, values, jnp.sqrt(apart).sum(3).argmin(2))


def largest(keys: Array, values: Array, rng: Array) -> Kernels:
    """The head of each group with the largest norm, K and V joined."""
    del rng
    square = sum(jnp.square(x).sum((1, 4)) for x in (keys, values))
    return _take(keys, values, square.argmax(2))


def _take(keys: Array, values: Array, index: Array) -> Kernels:
    """Member index[l, k] of every group."""
    index = index[:, None, :, None, None]
    return tuple(jnp.take_along_axis(x, index, axis=3)[:, :, :, 0] for x in (keys, values))


def restore_norm(pooled: Array, groups: Array) -> Array:
    """Blocks [L, D, K, H] with their members' mean Frobenius norm; a block of zeros stays."""
    target = jnp.sqrt(jnp.square(groups).sum((1, 4), keepdims=True)).mean(3)
    norm = jnp.sqrt(jnp.square(pooled).sum((1, 3), keepdims=True))
    return pooled * jnp.where(norm > 0, target / jnp.where(norm > 0, norm, 1.0), 1.0)
