"""Choose which heads share a group: an order that makes the members of a group neighbours.

Query heads, their rows of the output kernel and, in self-attention, their columns of the position
bias move with their KV head, so the network stays the same function. Each cross-attention has an
order of its own, and so has each self-attention with a position bias of its own (umT5). In T5 the
self-attentions of a stack share one position bias and therefore one order, chosen by the sum of
their layers' similarities. How a group's heads become one is not decided here:
see pooling.py, closed_form.py and learned.py.
"""

from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gqa.conversion import closed_form
from gqa.conversion.attention_kernels import at, kernels_of, replaced
from gqa.conversion.calibration import ATTENTIONS, InputCovariance, check_finite

GROUPINGS = ("contiguous", "strided", "random", "weight_cos", "act_cos", "act_aligned")
MEASURED = ("act_cos", "act_aligned")  # groupings that read input covariances

RESTARTS = 8  # of the search, from random groups; the first start is groups of neighbours


def find_head_orders(
    params: dict,
    num_kv_heads: dict[str, int],
    grouping: str,
    seed: int = 0,
    input_covariances: Iterable[InputCovariance] | None = None,
) -> dict[str, Int[np.ndarray, "L N"]]:
    """Return the order [L, N] of each attention's KV heads in which groups are neighbours.

    Example: with N=4, K=2 and "strided" each layer's order is 0, 2, 1, 3: heads 0 and 2 share one
    KV head, 1 and 3 the other.

    Args:
        num_kv_heads: K of each attention. One that keeps its number of heads is left out.
        grouping: one of GROUPINGS. "contiguous" keeps every order, so nothing is returned.
            "strided" puts heads n, n + K, n + 2K, ... together. The last three search for equal
            groups with a large sum of similarities, the cosines of keys plus those of values.
        seed: of "random" and of the search.
        input_covariances: from calibration.py, for the groupings in MEASURED.
    """
    if grouping == "contiguous":
        return {}
    shapes = {name: kernels_of(params, name)["key"].shape for name in num_kv_heads}
    fewer_heads = {name: K for name, K in num_kv_heads.items() if shapes[name][2] > K}
    similarities = (
        {}
        if grouping in ("strided", "random")
        else _similarities(params, fewer_heads, grouping, input_covariances)
    )

    head_orders = {}
    for name, K in fewer_heads.items():
        # Self-attentions that share a position bias share one order. Cross-attentions have no
        # position bias, so each has its own order.
        L, _, N, _ = shapes[name]

        # Each attention has random numbers of its own, so that its order does not depend on which
        # other attentions are converted.
        rng = np.random.default_rng([seed, list(ATTENTIONS).index(name)])
        num_orders = 1 if _share_bias(params, name) else L
        if grouping == "strided":
            # Row i of the reshape is heads i K .. i K + K - 1; column k is group k: k, k + K, ...
            rows = [np.arange(N).reshape(-1, K).T.reshape(-1)]
        elif grouping == "random":
            rows = [rng.permutation(N) for _ in range(num_orders)]
        else:
            similar = similarities[name]
            layers = similar if num_orders > 1 else similar.sum(0, keepdims=True)
            rows = [search(x, K, rng) for x in layers]
        head_orders[name] = np.broadcast_to(np.stack(rows), (L, N))
    return head_orders


def permute_heads(params: dict, head_orders: dict[str, Int[np.ndarray, "L N"]]) -> dict:
    """Return parameters whose KV head i of layer l was head order[l, i]; the function is the same.

    Raises:
        ValueError: if the layers of a self-attention differ in order, because they share a bias.
    """
    for path, axis, order in head_axes(params, head_orders):
        params = replaced(params, path, _take_heads(at(params, path), order, axis))
    return params


def head_axes(
    params: dict, head_orders: dict[str, Int[np.ndarray, "L N"]]
) -> list[tuple[tuple[str, ...], int, np.ndarray]]:
    """Return the path of every leaf with heads, the axis they lie on, and their new order."""
    return [
        (path, *axis_and_order)
        for name, order in head_orders.items()
        for path, axis_and_order in _head_axes_of(params, name, order).items()
    ]


def _head_axes_of(
    params: dict, name: str, order: np.ndarray
) -> dict[tuple[str, ...], tuple[int, np.ndarray]]:
    """Return, by the path of each leaf of attention `name` with heads, their axis and order."""
    stack, attention = ATTENTIONS[name]

    query_order = _query_order(order, kernels_of(params, name)["query"].shape[2])
    axes = {
        "query": (2, query_order),
        "key": (2, order),
        "value": (2, order),
        "out": (1, query_order),
    }
    leaves: dict[tuple[str, ...], tuple[int, np.ndarray]] = {
        (stack, "layers", attention, kernel): axis for kernel, axis in axes.items()
    }
    if name == "cross_attention":
        return leaves
    if not _share_bias(params, name):
        return leaves | {(stack, "layers", "position_bias", "table"): (2, query_order)}

    if (order != order[0]).any():
        raise ValueError(f"the layers of {name} self-attention share a bias: permute them alike")
    return leaves | {(stack, "position_bias", "table"): (1, query_order[0])}


def _share_bias(params: dict, name: str) -> bool:
    """Return whether all layers of an attention add one table of position biases."""
    stack, _ = ATTENTIONS[name]
    return name != "cross_attention" and "position_bias" in params[stack]


def _query_order(order: Int[np.ndarray, "*L K"], num_heads: int) -> Int[np.ndarray, "*L N"]:
    """Return the order of the query heads: those of one KV head are neighbours and move with it."""
    queries_per_head = num_heads // order.shape[-1]
    offsets = np.arange(queries_per_head)
    return (order[..., None] * queries_per_head + offsets).reshape(*order.shape[:-1], num_heads)


def permute_covariances(
    input_covariances: Iterable[InputCovariance],
    head_orders: dict[str, Int[np.ndarray, "L N"]],
) -> Iterator[InputCovariance]:
    """Yield covariances of the network whose heads `permute_heads` reordered.

    Only what each head attends to depends on the order.
    """
    for covariance in input_covariances:
        attended = covariance.attended
        if attended is not None and covariance.attention in head_orders:
            order = head_orders[covariance.attention][covariance.layer]
            values = attended.values[_query_order(order, len(attended.values))]
            covariance = covariance._replace(attended=attended._replace(values=values))
        yield covariance


def _take_heads(leaf: Array, order: np.ndarray, axis: int) -> Array:
    """Reorder `axis` of a leaf by order [L, heads], or [heads] if it is not stacked."""
    # A shared position bias [buckets, N] is the one leaf that is not stacked over layers.
    if order.ndim == 1:
        return leaf[:, order]
    shape = [1] * leaf.ndim
    shape[0], shape[axis] = order.shape
    return jnp.take_along_axis(leaf, jnp.asarray(order.reshape(shape)), axis=axis)


def _similarities(
    params: dict,
    num_kv_heads: dict[str, int],
    grouping: str,
    input_covariances: Iterable[InputCovariance] | None,
) -> dict[str, np.ndarray]:
    """Return the similarities [L, N, N] of the heads of each attention in `num_kv_heads`."""
    by_layer: dict[str, dict[int, np.ndarray]] = {name: {} for name in num_kv_heads}
    if grouping in MEASURED:
        for covariance in input_covariances or ():
            name, layer = covariance.attention, covariance.layer
            if name in num_kv_heads:
                check_finite(covariance)
                by_layer[name][layer] = similarity(
                    kernels_of(params, name), layer, covariance.keys, grouping == "act_aligned"
                )
    else:
        for name in num_kv_heads:
            kernels = kernels_of(params, name)
            for layer in range(len(kernels["key"])):
                by_layer[name][layer] = similarity(kernels, layer, None, aligned=False)
    return {name: np.stack([x[layer] for layer in sorted(x)]) for name, x in by_layer.items()}


def similarity(
    kernels: dict, layer: int, C: Float[np.ndarray, "D D"] | None, aligned: bool
) -> Float[np.ndarray, "N N"]:
    """Return the cosines of one layer's heads in the metric C, those of keys plus those of values.

    `aligned` takes the largest cosine that any rotation of one of the two heads gives: the nuclear
    norm of their product instead of its trace.
    """
    # The trace of W_i' C W_j is the inner product of heads i and j. Divided by both norms it is
    # their cosine.
    total = np.zeros(())
    for name in ("key", "value"):
        heads = np.asarray(kernels[name][layer], np.float64).transpose(1, 0, 2)
        gram = closed_form.gram_matrix(heads, C).swapaxes(1, 2)  # [N, N, H, H]
        traces = np.trace(gram, axis1=2, axis2=3)
        norms = np.sqrt(np.outer(traces.diagonal(), traces.diagonal()))
        if aligned:
            traces = np.linalg.svd(gram, compute_uv=False).sum(-1)
        total = total + np.divide(traces, norms, out=np.zeros_like(norms), where=norms > 0)
    return total


def search(
    similarities: Float[np.ndarray, "N N"], num_groups: int, rng: np.random.Generator
) -> Int[np.ndarray, " N"]:
    """Return an order in which neighbours form equal groups with a large sum of similarities.

    Hill climbing by the best swap of two heads, from groups of neighbours and from RESTARTS random
    ones. Groups come in the order of their first heads.
    """
    # A head's similarity to itself is the same in every grouping.
    N = len(similarities)
    similarities = np.where(np.eye(N, dtype=bool), 0.0, similarities)
    neighbours = np.repeat(np.arange(num_groups), N // num_groups)
    starts = [neighbours, *(rng.permutation(neighbours) for _ in range(RESTARTS))]
    results = [_climb(similarities, start) for start in starts]

    best = max(results, key=lambda group_of: _total_similarity(similarities, group_of))
    members = [np.flatnonzero(best == group) for group in range(num_groups)]
    return np.concatenate(sorted(members, key=lambda heads: heads[0]))


def _climb(similarities: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """Swap the two heads with the largest gain until none gains; group_of [N] is each head's."""
    group_of = group_of.copy()
    while True:
        one_hot = np.eye(group_of.max() + 1)[group_of]
        to_group = similarities @ one_hot  # [N, groups]: similarity of each head to each group

        # What head i gains by moving to the group of head j, and j by moving to that of i. Their
        # own similarity was counted in both moves, but they end in different groups.
        gain = to_group[:, group_of] - to_group[np.arange(len(group_of)), group_of][:, None]
        gain = gain + gain.T - 2 * similarities
        gain[group_of[:, None] == group_of] = 0.0

        # A gain of rounding alone would let two heads be swapped to and fro for ever.
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-9:
            return group_of
        group_of[[i, j]] = group_of[[j, i]]


def _total_similarity(similarities: np.ndarray, group_of: np.ndarray) -> float:
    return float(similarities[group_of[:, None] == group_of].sum())
