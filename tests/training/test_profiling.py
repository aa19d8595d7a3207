"""Traces of training steps: they are where TensorBoard looks, and change no number."""

import jax
import numpy as np
import pytest

from gqa.runtime.errors import ConfigError
from gqa.training.profiling import parse_window, profiled
from tests.support import toy


def train(window, folder, steps=6):
    """Run the toy step under `profiled`; returns the state after it."""
    state, batches = toy.start(), toy.Batches()
    with profiled(toy.train_step, window, folder) as step:
        for _ in range(steps):
            state, _ = step(state, next(batches))
    return jax.tree.map(np.asarray, state)


def traces(folder):
    return list(folder.rglob("*.xplane.pb"))


def test_a_window_of_steps_leaves_one_trace_and_the_same_numbers(tmp_path):
    traced, plain = train("2:4", tmp_path / "a"), train("", tmp_path / "b")
    assert len(traces(tmp_path / "a")) == 1
    assert not traces(tmp_path)[1:]
    jax.tree.map(np.testing.assert_array_equal, traced, plain)


@pytest.mark.parametrize("window", ["5:90", "7:9"])
def test_a_run_that_ends_first_leaves_what_there_was(tmp_path, window):
    train(window, tmp_path)
    assert len(traces(tmp_path)) == (window == "5:90")
    train("1:2", tmp_path / "again")  # no trace is left open
    assert len(traces(tmp_path / "again")) == 1


def test_other_processes_than_the_primary_record_nothing(tmp_path):
    with profiled(toy.train_step, "1:3", None) as step:
        assert step is toy.train_step


def test_the_last_step_of_a_window_is_outside():
    assert list(parse_window("100:102")) == [100, 101]


@pytest.mark.parametrize("text", ["100", "3:3", "4:3", "0:2", "a:b", "1:2:3", "-1:2", "1:"])
def test_other_windows_are_refused(text):
    with pytest.raises(ConfigError, match=rf"profile='{text}'; use FIRST:LAST"):
        parse_window(text)
