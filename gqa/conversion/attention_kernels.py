"""Find and replace an attention's kernels in the parameter tree, and cut their heads into groups.

An attention has the kernels query [L, D, N, H], key and value [L, D, K, H] and out [L, N, H, D],
stacked over the L layers. A network whose layers differ in KV heads has them once for each layer
group (`gqa.model.transformer.cut`); the functions here are for one without.
"""

import functools
import operator

from jax import Array

from gqa.conversion.calibration import ATTENTIONS


def kernels_of(params: dict, name: str) -> dict:
    """Return the kernels of attention `name`, stacked over layers."""
    stack, attention = ATTENTIONS[name]
    return params[stack]["layers"][attention]


def with_kernels(params: dict, name: str, new: dict) -> dict:
    """Return parameters with the kernels `new` in attention `name`; all other leaves are shared."""
    stack, attention = ATTENTIONS[name]
    return replaced(params, (stack, "layers", attention), new)


def replaced(tree: dict, path: tuple[str, ...], value) -> dict:
    """Return a copy of nested dicts with `value` at `path`; all other leaves are shared."""
    if not path:
        return value
    return tree | {path[0]: replaced(tree[path[0]], path[1:], value)}


def at(tree: dict, path: tuple[str, ...]):
    """Return the value at `path` of nested dicts."""
    return functools.reduce(operator.getitem, path, tree)


def in_groups(kernel: Array, num_groups: int) -> Array:
    """Reshape heads [L, D, N, H] to groups of neighbours [L, D, K, G, H]."""
    L, D, N, H = kernel.shape
    return kernel.reshape(L, D, num_groups, N // num_groups, H)
