"""Intervals cover what they should; pairs of seeds and of resamples cancel what both share."""

import numpy as np
import pytest

from experiments.report import estimate
from tests.support.made_results import PARENT, TASKS, paired_score, record, score, variant


def over_seeds(values, width=1.5, **more):
    """By seed, a score of one task with that half width."""
    return estimate.over_seeds(
        {s: score(PARENT, "parameter_qa", v, width, **more) for s, v in values.items()}
    )


def test_paired_intervals_cover_the_true_difference_and_unpaired_ones_are_too_wide():
    rng = np.random.default_rng(0)
    n, trials, gain = 200, 200, 3.0
    draws = rng.integers(n, size=(200, n))
    covered, narrower = [], []
    for _ in range(trials):
        shared = rng.normal(50, 30, n)  # how hard an example is, for both
        estimates = []
        for shift in (0.0, gain):
            scores = shared + shift + rng.normal(0, 10, n)
            value, width = scores.mean(), 1.96 * scores.std() / n**0.5
            replicates = scores[draws].mean(1).tolist()
            estimates.append(over_seeds({0: value}, width, replicates=replicates))
        paired = estimate.difference(estimates[1], estimates[0])
        alone = [e._replace(runs={}) for e in estimates]
        unpaired = estimate.difference(alone[1], alone[0])
        assert (paired.paired, unpaired.paired) == (True, False)
        assert paired.value == pytest.approx(unpaired.value)
        covered.append(paired.low < gain < paired.high)
        narrower.append((paired.high - paired.low) / (unpaired.high - unpaired.low))
    assert 0.9 <= np.mean(covered) <= 0.99
    assert np.mean(narrower) == pytest.approx((1 / 10) ** 0.5, rel=0.1)


def test_seeds_are_paired_by_number_and_what_one_lacks_is_left_out():
    replicates = {"replicates": [0.0, 0.0]}  # nothing is left open by the examples
    parent = over_seeds({0: 10.0, 1: 20.0, 2: 30.0}, **replicates)
    own = over_seeds({1: 19.0, 0: 8.0, 7: 99.0}, **replicates)
    found = estimate.difference(own, parent)
    # Student's t for 95% and one degree of freedom is 12.706; differences are -1 and -2.
    assert found.value == pytest.approx(-1.5)
    assert found.seeds == pytest.approx(12.706 * 0.5, rel=1e-4)
    assert (found.low, found.high) == pytest.approx((-1.5 - found.seeds, -1.5 + found.seeds))
    assert found.examples == 0
    assert not found.shown


def test_examples_and_seeds_add_in_quadrature():
    rng = np.random.default_rng(0)
    shapes = rng.normal(size=(2, 200))
    records = {
        s: score(PARENT, "parameter_qa", v, replicates=shapes[s].tolist())
        for s, v in enumerate((12.0, 14.0))
    }
    still = over_seeds({0: 10.0, 1: 10.0}, replicates=[0.0] * 200)
    found = estimate.difference(estimate.over_seeds(records), still)
    assert found.examples == pytest.approx(1.96 * shapes.mean(0).std(ddof=1))
    assert found.seeds == pytest.approx(12.706, rel=1e-4)
    assert found.high - 3 == pytest.approx(np.hypot(found.examples, found.seeds))


@pytest.mark.parametrize(
    "other",
    [
        over_seeds({0: 20.0}),
        over_seeds({0: 20.0}, n=300, replicates=[20.0, 20.0]),
        over_seeds({1: 20.0}, replicates=[20.0, 20.0]),
        over_seeds({0: 20.0}, replicates=[20.0, 20.0, 20.0]),
    ],
    ids=["no replicates", "other examples", "no seed in common", "other resamples"],
)
def test_what_cannot_be_paired_is_compared_as_independent(other):
    own = over_seeds({0: 24.0}, replicates=[24.0, 24.0])
    found = estimate.difference(own, other)
    assert not found.paired
    assert (found.low, found.high) == pytest.approx((4 - 1.5 * 2**0.5, 4 + 1.5 * 2**0.5))
    assert found.shown
    blind = estimate.difference(own, other._replace(low=None, high=None))
    assert (blind.value, blind.low, blind.shown) == (4, None, False)


def test_the_average_pairs_when_every_task_does():
    own, parent = (
        [
            estimate.over_seeds({0: paired_score(settings, task, value, error)})
            for task, value in zip(TASKS, values, strict=True)
        ]
        for settings, values, error in ((variant(8), (10, 20), 0.6), (PARENT, (12, 20), 0.0))
    )
    averages = estimate.average(own), estimate.average(parent)
    assert averages[0].value == 15
    assert averages[0].high - 15 == pytest.approx(1.5 / 2**0.5)
    found = estimate.difference(*averages)
    assert found.paired
    assert found.value == -1
    # Two independent tasks, each with that standard error, or nearly so.
    assert found.examples == pytest.approx(1.96 * 0.6 / 2**0.5, rel=0.1)
    half = estimate.average([own[0], own[1]._replace(runs={0: own[1].runs[0]._replace(n=1)})])
    assert not estimate.difference(half, averages[1]).paired
    none = estimate.average([own[0], own[1]._replace(runs={})])
    assert not estimate.difference(none, averages[1]).paired


def test_the_seeds_alone_give_an_interval_where_a_number_has_none():
    losses = {s: record(PARENT, "uptrain", "validation_loss", v) for s, v in ((1, 3.0), (2, 4.0))}
    found = estimate.over_seeds(losses)
    assert found.high - 3.5 == pytest.approx(12.706 * 0.5, rel=1e-4)
    assert estimate.over_seeds({1: losses[1]}).low is None
    same = {s: record(PARENT, "uptrain", "steps", 100) for s in (1, 2)}
    assert estimate.over_seeds(same).low is None


def lopsided(value, below, above, seed=0, **more):
    """A score whose interval reaches further on one side."""
    ends = {"low": value - below, "high": value + above}
    return estimate.over_seeds({seed: score(PARENT, "parameter_qa", value, **more) | ends})


def test_each_end_of_an_unpaired_interval_is_of_the_ends_that_make_it():
    """The difference is lowest where the first is lowest and the other highest: 3-4-5, 5-12-13."""
    found = estimate.difference(lopsided(24.0, 3.0, 5.0), lopsided(20.0, 12.0, 4.0))
    assert not found.paired
    assert found.low == pytest.approx(4 - np.hypot(3, 4))
    assert found.high == pytest.approx(4 + np.hypot(5, 12))
    assert found.examples == pytest.approx(13)
    assert not found.shown


def test_means_keep_the_sides_of_their_intervals():
    over = {0: lopsided(10.0, 1.0, 3.0), 1: lopsided(10.0, 2.0, 6.0)}
    records = {
        s: score(PARENT, "parameter_qa", e.value) | {"low": e.low, "high": e.high}
        for s, e in over.items()
    }
    seeds = estimate.over_seeds(records)
    assert (seeds.low, seeds.high) == pytest.approx((10 - 1.5, 10 + 4.5))
    tasks = estimate.average([lopsided(10.0, 3.0, 5.0), lopsided(20.0, 4.0, 12.0)])
    assert (tasks.value, tasks.seeds) == (15, 1)
    assert (tasks.low, tasks.high) == pytest.approx((15 - 5 / 2, 15 + 13 / 2))


def test_an_average_has_as_many_seeds_as_the_task_with_fewest():
    found = estimate.average([over_seeds({0: 1.0, 1: 2.0, 2: 3.0}), over_seeds({1: 4.0, 2: 5.0})])
    assert found.seeds == 2
    assert {seed: run.value for seed, run in found.runs.items()} == {1: 3.0, 2: 4.0}
