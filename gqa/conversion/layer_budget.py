"""KV heads by layer: the cache that one number would take, spread over layers and attentions.

Some layers lose more by grouping than others. What a layer loses with K heads is the energy that
`svd` has to discard of its keys and of its values, each as a share of their own; the heads chosen
are those with the least sum of all shares whose cache is not larger.
"""

import math

import numpy as np


def allocate(
    discarded: dict[tuple[str, int], dict[int, float]],
    num_kv_heads: dict[str, int],
    lengths: dict[str, int],
) -> dict[str, tuple[int, ...]]:
    """KV heads of each layer of each attention, with the least energy discarded in all.

    Args:
        discarded: of each attention and layer, by the number of heads that would be left.
        num_kv_heads: of each attention, the number that would take the same cache everywhere.
        lengths: positions that the cache of each attention holds.
    """
    unit = math.gcd(*(lengths[name] for name in num_kv_heads))
    cost = {name: lengths[name] // unit for name in num_kv_heads}
    budget = sum(cost[name] * num_kv_heads[name] for name, _ in discarded)
    # best[b] is the least that is discarded with a cache of b; chosen[i][b] how item i gets there.
    best, chosen = np.zeros(budget + 1), []
    for (name, _), options in discarded.items():
        heads = sorted(options)
        reached = np.full((len(heads), budget + 1), np.inf)
        for row, K in zip(reached, heads, strict=True):
            taken = cost[name] * K
            if taken <= budget:
                row[taken:] = best[: budget + 1 - taken] + options[K]
        chosen.append(np.array(heads)[reached.argmin(0)])
        best = reached.min(0)
    found = {name: {} for name in num_kv_heads}
    for (name, layer), by_budget in zip(reversed(discarded), reversed(chosen), strict=True):
        K = int(by_budget[budget])
        found[name][layer] = K
        budget -= cost[name] * K
    return {name: tuple(layers[i] for i in sorted(layers)) for name, layers in found.items()}
