"""Show the progress of a training run to a person.

A run shows a bar on a terminal, or lines where its output is not a terminal. The same numbers go to
TensorBoard's event files and, if asked for, to Weights & Biases. Nothing here changes the run.
"""

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from gqa.runtime.errors import UserError, reporting_full_disk
from gqa.runtime.regular_files import open_to_append, read_bytes
from gqa.training.tensorboard import Event, EventsWriter, SessionLog, scalar

# Metrics that count the real tokens of a step; "tokens" are those of the targets.
COUNTS = ("input_tokens", "tokens")
MODES = ("off", "offline", "online")  # of Weights & Biases
# The largest curve that is read: a million validations take less.
MAX_CURVE_BYTES = 2**26


class Tracking(NamedTuple):
    """The names of a run in Weights & Biases.

    Args:
        mode: one of MODES.
        project, group, name: where the run appears on the website.
        id: a run with an id that exists already is continued.
        folder: receives a folder `wandb` with the run's files.
    """

    mode: str
    project: str
    group: str
    name: str
    id: str
    folder: Path


def check(mode: str) -> None:
    """Raise a UserError if `mode` needs Weights & Biases and the package is not installed."""
    if mode != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb.mode={mode} needs a package that is missing: pip install wandb")


class Progress:
    """The progress of one training run.

    Args:
        name: the run's name in every line.
        folder: receives TensorBoard's event files. None shows nothing at all: of several processes
            the primary alone shows progress.
        every: steps from one log line to the next.
        step_flops: model FLOPs of a step.
        peak_flops: FLOP/s that the devices can do. The model FLOPs utilisation (MFU) is the rate of
            `step_flops` divided by this number. None, if it is not known, shows no MFU.
        tracking: a run of Weights & Biases that gets the same numbers, or None.
        curve: a file that collects the validation losses for `read_curve`, or None.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        every: int,
        step_flops: float,
        peak_flops: float | None,
        tracking: Tracking | None = None,
        curve: Path | None = None,
    ):
        self.name, self._folder, self._every = name, folder, every
        self._step_flops, self._peak_flops = step_flops, peak_flops
        self._tracking, self._curve = tracking, curve

        # `start` makes these, in the primary process alone.
        self._bar: Any = None
        self._writer: Any = None
        self._run: Any = None
        self._since: float | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._bar is not None:
            self._bar.close()
        if self._run is not None:
            # The website shows a run with another exit code than 0 as failed.
            self._run.finish(exit_code=0 if kind is None else 1)
        if self._writer is not None:
            with self._reporting_full_disk():
                self._writer.close()

    def start(self, first: int, last: int) -> None:
        """Begin, or go on, behind step `first`; `last` is the step at which training will end.

        After a rollback or a kill, TensorBoard drops the events of steps that are done again.
        """
        if self._folder is None:
            return
        self._first, self._last = first, last
        if self._bar is not None:
            self._bar.close()
        with self._reporting_full_disk():
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                # tensorboardX's usual writer has a thread, and an error in that thread, such as a
                # full disk, is lost. This writer raises its errors here.
                self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
                self._run = self._tracking and _track(self._tracking)

            # TensorBoard drops all events from the step of a START on that came before it.
            begin = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=first + 1, session_log=begin))
        self._bar = tqdm.tqdm(
            desc=self.name, initial=first, total=last, disable=not sys.stderr.isatty(), leave=False
        )
        self._begun = time.monotonic()
        self._forget()
        self._since = None

    def _forget(self) -> None:
        """Begin a new interval over which rates are averaged."""
        self._steps, self._seconds = 0, 0.0
        self._counts = dict.fromkeys(COUNTS, 0.0)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keep the time spent inside, on a validation or a checkpoint, out of the rates."""
        yield
        if self._since is not None:
            self._since = time.monotonic()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Count one step; show its metrics if `every` steps have passed or it is the last.

        Rates are averaged over the steps since the last line. The first step after `start` is left
        out, because it waits for the compiler.

        Args:
            metrics: loss, accuracy, learning rate, and the numbers of COUNTS.
        """
        if self._folder is None:
            return

        now = time.monotonic()
        if self._since is not None:
            self._steps, self._seconds = self._steps + 1, self._seconds + now - self._since
            self._counts = {name: n + metrics[name] for name, n in self._counts.items()}
        self._since = now
        self._bar.update()

        # The bar moves with every step. Lines and curves would be too many.
        if step % self._every and step != self._last:
            return
        rates = self._rates()
        self._forget()
        self.scalars(step, {n: v for n, v in metrics.items() if n not in COUNTS} | rates)

        text = f"loss {metrics['loss']:.3f}  accuracy {metrics['accuracy']:.3f}{_text(rates)}"
        # Without a terminal there is no bar, so a line says when the run will end.
        if self._bar.disable:
            left = (now - self._begun) / (step - self._first) * (self._last - step)
            print(f"{self.name}  step {step}/{self._last}  {text}  {left:.0f} s left", flush=True)
        else:
            self._bar.set_postfix_str(text)

    def _rates(self) -> dict[str, float]:
        """Return tokens per second and MFU since the last `_forget`; empty before two steps."""
        if not self._seconds:
            return {}
        inputs, targets = (self._counts[name] / self._seconds for name in COUNTS)
        rates = {"input_tokens_per_second": inputs, "target_tokens_per_second": targets}
        if self._peak_flops is not None:
            rates["mfu"] = self._step_flops * self._steps / self._seconds / self._peak_flops
        return rates

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics to TensorBoard and Weights & Biases.

        A validation loss is also printed, and appended to the curve.
        """
        if self._folder is None:
            return
        with self._reporting_full_disk():
            for name, value in metrics.items():
                now = time.time()
                self._writer.write_event(
                    Event(wall_time=now, step=step, summary=scalar(name, value))
                )
            self._writer.flush()
            if self._curve and "validation_loss" in metrics:
                # The line break comes first: a killed process may have left half a line, which is
                # then a line of its own that `read_curve` passes over.
                with open_to_append(self._curve) as file:
                    file.write(f"\n{json.dumps([step, metrics['validation_loss']])}".encode())
        if self._run is not None:
            self._run.log({"step": step, **metrics})
        if "validation_loss" in metrics:
            self._bar.write(
                f"{self.name}  step {step}/{self._last}  "
                f"validation loss {metrics['validation_loss']:.3f}",
                file=sys.stdout,
            )

    def _reporting_full_disk(self) -> contextlib.AbstractContextManager:
        activity = f"writing events to {self._folder}"
        return reporting_full_disk(activity, "checkpoints are intact")


def read_curve(path: Path) -> list[tuple[int, float]]:
    """Return pairs of a step and its validation loss, in the order of steps.

    A step that was done again has the loss of the last time. Lines that are not such a pair in JSON
    are passed over, because a killed run may have left half a line.

    Raises:
        UserError: naming the path, if it is no regular file or has more than MAX_CURVE_BYTES.
    """
    losses = {}
    for line in read_bytes(path, MAX_CURVE_BYTES).splitlines():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            step, loss = json.loads(line)
            # The exact type, because true is a number to `isinstance`.
            if type(step) is int and math.isfinite(loss):
                losses[step] = float(loss)
    return sorted(losses.items())


def _track(tracking: Tracking) -> Any:
    """Begin a run of Weights & Biases, or continue the one with this id.

    Raises:
        UserError: if Weights & Biases refuses, such as without a login or a network.
    """
    import wandb  # an optional package

    fields = tracking._asdict()
    try:
        run = wandb.init(
            **fields | {"dir": str(fields.pop("folder"))},
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"Weights & Biases: {' '.join(str(error).split())}; use --config.wandb.mode=offline"
        ) from error
    # Weights & Biases' step counter may not go back, but a rolled-back run does. So every record
    # carries its step as a metric, and the plots use that metric as their axis.
    run.define_metric("*", step_metric="step")
    return run


def _text(rates: dict[str, float]) -> str:
    """Return rates for a log line; an empty text if there are none yet."""
    if not rates:
        return ""
    inputs, targets = (rates[f"{side}_tokens_per_second"] for side in ("input", "target"))
    mfu = f"  MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
    return f"  {inputs:,.0f} input + {targets:,.0f} target tokens/s{mfu}"
