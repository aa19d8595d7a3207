"""Find and replace an attention's kernels in the parameter tree, and cut their heads into groups.

An attention has the kernels query [L, D, N, H], key and value [L, D, K, H] and out [L, N, H, D],
stacked over the L layers. A network whose layers differ in KV heads has these arrays once for each
layer group (`gqa.model.transformer.cut`). The functions here are for networks with a single group,
such as every network that is to be converted.
"""

import functools
import operator
from typing import Any

from jaxtyping import Array, Float

from gqa.conversion.calibration import ATTENTIONS


def kernels_of(params: dict, name: str) -> dict:
    """Return the kernels of attention `name`, stacked over layers."""
    stack, attention = ATTENTIONS[name]
    return params[stack]["layers"][attention]


def with_kernels(params: dict, name: str, new: dict) -> dict:
    """Return parameters with the kernels `new` in attention `name`; all other leaves are shared."""
    stack, attention = ATTENTIONS[name]
    return replaced(params, (stack, "layers", attention), new)


def replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """Return a copy of nested dicts with `value` at `path`; all other leaves are shared.

    `value` may be an array or a dict. With an empty path it is the result.
    """
    if not path:
        return value
    return tree | {path[0]: replaced(tree[path[0]], path[1:], value)}


def at(tree: dict, path: tuple[str, ...]) -> Any:
    """Return the value at `path` of nested dicts."""
    return functools.reduce(operator.getitem, path, tree)


def in_groups(
    kernel: Float[Array, "L D N H"], num_groups: int
) -> Float[Array, "L D {num_groups} G H"]:
    """Cut the N heads of a kernel into groups of G neighbours.

    Example: 8 heads in 2 groups are heads 0-3 and heads 4-7.
    """
    L, D, N, H = kernel.shape
    return kernel.reshape(L, D, num_groups, N // num_groups, H)
