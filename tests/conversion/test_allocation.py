"""Test KV heads by layer in a fixed cache: known choices, ties, and the space of the losses."""

import itertools

import numpy as np
import pytest

from gqa.conversion import closed_form, layer_budget, per_layer_kv_heads
from gqa.conversion.attention_kernels import kernels_of
from tests.conversion.test_closed_form import covariances_of


def test_a_longer_cache_costs_more():
    """With 8 positions a head, cross-attention leaves nothing for self-attention's second head."""
    lost = {
        ("self_attention", 0): {1: 1.0, 2: 0.0},
        ("cross_attention", 0): {1: 1.5, 2: 0.0},
    }
    # The budget is 1 head each: 2 + 8 positions.
    assert layer_budget.allocate(
        lost,
        {"self_attention": 1, "cross_attention": 1},
        {"self_attention": 2, "cross_attention": 8},
    ) == {
        "self_attention": (1,),
        "cross_attention": (1,),
    }
    # 2 + 2 heads: both keep two.
    assert layer_budget.allocate(
        lost,
        {"self_attention": 2, "cross_attention": 2},
        {"self_attention": 2, "cross_attention": 8},
    ) == {
        "self_attention": (2,),
        "cross_attention": (2,),
    }


def test_a_layer_that_loses_nothing_gives_its_heads_to_the_one_that_does():
    lost = {
        ("self_attention", 0): {1: 0.0, 2: 0.0, 4: 0.0},
        ("self_attention", 1): {1: 0.9, 2: 0.5, 4: 0.0},
        ("self_attention", 2): {1: 0.2, 2: 0.1, 4: 0.0},
    }
    # 6 heads in all. Layer 0 takes one even where more would fit: fewer heads at the same loss.
    assert layer_budget.allocate(lost, {"self_attention": 2}, {"self_attention": 7}) == {
        "self_attention": (1, 4, 1)
    }
    assert layer_budget.allocate(lost, {"self_attention": 4}, {"self_attention": 7}) == {
        "self_attention": (1, 4, 4)
    }


def test_what_a_layer_takes_is_gone_for_those_before_it():
    little, much = {1: 0.2, 2: 0.1, 4: 0.0}, {1: 9.0, 2: 8.0, 4: 0.0}
    lost = {
        ("cross_attention", 0): little,
        ("cross_attention", 1): little,
        ("cross_attention", 2): much,
    }
    assert layer_budget.allocate(lost, {"cross_attention": 2}, {"cross_attention": 3}) == {
        "cross_attention": (1, 1, 4)
    }  # 6 in all


def test_one_layer_may_take_the_whole_cache():
    lost = {("self_attention", 0): {1: 0.9, 2: 0.5, 4: 0.0}}
    for heads in (1, 2, 4):
        assert layer_budget.allocate(lost, {"self_attention": heads}, {"self_attention": 3}) == {
            "self_attention": (heads,)
        }


@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_within_the_cache_loses_less(seed):
    """Of all choices for three layers, one attention whose cache is 3 times as long."""
    rng = np.random.default_rng(seed)
    items = [("self_attention", 0), ("self_attention", 1), ("cross_attention", 0)]
    lost = {item: dict(zip((1, 2, 4), rng.random(3), strict=True)) for item in items}
    heads, lengths = (
        {"self_attention": 2, "cross_attention": 1},
        {"self_attention": 2, "cross_attention": 6},
    )
    actual = layer_budget.allocate(lost, heads, lengths)
    room = 2 * 2 + 2 * 2 + 6 * 1

    def loss(choice):
        return sum(lost[item][K] for item, K in zip(items, choice, strict=True))

    choices = itertools.product((1, 2, 4), repeat=3)
    fitting = [(a, b, c) for a, b, c in choices if 2 * a + 2 * b + 6 * c <= room]
    assert (*actual["self_attention"], *actual["cross_attention"]) == min(fitting, key=loss)


@pytest.mark.parametrize("space", closed_form.SPACES)
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_the_budget_measures_losses_in_its_space(
    tiny, random_params, monkeypatch, space, shrinkage
):
    """Each layer's loss is what svd would discard there, of every number of heads that divides."""
    params, covariances = random_params(tiny), covariances_of(tiny)
    seen = {}
    monkeypatch.setattr(layer_budget, "allocate", lambda lost, heads, lengths: seen.update(lost))
    per_layer_kv_heads(
        params, tiny, 2, {"self_attention": 4, "cross_attention": 4},
        input_covariances=covariances, space=space, shrinkage=shrinkage,
    )  # fmt: skip
    assert {
        (name, i) for name in ("self_attention", "cross_attention") for i in (0, 1)
    } == seen.keys()
    for covariance in covariances:
        if covariance.attention == "encoder":
            continue
        if space == "weight":
            covariance = covariance._replace(keys=None, queries=None)
        kernels = {
            side: x[covariance.layer] for side, x in kernels_of(params, covariance[0]).items()
        }
        for K in (1, 2, 4):
            expected = closed_form.discarded_energy(kernels, K, space, covariance, shrinkage)
            assert seen[covariance[:2]][K] == pytest.approx(expected, rel=1e-9, abs=1e-12)
