"""Where an attention's kernels are in the parameters, and how they look group by group.

query [L, D, N, H], key and value [L, D, K, H], out [L, N, H, D]; a network whose KV heads differ by
layer has these for each of its runs (`gqa.model.cut`).
"""

import functools
import operator

from jax import Array

from gqa.conversion.calibration import ATTENTIONS


def kernels_of(params: dict, name: str) -> dict:
    """The kernels of attention `name`, stacked over layers."""
    stack, attention = ATTENTIONS[name]
    return params[stack]["layers"][attention]


def with_kernels(params: dict, name: str, new: dict) -> dict:
    """Parameters with other kernels in attention `name`; what else there is is shared."""
    stack, attention = ATTENTIONS[name]
    return replaced(params, (stack, "layers", attention), new)


def replaced(tree: dict, path: tuple[str, ...], value) -> dict:
    """A tree with `value` at `path`."""
    if not path:
        return value
    return tree | {path[0]: replaced(tree[path[0]], path[1:], value)}


def at(tree: dict, path: tuple[str, ...]):
    """What a tree has at `path`."""
    return functools.reduce(operator.getitem, path, tree)


def in_groups(kernel: Array, num_groups: int) -> Array:
    """[L, D, N, H] as neighbours in groups: [L, D, K, G, H]."""
    L, D, N, H = kernel.shape
    return kernel.reshape(L, D, num_groups, N // num_groups, H)
