"""Adafactor's state for a converted network: moments of shared heads, heads in another order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gqa.runtime.errors import UserError
from gqa.training.optimizer import adafactor


def convert_state(opt_state, old_params, new_params, how: str):
    """The optimizer state for converted parameters.

    "reset" starts from zero moments. "map" keeps every leaf whose shape is unchanged and, for a
    pooled kernel, sums the (reconstructed) second moments of the heads in each group: a shared
    head's gradient is the sum of theirs. The step count, on which the decay depends, is kept.
    """
    if how not in ("map", "reset"):
        raise UserError(f"convert.optimizer={how!r}; use map or reset")
    fresh = adafactor().init(new_params)
    if how == "reset":
        return fresh

    def on_leaf(path, new, old, fresh_state, state):
        if new.shape == old.shape:
            return state
        _, D, num_heads, H = old.shape
        pool = partial(_pool_moments, shape=(D, num_heads, H), num_kv_heads=new.shape[2])
        return (jax.vmap(pool)(state[0], fresh_state[0]), *state[1:])

    return jax.tree_util.tree_map_with_path(on_leaf, new_params, old_params, fresh, opt_state)


def permute_heads(state, shape: tuple[int, ...], axis: int, order: np.ndarray):
    """The state of a leaf of `shape` once the heads on its `axis` come in another order.

    order [L, heads] is that of each layer of a stacked leaf, [heads] that of any other.
    """
    stacked = order.ndim - 1
    inner, side = shape[stacked:], min(axis - stacked, 1)
    if len(inner) == 3:  # head_dim is on the same side of the matrix
        inner = (inner[0], inner[1] * inner[2]) if side else (inner[0] * inner[1], inner[2])
    side_is_larger = side == _larger(inner)

    def reordered(x: Array, order: Array, axis: int = 0) -> Array:
        heads = x.reshape(*x.shape[:axis], len(order), -1, *x.shape[axis + 1 :])
        return jnp.take(heads, order, axis=axis).reshape(x.shape)

    def one(old, order: Array):
        if old.v_row.size == 1:
            return old._replace(v=reordered(old.v, order, side))
        if side_is_larger:
            return old._replace(v_col=reordered(old.v_col, order))
        return old._replace(v_row=reordered(old.v_row, order))

    return ((jax.vmap(one) if stacked else one)(state[0], jnp.asarray(order)), *state[1:])


def _pool_moments(old, fresh, shape: tuple[int, int, int], num_kv_heads: int):
    """One layer's factored-RMS state of a [D, N * H] matrix for the [D, K * H] one."""
    D, num_heads, H = shape
    if old.v_row.size > 1:  # optax keeps a placeholder of size 1 where it does not factor
        rows, columns = old.v_row, old.v_col
        if _larger((D, num_heads * H)) == 0:
            rows, columns = columns, rows
        moments = rows[:, None] * columns[None] / rows.mean()
    else:
        moments = old.v
    moments = moments.reshape(D, num_kv_heads, -1, H).sum(2).reshape(D, num_kv_heads * H)
    if fresh.v_row.size == 1:
        return fresh._replace(count=old.count, v=moments)
    means = moments.mean(1), moments.mean(0)
    v_row, v_col = means if _larger((D, num_kv_heads * H)) else means[::-1]
    return fresh._replace(count=old.count, v_row=v_row, v_col=v_col)


def _larger(sides: tuple[int, int]) -> int:
    """The side of a matrix that a state's `v_col` lies along, and its `v_row` is the mean over."""
    return int(sides[1] >= sides[0])
