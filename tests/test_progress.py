"""Rates are of training alone: neither compiling nor validating nor saving counts."""

import sys
from types import SimpleNamespace

import pytest

from gqa import progress
from gqa.progress import Progress

METRICS = {"loss": 2.0, "accuracy": 0.25, "learning_rate": 0.1, "input_tokens": 60, "tokens": 12}


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Terminal:
    """Standard error that takes itself for a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def scalars(monkeypatch) -> dict:
    """What TensorBoard gets, {(name, step): value}."""
    events = {}

    def add_scalar(name, value, step):
        events[name, step] = value

    writer = SimpleNamespace(add_scalar=add_scalar, close=lambda: None)
    monkeypatch.setattr(progress.tensorboardX, "SummaryWriter", lambda *_, **__: writer)
    return events


def run(clock, folder, steps, every, first=0, peak=100.0):
    """Steps of 2 s, and of 2 s more after each line; the first of 50 s; validations of 30 s."""
    with Progress("test", folder, every, 50.0, peak) as bar:
        bar.start(first, first + steps)
        seconds = 2
        for step in range(first + 1, first + steps + 1):
            clock.now += 50 if step == first + 1 else seconds
            bar.step(step, METRICS)
            if step % every == 0:
                seconds += 2
                with bar.pause():
                    clock.now += 30


@pytest.mark.parametrize(("every", "first"), [(3, 0), (1, 0), (3, 5)])
def test_rates_are_of_training_since_the_last_line(clock, scalars, tmp_path, every, first):
    run(clock, tmp_path, 7, every, first)
    last = first + 7
    lines = [step for name, step in scalars if name == "loss"]
    assert lines == [s for s in range(first + 1, last + 1) if s % every == 0 or s == last]
    for line, step in enumerate(lines):
        if step == first + 1:  # of a step that was compiled there is no rate
            assert ("mfu", step) not in scalars
            continue
        seconds = 2 * (line + 1)
        assert scalars["input_tokens_per_second", step] == pytest.approx(60 / seconds)
        assert scalars["target_tokens_per_second", step] == pytest.approx(12 / seconds)
        assert scalars["mfu", step] == pytest.approx(50 / seconds / 100)


def test_a_line_says_all(clock, scalars, tmp_path, capsys):
    run(clock, tmp_path, 4, every=2)
    assert capsys.readouterr().out.splitlines() == [
        "test  step 2/4  loss 2.000  accuracy 0.250  30 input + 6 target tokens/s  MFU 25.0%  "
        "52 s left",
        "test  step 4/4  loss 2.000  accuracy 0.250  15 input + 3 target tokens/s  MFU 12.5%  "
        "0 s left",
    ]


def test_the_bar_says_all(clock, scalars, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(clock, tmp_path, 4, every=2)
    expected = "loss 2.000  accuracy 0.250  30 input + 6 target tokens/s  MFU 25.0%"
    assert expected.replace("  ", "") in sys.stderr.text.replace("  ", "")


def test_without_a_known_peak_there_is_no_mfu(clock, scalars, tmp_path, capsys):
    run(clock, tmp_path, 4, every=2, peak=None)
    assert "3 target tokens/s  0 s left" in capsys.readouterr().out
    assert not [name for name, _ in scalars if name == "mfu"]
    assert scalars["target_tokens_per_second", 4] == pytest.approx(3)
