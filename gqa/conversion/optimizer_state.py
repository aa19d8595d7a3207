"""Convert Adafactor's state together with the parameters.

There are three steps, in the order of `convert`: reorder the heads, split the layers into layer
groups, and pool the second moments of heads that become one. "Moments" here are Adafactor's running
means of squared gradients (gqa/training/optimizer.py), in one state per leaf of the parameters.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gqa.conversion import Conversion
from gqa.conversion.attention_kernels import at, replaced
from gqa.conversion.grouping import head_axes
from gqa.model.transformer import cut
from gqa.runtime.errors import ConfigError
from gqa.training.optimizer import adafactor

WAYS = ("map", "reset")


def convert_optimizer_state(
    opt_state: dict, old_params: dict, conversion: Conversion, how: str
) -> dict:
    """Return the optimizer state for the parameters of `conversion`.

    Args:
        opt_state: state of `adafactor()` for `old_params`, the parameters before conversion.
        how: "map" keeps the state of every leaf that keeps its shape and pools the moments of heads
            that become one; the step count, on which Adafactor's decay depends, goes on. "reset"
            starts from zero moments.

    Raises:
        ConfigError: for another `how`.
    """
    if how not in WAYS:
        raise ConfigError("how", how, f"use {' or '.join(WAYS)}")
    if how == "reset":
        return adafactor().init(conversion.params)
    opt_state = permute_heads(opt_state, old_params, conversion.head_orders)
    opt_state, old_params = (cut(tree, conversion.config) for tree in (opt_state, old_params))
    return pool_moments(opt_state, old_params, conversion.params)


def permute_heads(opt_state: dict, params: dict, head_orders: dict[str, np.ndarray]) -> dict:
    """Reorder the heads of a state as `grouping.permute_heads` reorders those of `params`."""
    for path, axis, order in head_axes(params, head_orders):
        leaf_state = _permute_leaf(at(opt_state, path), at(params, path).shape, axis, order)
        opt_state = replaced(opt_state, path, leaf_state)
    return opt_state


def pool_moments(opt_state: dict, old_params: dict, new_params: dict) -> dict:
    """Return the state for `new_params`, in which neighbouring KV heads of `old_params` are one.

    The gradient of a shared head is the sum of its members' gradients, so their second moments are
    summed. A leaf that keeps its shape keeps its state. Only the shapes of `old_params` are read.
    """
    # A fresh state tells which of the new leaves Adafactor factors.
    fresh = adafactor().init(new_params)

    def on_leaf(path: tuple, new: Array, old: Array, fresh_state: Any, state: Any) -> Any:
        if new.shape == old.shape:
            return state
        _, D, num_heads, H = old.shape
        pool = partial(_pool_layer, shape=(D, num_heads, H), num_kv_heads=new.shape[2])
        return (jax.vmap(pool)(state[0], fresh_state[0]), *state[1:])

    return jax.tree_util.tree_map_with_path(on_leaf, new_params, old_params, fresh, opt_state)


def _permute_leaf(state: Any, shape: tuple[int, ...], axis: int, order: np.ndarray) -> Any:
    """Reorder the heads on `axis` of the state of a leaf of `shape`.

    order is [L, heads] for a leaf that is stacked over layers, [heads] for any other.
    """
    # Adafactor sees each layer as a matrix, in which heads and head_dim lie along one side.
    stacked = order.ndim - 1

    # For query [L, D, N, H], axis 2, the matrix is [D, N * H] and its side 1.
    matrix, side = shape[stacked:], min(axis - stacked, 1)
    if len(matrix) == 3:
        A, B, C = matrix
        matrix = (A, B * C) if side else (A * B, C)

    # Only the vector of means that has one entry per head and coordinate is reordered. The other
    # vector holds means over all heads, which do not depend on their order.
    side_is_larger = side == _larger_side(matrix)

    def reordered(x: Array, order: Array, axis: int = 0) -> Array:
        heads = x.reshape(*x.shape[:axis], len(order), -1, *x.shape[axis + 1 :])
        return jnp.take(heads, order, axis=axis).reshape(x.shape)

    def permute_layer(old: Any, order: Array) -> Any:
        if old.v_row.size == 1:  # not factored
            return old._replace(v=reordered(old.v, order, side))
        if side_is_larger:
            return old._replace(v_col=reordered(old.v_col, order))
        return old._replace(v_row=reordered(old.v_row, order))

    permute = jax.vmap(permute_layer) if stacked else permute_layer
    return (permute(state[0], jnp.asarray(order)), *state[1:])


def _pool_layer(old: Any, fresh: Any, shape: tuple[int, int, int], num_kv_heads: int) -> Any:
    """Return one layer's factored-RMS state of a [D, K * H] matrix from that of [D, N * H]."""
    # The second moments [D, N * H]: stored whole, or as the means of their rows and columns. The
    # latter stand for their outer product divided by the mean of all moments.
    D, num_heads, H = shape
    if old.v_row.size > 1:  # optax keeps a placeholder of size 1 where it does not factor
        rows, columns = old.v_row, old.v_col
        if _larger_side((D, num_heads * H)) == 0:
            rows, columns = columns, rows
        moments = rows[:, None] * columns[None] / rows.mean()
    else:
        moments = old.v

    # The sum over each group; a pooled matrix may be too narrow for Adafactor to factor.
    moments = moments.reshape(D, num_kv_heads, -1, H).sum(2).reshape(D, num_kv_heads * H)
    if fresh.v_row.size == 1:
        return fresh._replace(count=old.count, v=moments)

    # Factor the pooled matrix as Adafactor would: `v_row` is the mean over the larger side.
    means = moments.mean(1), moments.mean(0)
    v_row, v_col = means if _larger_side((D, num_kv_heads * H)) else means[::-1]
    return fresh._replace(count=old.count, v_row=v_row, v_col=v_col)


def _larger_side(sides: tuple[int, ...]) -> int:
    """Return the side of a matrix that `v_col` lies along; `v_row` is the mean over this side."""
    return int(sides[1] >= sides[0])
