"""Test that a run that was killed or stopped ends bit for bit like one that was not."""

import signal

import numpy as np
import pytest

from gqa.checkpoints import checkpoint, step_folders
from gqa.runtime import signals
from gqa.runtime.errors import DivergedError
from gqa.training.divergence import Settings
from tests.support import toy

NAN = float("nan")
ROLLBACK = Settings("rollback", max_rollbacks=3, spike=0.0)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it."""


@pytest.fixture(autouse=True)
def watch(monkeypatch):
    """A program that was sent no signal yet."""
    monkeypatch.setattr(signals, "_watch", signals._Watch())


def again():
    signals._watch.signum = None


def interrupt_at(at):
    def alive(step):
        if step == at:
            signals._handle(signal.SIGTERM, None)

    return alive


def kill_at(at):
    def alive(step):
        if step == at:
            raise Killed

    return alive


def preempt(folder, at, *args, **kwargs):
    """A run that SIGTERM ends once the metrics of step `at` are read."""
    with pytest.raises(signals.Interrupted) as caught:
        toy.fit(folder, *args, **kwargs, alive=interrupt_at(at))
    again()
    return caught.value


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function from the arguments of `toy.fit` to what an uninterrupted run returns and leaves.

    Runs are kept by their arguments.
    """
    runs = {}

    def whole(steps, every, **options):
        name = repr((steps, every, options))
        if name not in runs:
            folder = tmp_path_factory.mktemp("whole")
            runs[name] = toy.fit(folder, steps, every, **options), toy.outcome(folder)
        return runs[name]

    return whole


@pytest.mark.parametrize("at", range(1, 8))
def test_an_interrupted_run_ends_as_if_it_had_not_been(whole, tmp_path, at):
    interrupted = preempt(tmp_path / "parts", at, 8, 3)
    assert interrupted.signum == signal.SIGTERM
    saved = step_folders.find(tmp_path / "parts" / "checkpoints")
    # The step under way is finished: its metrics are read while the next one runs.
    assert saved.name == str(at if at in (3, 6) else at + 1)
    assert str(interrupted) == (
        f"toy: interrupted by SIGTERM; the same command goes on from {saved}"
    )
    toy.fit(tmp_path / "parts", 8, 3)
    toy.assert_same(toy.outcome(tmp_path / "parts"), whole(8, 3)[1])


def test_a_run_that_every_step_interrupts_ends_as_if_none_had(tmp_path):
    toy.fit(tmp_path / "whole", 7, 3)
    ends = []
    while ends[-1:] != ["7"]:
        with pytest.raises(signals.Interrupted):
            toy.fit(tmp_path / "parts", 7, 3, alive=lambda _: signals._handle(15, None))
        again()
        ends.append(step_folders.find(tmp_path / "parts" / "checkpoints").name)
    assert ends == ["2", "3", "5", "6", "7"]
    toy.fit(tmp_path / "parts", 7, 3)
    toy.assert_same(toy.outcome(tmp_path / "parts"), toy.outcome(tmp_path / "whole"))


def test_a_signal_during_validation_saves_without_its_result(tmp_path):
    def validate(params):
        signals._handle(signal.SIGINT, None)
        raise AssertionError("validation went on")

    for _ in range(2):  # the second time it is what the run begins with
        with pytest.raises(signals.Interrupted) as caught:
            toy.fit(tmp_path / "parts", 5, 3, validate=validate)
        assert caught.value.signum == signal.SIGINT
        again()
    assert step_folders.find(tmp_path / "parts" / "checkpoints").name == "3"
    with checkpoint.Checkpoints(tmp_path / "parts" / "checkpoints") as saved:
        assert (saved.latest, saved.measured, saved.best) == (3, None, None)
    toy.fit(tmp_path / "parts", 5, 3)
    toy.fit(tmp_path / "whole", 5, 3)
    toy.assert_same(toy.outcome(tmp_path / "parts"), toy.outcome(tmp_path / "whole"))


def test_an_interruption_is_never_the_best(tmp_path):
    """Its loss would be the lowest: validation counts the steps."""
    losses = iter([1.0, 2.0, 3.0, 4.0])
    preempt(tmp_path, 4, 8, 2, validate=lambda _: next(losses), keep_last=1)
    toy.fit(tmp_path, 8, 2, validate=lambda _: next(losses), keep_last=1)
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
        assert (saved.best, saved.latest) == (2, 8)


@pytest.mark.parametrize("poison", [{4: NAN}, {1: NAN}, {6: NAN}, {5: NAN, 7: NAN, 8: NAN}])
def test_a_rollback_skips_the_batches_since_the_last_checkpoint(tmp_path, poison):
    spikes, rollbacks = toy.fit(tmp_path, 9, 3, poison=poison, settings=ROLLBACK)
    actual = toy.outcome(tmp_path)["checkpoints"][9]
    state, batches, step, used = toy.start(), toy.Batches(), 0, []
    kept, expected_rollbacks = (0, state, []), 0
    while step < 9:
        batch = next(batches)
        if batches.position in poison:
            # Not a copy of the loop: positions used since the checkpoint are struck out.
            step, state, used = kept[0], kept[1], list(kept[2])
            expected_rollbacks += 1
            continue
        w, m = (np.asarray(x) for x in (state.params["w"], state.opt_state["m"]))
        state, _ = toy.train_step(type(state)(state.step, {"w": w}, {"m": m}), batch)
        step, used = step + 1, [*used, batches.position]
        if step % 3 == 0:
            host = type(state)(step, *({k: np.array(v) for k, v in x.items()} for x in state[1:]))
            kept = (step, host, list(used))
    assert rollbacks == expected_rollbacks > 0
    assert spikes == 0  # a loss that is not finite is no spike
    assert actual["guard"]["rollbacks"] == rollbacks
    assert actual["data"] == {"position": used[-1]}
    np.testing.assert_array_equal(actual["params"]["w"], state.params["w"])


@pytest.mark.parametrize("at", [1, 4, 5, 8])
@pytest.mark.parametrize("poison", [{5: NAN, 8: NAN}, {2: NAN}])
@pytest.mark.parametrize("end", [kill_at, interrupt_at])
def test_rollbacks_of_a_run_that_was_ended_are_the_same(whole, tmp_path, end, poison, at):
    seen = []

    def alive(step):  # of the steps in the order they come, also those done again
        seen.append(step)
        end(at)(len(seen))

    options = {"poison": poison, "settings": ROLLBACK}
    counts, expected = whole(8, 3, **options)
    with pytest.raises((Killed, signals.Interrupted)):
        toy.fit(tmp_path / "parts", 8, 3, **options, alive=alive)
    again()
    assert toy.fit(tmp_path / "parts", 8, 3, **options) == counts
    toy.assert_same(toy.outcome(tmp_path / "parts"), expected)


def test_a_run_that_a_nan_stopped_goes_on_with_rollback(tmp_path):
    with pytest.raises(
        DivergedError, match=r"^toy: the loss is nan at step 5; .*/checkpoints/3$"
    ) as e:
        toy.fit(tmp_path / "parts", 8, 3, poison={5: NAN})
    assert e.value.rollback_allowed
    assert toy.outcome(tmp_path / "parts")["checkpoints"][3]["data"] == {"position": 3}
    assert toy.fit(tmp_path / "parts", 8, 3, poison={5: NAN}, settings=ROLLBACK) == (0, 1)
    toy.fit(tmp_path / "whole", 8, 3, poison={5: NAN}, settings=ROLLBACK)
    toy.assert_same(toy.outcome(tmp_path / "parts"), toy.outcome(tmp_path / "whole"))


def test_rollbacks_have_an_end(tmp_path):
    poison = dict.fromkeys(range(4, 99), NAN)
    with pytest.raises(DivergedError, match="at step 4, after 2 rollbacks"):
        toy.fit(tmp_path, 8, 3, poison=poison, settings=ROLLBACK._replace(max_rollbacks=2))


def test_nothing_is_saved_of_a_step_that_went_wrong(tmp_path):
    with pytest.raises(DivergedError, match="at step 3; the last good checkpoint is the start"):
        toy.fit(tmp_path / "loss", 8, 3, poison={3: NAN})
    with pytest.raises(DivergedError, match="the validation loss is nan at step 3"):
        toy.fit(tmp_path / "validation", 8, 3, validate=lambda _: NAN)
    assert not list(tmp_path.glob("*/checkpoints/*"))


@pytest.mark.parametrize("at", [0, 24, 25, 30, 31])
def test_a_spike_is_told_from_the_losses_before_also_after_a_kill(whole, tmp_path, at):
    options = {"poison": {31: 5.0, 33: NAN}, "settings": ROLLBACK._replace(spike=3.0)}
    counts, expected = whole(36, 6, **options)
    assert counts == (1, 2)
    if at:
        with pytest.raises(Killed):
            toy.fit(tmp_path / "parts", 36, 6, **options, alive=kill_at(at))
    assert toy.fit(tmp_path / "parts", 36, 6, **options) == counts
    toy.assert_same(toy.outcome(tmp_path / "parts"), expected)


def test_spikes_are_ignored_if_wished(tmp_path):
    assert toy.fit(tmp_path, 36, 6, poison={31: 5.0}) == (0, 0)
