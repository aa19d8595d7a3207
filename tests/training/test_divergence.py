"""Test the guard over the losses: its mean, when a loss is a spike, and when training ends."""

import math
from pathlib import Path

import pytest

from gqa.runtime.errors import DivergedError
from gqa.training.divergence import NEW, BadLoss, Counts, Guard, Settings


def fed(losses, **settings):
    """A guard that has seen these losses, none of them a spike."""
    guard = Guard(Settings(**settings))
    for step, loss in enumerate(losses, start=1):
        guard.check(step, loss, {})
    return guard


def is_spike(guard, loss):
    """Whether a guard that has seen what `guard` has would refuse the loss."""
    copy = Guard(guard._settings)
    copy.set_state(guard.get_state())
    try:
        copy.check(1000, loss, {})
    except BadLoss:
        return True
    return False


def test_no_loss_is_a_spike_before_twenty_steps():
    assert not is_spike(fed([1.0] * 19), 100.0)
    assert is_spike(fed([1.0] * 20), 100.0)


def test_a_spike_is_more_than_the_setting_above_the_mean():
    guard = fed([1.0] * 30, spike=2.0)
    assert not is_spike(guard, 2.9)
    assert not is_spike(guard, 3.0)  # exactly 2 above
    assert is_spike(guard, 3.1)
    assert not is_spike(fed([1.0] * 30, spike=0.0), 1e9)
    assert is_spike(fed([1.0] * 30), 4.1)  # the default is 3
    assert not is_spike(fed([1.0] * 30), 3.9)


def test_a_loss_that_falls_is_no_spike():
    guard = fed([10.0] * 30)
    assert not is_spike(guard, 0.0)
    assert not is_spike(guard, -50.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [0, 30])
def test_a_loss_that_is_not_finite_is_refused_at_any_step_and_leaves_the_mean(loss, count):
    guard = fed([1.0] * count, spike=0.0)
    before = guard.get_state()
    with pytest.raises(BadLoss) as caught:
        guard.check(7, loss, {"position": 8})
    assert (caught.value.step, caught.value.position) == (7, {"position": 8})
    assert caught.value.problem == f"the loss is {loss}"
    assert guard.get_state() == before


def test_a_spike_leaves_the_mean_and_says_how_far_it_is_above():
    guard = fed([1.0] * 25)
    before = guard.get_state()
    with pytest.raises(BadLoss, match=r"the loss is 6\.000, 5\.000 above its mean of 1\.000"):
        guard.check(26, 6.0, {})
    assert guard.get_state() == before | {"spikes": 1}


def test_the_mean_is_exact_for_a_hundred_steps_and_then_forgets():
    losses = [float(i % 7) for i in range(100)]
    guard = fed(losses, spike=0.0)
    assert guard.get_state()["mean"] == pytest.approx(sum(losses) / 100)
    assert guard.get_state()["count"] == 100
    # From here on each new loss weighs one hundredth: 50 steps of 1 after 150 of 0.
    guard = fed([0.0] * 150 + [1.0] * 50, spike=0.0)
    assert guard.get_state()["mean"] == pytest.approx(1 - 0.99**50)


def test_a_state_that_is_restored_decides_alike():
    guard = fed([2.0] * 20)
    guard.counts = Counts(5, 2)
    other = Guard(guard._settings)
    other.set_state(guard.get_state())
    assert other.get_state() == guard.get_state()
    assert other.counts == (5, 2)
    assert is_spike(other, 6.0)
    start = {"count": 0, "mean": 0.0, "spikes": 0, "rollbacks": 0}
    assert Guard(Settings()).get_state() == NEW == start

    # A checkpoint of an earlier version counted no spikes.
    other.set_state({"count": 20, "mean": 2.0, "rollbacks": 1})
    assert other.counts == (0, 1)


def test_rollbacks_are_allowed_as_often_as_the_setting_says(capsys):
    bad_loss = BadLoss(9, "the loss is nan", {})
    last_good = Path("6")
    guard = Guard(Settings(on_divergence="rollback", max_rollbacks=2))
    for count in (1, 2):
        guard.count_rollback("run", bad_loss, last_good)
        assert guard.counts == (0, count)
        assert f"rollback {count} to checkpoint 6" in capsys.readouterr().out

    problem = "run: the loss is nan at step 9, after 2 rollbacks"
    with pytest.raises(DivergedError, match=problem) as caught:
        guard.count_rollback("run", bad_loss, last_good)
    assert not caught.value.rollback_allowed
    assert Settings().max_rollbacks == 3


@pytest.mark.parametrize(("last_good", "name"), [(Path("6"), "checkpoint 6"), (None, "the start")])
def test_an_error_of_divergence_has_the_step_and_the_last_good_checkpoint(last_good, name):
    bad_loss = BadLoss(9, "the loss is nan", {})
    with pytest.raises(DivergedError, match=f"the last good checkpoint is {name}$") as caught:
        Guard(Settings()).count_rollback("run", bad_loss, last_good)
    assert (caught.value.step, caught.value.last_good) == (9, last_good)
    assert caught.value.rollback_allowed
