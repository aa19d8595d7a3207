"""Traces of what the devices do, in the form that TensorBoard's profiler opens.

A trace is recorded for a window of training steps (`profiled`), or for whatever runs inside
`jax.profiler.trace` elsewhere. It changes no number that is computed.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from gqa.runtime.errors import ConfigError


def parse_window(text: str) -> range:
    """Return the steps of a window "FIRST:LAST", of which LAST is the first step outside.

    Raises:
        ConfigError: for anything else, and for a window without a step.
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise ConfigError("profile", text, "use FIRST:LAST, such as 100:110 for ten steps from 100")
    return range(int(match[1]), int(match[2]))


@contextlib.contextmanager
def profiled(train_step: Callable, window: str, folder: Path | None) -> Iterator[Callable]:
    """Yield `train_step`, which then leaves a trace of the steps of `window` in `folder`.

    The training step itself, where the window is empty or there is no folder (of several processes
    the primary alone records). A run that ends inside the window leaves the trace until there.

    Args:
        train_step: (state, batch) -> (state, metrics); `state.step` counts the steps before it.
    """
    if not window or folder is None:
        yield train_step
        return
    steps, recording = parse_window(window), False

    def step(state, batch):
        nonlocal recording
        number = int(state.step) + 1
        if number == steps.start and not recording:
            jax.profiler.start_trace(str(folder))
            recording = True

        state, metrics = train_step(state, batch)

        # Steps are dispatched ahead of the devices, so the trace waits for the last of them.
        if recording and number == steps.stop - 1:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            recording = False
        return state, metrics

    try:
        yield step
    finally:
        if recording:
            jax.profiler.stop_trace()
