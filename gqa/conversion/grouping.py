"""Which heads share a group: a permutation of heads that makes the members of a group neighbours.

Query heads, their rows of the output kernel and, in self-attention, their columns of the position
bias move with their KV head, so the network stays the same function. Cross-attention has no bias
and is permuted layer by layer; the self-attentions of a stack share one bias table and therefore
one permutation, chosen from the sum of their layers' similarities.
"""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax import Array

from gqa.conversion import closed_form
from gqa.conversion.attention_kernels import at, kernels_of, replaced
from gqa.conversion.calibration import ATTENTIONS, InputCovariance
from gqa.conversion.optimizer_state import permute_heads

GROUPINGS = ("contiguous", "strided", "random", "weight_cos", "act_cos", "act_aligned")
MEASURED = ("act_cos", "act_aligned")  # these need input_covariances

RESTARTS = 8  # of the search, from random groups; the first start is from neighbours


def orders(
    params: dict,
    num_kv_heads: dict[str, int],
    grouping: str,
    seed: int = 0,
    input_covariances: Iterable[InputCovariance] | None = None,
) -> dict[str, np.ndarray]:
    """The order [L, N] of each attention's KV heads that makes those neighbours that are to share.

    Args:
        num_kv_heads: per attention; one that keeps its number keeps its order, and is left out.
        grouping: one of GROUPINGS. Strided puts heads n, n + K, n + 2K, .. together; the last three
            look for equal groups of large total similarity, keys' and values' cosines added.
        seed: of "random" and of the search.
        input_covariances: of `gqa.calibrate`, for those in MEASURED.
    """
    if grouping == "contiguous":
        return {}
    old = {name: kernels_of(params, name)["key"].shape for name in num_kv_heads}
    fewer = {name: K for name, K in num_kv_heads.items() if old[name][2] > K}
    alike = (
        {}
        if grouping in ("strided", "random")
        else _alike(params, fewer, grouping, input_covariances)
    )
    found = {}
    for name, K in fewer.items():
        L, _, N, _ = old[name]
        rng = np.random.default_rng([seed, list(ATTENTIONS).index(name)])
        times = L if name == "cross_attention" else 1
        if grouping == "strided":
            rows = [np.arange(N).reshape(-1, K).T.reshape(-1)]
        elif grouping == "random":
            rows = [rng.permutation(N) for _ in range(times)]
        else:
            layers = alike[name] if times > 1 else alike[name].sum(0, keepdims=True)
            rows = [search(x, K, rng) for x in layers]
        found[name] = np.broadcast_to(np.stack(rows), (L, N))
    return found


def permuted(params: dict, orders: dict[str, np.ndarray]) -> dict:
    """Parameters whose KV head i of layer l is what was head order[l, i]; the same function.

    Raises:
        ValueError: for a self-attention whose layers differ in order, as they share a bias.
    """
    for path, axis, index in _moves(params, orders):
        params = replaced(params, path, _take(at(params, path), index, axis))
    return params


def permuted_moments(opt_state: dict, params: dict, orders: dict[str, np.ndarray]) -> dict:
    """The state of `gqa.optim` for `permuted` parameters, from that of `params`."""
    for path, axis, index in _moves(params, orders):
        moved = permute_heads(at(opt_state, path), at(params, path).shape, axis, index)
        opt_state = replaced(opt_state, path, moved)
    return opt_state


def _moves(params: dict, orders: dict[str, np.ndarray]) -> list[tuple[tuple, int, np.ndarray]]:
    """Which parameters have heads, on which axis, and the order they come in."""
    return [
        (path, *move)
        for name, order in orders.items()
        for path, move in _moves_of(params, name, order).items()
    ]


def _moves_of(params: dict, name: str, order: np.ndarray) -> dict[tuple, tuple[int, np.ndarray]]:
    """Which parameters have heads of an attention, on which axis, and the order they come in."""
    L, K = order.shape
    stack, attention = ATTENTIONS[name]
    P = kernels_of(params, name)["query"].shape[2] // K  # query heads of a KV head
    queries = (order[:, :, None] * P + np.arange(P)).reshape(L, K * P)
    moves = {"query": (2, queries), "key": (2, order), "value": (2, order), "out": (1, queries)}
    moves = {(stack, "layers", attention, kernel): move for kernel, move in moves.items()}
    if name == "cross_attention":
        return moves
    if (order != order[0]).any():
        raise ValueError(f"the layers of {name} self-attention share a bias: permute them alike")
    return moves | {(stack, "position_bias", "table"): (1, queries[0])}


def _take(leaf: Array, index: np.ndarray, axis: int) -> Array:
    """A leaf in the order index [L, heads] of an axis; [heads] is for one that is not stacked."""
    if index.ndim == 1:
        return leaf[:, index]
    shape = [1] * leaf.ndim
    shape[0], shape[axis] = index.shape
    return jnp.take_along_axis(leaf, jnp.asarray(index.reshape(shape)), axis=axis)


def _alike(params: dict, fewer: dict, grouping: str, input_covariances) -> dict[str, np.ndarray]:
    """Similarities [L, N, N] of the heads of each attention that is to have fewer."""
    found = {name: {} for name in fewer}
    if grouping in MEASURED:
        for m in input_covariances:
            if m.attention in fewer:
                kernels = kernels_of(params, m.attention)
                aligned = grouping == "act_aligned"
                found[m.attention][m.layer] = similarity(kernels, m.layer, m.keys, aligned)
    else:
        for name in fewer:
            kernels = kernels_of(params, name)
            for layer in range(len(kernels["key"])):
                found[name][layer] = similarity(kernels, layer, None, aligned=False)
    return {name: np.stack([x[layer] for layer in sorted(x)]) for name, x in found.items()}


def similarity(kernels: dict, layer: int, C: np.ndarray | None, aligned: bool) -> np.ndarray:
    """Cosines [N, N] of one layer's heads, of keys plus of values, in the metric C [D, D].

    `aligned` takes the largest cosine that any rotation of one of the two heads gives: the nuclear
    norm of their product instead of its trace.
    """
    total = 0.0
    for name in ("key", "value"):
        heads = np.asarray(kernels[name][layer], np.float64).transpose(1, 0, 2)
        gram = closed_form.gram_matrix(heads, C).swapaxes(1, 2)  # [N, N, H, H]
        traces = np.trace(gram, axis1=2, axis2=3)
        norms = np.sqrt(np.outer(traces.diagonal(), traces.diagonal()))
        if aligned:
            traces = np.linalg.svd(gram, compute_uv=False).sum(-1)
        total = total + np.divide(traces, norms, out=np.zeros_like(norms), where=norms > 0)
    return total


def search(alike: np.ndarray, num_groups: int, rng: np.random.Generator) -> np.ndarray:
    """An order [N] in which neighbours form equal groups of large total similarity [N, N].

    The best swap of two heads, again and again, from neighbours and from random groups. Groups come
    in the order of their first heads.
    """
    N = len(alike)
    alike = np.where(np.eye(N, dtype=bool), 0.0, alike)
    start = np.repeat(np.arange(num_groups), N // num_groups)
    starts = [start, *(rng.permutation(start) for _ in range(RESTARTS))]
    results = [_climb(alike, start) for start in starts]
    group = max(results, key=lambda group: _total(alike, group))
    members = [np.flatnonzero(group == g) for g in range(num_groups)]
    return np.concatenate(sorted(members, key=lambda m: m[0]))


def _climb(alike: np.ndarray, group: np.ndarray) -> np.ndarray:
    group = group.copy()
    while True:
        one_hot = np.eye(group.max() + 1)[group]
        near = alike @ one_hot  # [N, groups]: similarity of each head to each group
        gain = near[:, group] - near[np.arange(len(group)), group][:, None]  # of i to j's group
        gain = gain + gain.T - 2 * alike
        gain[group[:, None] == group] = 0.0
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-9:
            return group
        group[[i, j]] = group[[j, i]]


def _total(alike: np.ndarray, group: np.ndarray) -> float:
    return float(alike[group[:, None] == group].sum())
