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
    """Return the steps of a window "FIRST:LAST". LAST is the first step behind the window.

    Example: "100:110" is steps 100 to 109, counted from 1.

    Raises:
        ConfigError: for a text of another form, and for a window without a step.
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise ConfigError("profile", text, "use FIRST:LAST, such as 100:110 for ten steps from 100")
    return range(int(match[1]), int(match[2]))


@contextlib.contextmanager
def profiled(train_step: Callable, window: str, folder: Path | None) -> Iterator[Callable]:
    """Yield a training step that also records a trace of the steps of `window` in `folder`.

    A run that ends inside the window leaves a trace of the steps it has done.

    Args:
        train_step: (state, batch) -> (state, metrics); `state.step` counts the steps done. It is
            yielded unchanged if there is nothing to record.
        window: as in `parse_window`; an empty text records nothing.
        folder: None in all processes but the primary, which alone records.
    """
    if not window or folder is None:
        yield train_step
        return
    steps, recording = parse_window(window), False

    def step(state, batch):
        nonlocal recording

        # `state.step` counts the steps that are done, so this step has the next number.
        number = int(state.step) + 1
        if number == steps.start and not recording:
            jax.profiler.start_trace(str(folder))
            recording = True

        state, metrics = train_step(state, batch)

        # JAX returns before the devices have run the step. Wait for the last step of the window, so
        # that the trace holds all of it.
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
