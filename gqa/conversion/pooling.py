"""Methods that pool the keys and values of a group; queries and outputs stay as they are.

Each method is a function with the method's name. It takes the key and value kernels of an
attention, grouped as [L, D, K, G, H], and a random key, and returns the pooled kernels
[L, D, K, H]. `prune` reads measured energies instead of the random key. Methods that change queries
and outputs too are in closed_form.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import variance_scaling
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gqa.conversion.attended import AttendedCovariance

Groups = Float[Array, "L D K G H"]
Heads = Float[Array, "L D K H"]
Kernels = tuple[Heads, Heads]

METHODS = ("mean", "first", "random", "medoid", "largest")
MEASURED = ("prune",)  # methods that read activations


def mean(keys: Groups, values: Groups, rng: PRNGKeyArray) -> Kernels:
    """Return the mean of the heads of each group: the paper's choice."""
    del rng
    return keys.mean(3), values.mean(3)


def first(keys: Groups, values: Groups, rng: PRNGKeyArray) -> Kernels:
    """Return the first head of each group (paper, section 3.3 "First")."""
    del rng
    return keys[:, :, :, 0], values[:, :, :, 0]


def random(keys: Groups, values: Groups, rng: PRNGKeyArray) -> Kernels:
    """Draw fresh heads from the initialiser (paper, section 3.3 "Random")."""

    def fresh(groups: Groups, rng: PRNGKeyArray) -> Heads:
        L, D, K, _, H = groups.shape

        # The model's own initialiser, one layer at a time, so that L is no part of the fan-in.
        init = variance_scaling(1.0, "fan_in", "normal", 0, (1, 2))
        return jax.vmap(lambda key: init(key, (D, K, H), groups.dtype))(jax.random.split(rng, L))

    new_keys, new_values = (
        fresh(x, jax.random.fold_in(rng, i)) for i, x in enumerate((keys, values))
    )
    return new_keys, new_values


def medoid(keys: Groups, values: Groups, rng: PRNGKeyArray) -> Kernels:
    """Return the head of each group with the least sum of distances to the others.

    The distance of two heads is that of their key and value kernels side by side.
    """
    del rng
    # [L, D, K, G, 1, H] - [L, D, K, 1, G, H], summed over D and H: [L, K, G, G].
    of_keys, of_values = (
        jnp.square(x[:, :, :, :, None] - x[:, :, :, None]).sum((1, 5)) for x in (keys, values)
    )
    squared_distances = of_keys + of_values
    return _take(keys, values, jnp.sqrt(squared_distances).sum(3).argmin(2))


def largest(keys: Groups, values: Groups, rng: PRNGKeyArray) -> Kernels:
    """Return the head of each group with the largest norm of key and value kernel side by side."""
    del rng
    of_keys, of_values = (jnp.square(x).sum((1, 4)) for x in (keys, values))
    square = of_keys + of_values
    return _take(keys, values, square.argmax(2))


def prune(keys: Groups, values: Groups, energies: Float[Array, "L K G"]) -> Kernels:
    """Return the head of each group with the largest output energy; the others are pruned.

    The query heads of a pruned head read the head that is kept. NVIDIA's Model Optimizer prunes KV
    heads for Puzzle (https://arxiv.org/abs/2411.19146); the measure here is `output_energies`.
    """
    return _take(keys, values, energies.argmax(2))


def output_energies(kernels: dict, attended: AttendedCovariance) -> Float[Array, " K"]:
    """Return E ||o||^2 of each KV head's output o (docs/conversion.md, eq. 17).

    A KV head's output is that of the query heads that read it; products between different query
    heads are left out.

    Args:
        kernels: of one layer.
        attended: of the same layer.
    """
    N, K = kernels["query"].shape[1], kernels["value"].shape[1]
    value, out = (np.asarray(kernels[name], np.float64) for name in ("value", "out"))

    # Query head n adds z W_v W_o to the output, whose energy is the trace of the product of the
    # matrices z z', W_v and W_o W_o', each read by the next.
    W = np.repeat(value.transpose(1, 0, 2), N // K, axis=0)  # [N, D, H]
    of_values = W.swapaxes(1, 2) @ attended.values @ W  # [N, H, H]
    of_outputs = out @ out.swapaxes(1, 2)
    return jnp.asarray((of_values * of_outputs).sum((1, 2)).reshape(K, -1).sum(1))


def _take(keys: Groups, values: Groups, index: Int[Array, "L K"]) -> Kernels:
    """Return member index[l, k] of group k of layer l, of keys and of values."""
    # Axes for D, G and H make the index [L, 1, K, 1, 1], which `take_along_axis` broadcasts.
    index = index[:, None, :, None, None]
    new_keys, new_values = (
        jnp.take_along_axis(x, index, axis=3)[:, :, :, 0] for x in (keys, values)
    )
    return new_keys, new_values


def restore_norm(pooled: Heads, groups: Groups) -> Heads:
    """Scale each pooled head to the mean Frobenius norm of its group (docs/conversion.md, eq. 13).

    A head of zeros stays zero.

    Args:
        pooled: the new heads [L, D, K, H].
        groups: the heads that they replace, [L, D, K, G, H].
    """
    # A head of zeros is multiplied by 1. The inner `where` keeps the unused quotient finite.
    target = jnp.sqrt(jnp.square(groups).sum((1, 4), keepdims=True)).mean(3)
    norm = jnp.sqrt(jnp.square(pooled).sum((1, 3), keepdims=True))
    return pooled * jnp.where(norm > 0, target / jnp.where(norm > 0, norm, 1.0), 1.0)
