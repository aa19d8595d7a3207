"""Choose KV heads for each layer, in a cache no larger than with one number everywhere.

Layers differ in what they lose by grouping. The losses are computed in closed_form.py
(docs/conversion.md, eq. 11); this file finds the cheapest choice among them (eq. 12).
"""

import math

import numpy as np


def allocate(
    discarded: dict[tuple[str, int], dict[int, float]],
    num_kv_heads: dict[str, int],
    lengths: dict[str, int],
) -> dict[str, tuple[int, ...]]:
    """Return the KV heads of each attention's layers with the least total loss (eq. 12).

    This is a knapsack problem: each layer picks one of its options, at a cost in bytes of cache.
    It is solved exactly by dynamic programming over the size of the cache.

    Args:
        discarded: by attention and layer, the loss with each possible number of KV heads.
        num_kv_heads: by attention, the number whose cache is the budget.
        lengths: by attention, the positions in the cache.
    """
    # Sizes are counted in units, so that the table below stays small. One unit is the cache of one
    # KV head at as many positions as divide all lengths: 512 and 2048 positions make units of 512,
    # and a head of the two attentions costs 1 and 4 units.
    unit = math.gcd(*(lengths[name] for name in num_kv_heads))
    cost = {name: lengths[name] // unit for name in num_kv_heads}
    budget = sum(cost[name] * num_kv_heads[name] for name, _ in discarded)

    # best[b] is the least loss of the layers so far in a cache of b units; chosen[i][b] is the
    # number of heads that layer i has there.
    best, chosen = np.zeros(budget + 1), []
    for (name, _), options in discarded.items():
        # reached[o][b] is the least loss with this layer's option o, or infinite if the option
        # alone costs more than b.
        heads = sorted(options)
        reached = np.full((len(heads), budget + 1), np.inf)
        for row, K in zip(reached, heads, strict=True):
            taken = cost[name] * K
            if taken <= budget:
                row[taken:] = best[: budget + 1 - taken] + options[K]
        chosen.append(np.array(heads)[reached.argmin(0)])
        best = reached.min(0)

    # Walk back from the full budget to the choice of the first layer.
    heads_of: dict[str, dict[int, int]] = {name: {} for name in num_kv_heads}
    for (name, layer), by_budget in zip(reversed(discarded), reversed(chosen), strict=True):
        K = int(by_budget[budget])
        heads_of[name][layer] = K
        budget -= cost[name] * K
    return {name: tuple(layers[i] for i in sorted(layers)) for name, layers in heads_of.items()}
