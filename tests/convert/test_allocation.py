"""KV heads by layer in one cache: known choices, ties, and the space that losses are in."""

import itertools

import numpy as np
import pytest
from tests.test_absorb import moments_of

from gqa.convert import closed_form, layer_budget, spread
from gqa.convert.attention_kernels import kernels_of


def test_a_longer_cache_costs_more():
    """With 8 positions a head, cross-attention leaves nothing for self-attention's second head."""
    lost = {
        ("decoder", 0): {1: 1.0, 2: 0.0},
        ("cross", 0): {1: 1.5, 2: 0.0},
    }
    # The budget is 1 head each: 2 + 8 positions.
    assert layer_budget.spread(lost, {"decoder": 1, "cross": 1}, {"decoder": 2, "cross": 8}) == {
        "decoder": (1,),
        "cross": (1,),
    }
    # 2 + 2 heads: both keep two.
    assert layer_budget.spread(lost, {"decoder": 2, "cross": 2}, {"decoder": 2, "cross": 8}) == {
        "decoder": (2,),
        "cross": (2,),
    }


def test_a_layer_that_loses_nothing_gives_its_heads_to_the_one_that_does():
    lost = {
        ("decoder", 0): {1: 0.0, 2: 0.0, 4: 0.0},
        ("decoder", 1): {1: 0.9, 2: 0.5, 4: 0.0},
        ("decoder", 2): {1: 0.2, 2: 0.1, 4: 0.0},
    }
    # 6 heads in all. Layer 0 takes one even where more would fit: fewer heads at the same loss.
    assert layer_budget.spread(lost, {"decoder": 2}, {"decoder": 7}) == {"decoder": (1, 4, 1)}
    assert layer_budget.spread(lost, {"decoder": 4}, {"decoder": 7}) == {"decoder": (1, 4, 4)}


@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_within_the_cache_loses_less(seed):
    """Of all choices for three layers, one attention whose cache is 3 times as long."""
    rng = np.random.default_rng(seed)
    items = [("decoder", 0), ("decoder", 1), ("cross", 0)]
    lost = {item: dict(zip((1, 2, 4), rng.random(3), strict=True)) for item in items}
    heads, lengths = {"decoder": 2, "cross": 1}, {"decoder": 2, "cross": 6}
    found = layer_budget.spread(lost, heads, lengths)
    room = 2 * 2 + 2 * 2 + 6 * 1

    def loss(choice):
        return sum(lost[item][K] for item, K in zip(items, choice, strict=True))

    choices = itertools.product((1, 2, 4), repeat=3)
    fitting = [(a, b, c) for a, b, c in choices if 2 * a + 2 * b + 6 * c <= room]
    assert (*found["decoder"], *found["cross"]) == min(fitting, key=loss)


@pytest.mark.parametrize("space", closed_form.SPACES)
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_spread_measures_losses_in_its_space(tiny, random_params, monkeypatch, space, shrinkage):
    """Each layer's loss is what svd would discard there, of every number of heads that divides."""
    params, moments = random_params(tiny), moments_of(tiny)
    seen = {}
    monkeypatch.setattr(layer_budget, "spread", lambda lost, heads, lengths: seen.update(lost))
    spread(
        params, tiny, 2, {"decoder": 4, "cross": 4},
        moments=moments, space=space, shrinkage=shrinkage,
    )  # fmt: skip
    assert {(name, i) for name in ("decoder", "cross") for i in (0, 1)} == seen.keys()
    for moment in moments:
        if moment.attention == "encoder":
            continue
        if space == "weight":
            moment = moment._replace(keys=None, queries=None)
        kernels = {side: x[moment.layer] for side, x in kernels_of(params, moment[0]).items()}
        for K in (1, 2, 4):
            expected = closed_form.discarded(kernels, K, space, moment, shrinkage)
            assert seen[moment[:2]][K] == pytest.approx(expected, rel=1e-9, abs=1e-12)
