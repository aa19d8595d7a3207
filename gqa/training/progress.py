"""What a training run shows: a bar on a terminal, else lines; TensorBoard events; W&B if wished."""

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from gqa.runtime.errors import UserError, reporting_full_disk
from gqa.training.tensorboard import Event, EventsWriter, SessionLog, scalar

COUNTS = ("input_tokens", "tokens")  # per step; `tokens` are those of the targets
MODES = ("off", "offline", "online")


class Tracking(NamedTuple):
    """A run of Weights & Biases: the same `id` goes on with it; files are in `folder`/wandb."""

    mode: str
    project: str
    group: str
    name: str
    id: str
    folder: Path


def check(mode: str) -> None:
    """Raise a UserError unless Weights & Biases can be used so."""
    if mode != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb.mode={mode} needs a package that is missing: pip install wandb")


class Progress:
    """Progress of one training run called `name`, with TensorBoard events in `folder`.

    With `folder` None nothing is shown: another process does that.

    Args:
        every: steps from one log line to the next.
        step_flops: model FLOPs of a step, and
        peak_flops: FLOP/s the devices can do, for the model FLOPs utilisation (MFU) of training;
            None, where that is not known, shows none.
        tracking: a run of Weights & Biases that gets the same numbers, or None.
        curve: a file for the validation losses, to be read by `read_curve`.
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
        # Made by `start`, of which only the primary process does more than return.
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
            self._run.finish(exit_code=0 if kind is None else 1)
        if self._writer is not None:
            with self._reporting_full_disk():
                self._writer.close()

    def start(self, first: int, last: int) -> None:
        """Begin, or go on, at step `first`; events of later steps that were lost are dropped."""
        if self._folder is None:
            return
        self._first, self._last = first, last
        if self._bar is not None:
            self._bar.close()
        with self._reporting_full_disk():
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                # Not tensorboardX's usual writer: an error in its thread is told to nobody.
                self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
                self._run = self._tracking and _track(self._tracking)
            begin = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=first + 1, session_log=begin))
        self._bar = tqdm.tqdm(
            desc=self.name, initial=first, total=last, disable=not sys.stderr.isatty(), leave=False
        )
        self._begun = time.monotonic()
        self._forget()
        self._since = None

    def _forget(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._counts = dict.fromkeys(COUNTS, 0.0)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keep what is done inside, a validation or a checkpoint, out of the rates."""
        yield
        if self._since is not None:
            self._since = time.monotonic()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take in the metrics of one step; show them every `every` steps.

        `metrics` has loss, accuracy and the real tokens of inputs and targets; the rates are of the
        time from step to step, without that of the first one, which waits for the compiler.
        """
        if self._folder is None:
            return
        now = time.monotonic()
        if self._since is not None:
            self._steps, self._seconds = self._steps + 1, self._seconds + now - self._since
            self._counts = {name: n + metrics[name] for name, n in self._counts.items()}
        self._since = now
        self._bar.update()
        if step % self._every and step != self._last:
            return
        rates = self._rates()
        self._forget()
        self.scalars(step, {n: v for n, v in metrics.items() if n not in COUNTS} | rates)
        text = f"loss {metrics['loss']:.3f}  accuracy {metrics['accuracy']:.3f}{_text(rates)}"
        if self._bar.disable:
            left = (now - self._begun) / (step - self._first) * (self._last - step)
            print(f"{self.name}  step {step}/{self._last}  {text}  {left:.0f} s left", flush=True)
        else:
            self._bar.set_postfix_str(text)

    def _rates(self) -> dict[str, float]:
        if not self._seconds:
            return {}
        inputs, targets = (self._counts[name] / self._seconds for name in COUNTS)
        rates = {"input_tokens_per_second": inputs, "target_tokens_per_second": targets}
        if self._peak_flops is not None:
            rates["mfu"] = self._step_flops * self._steps / self._seconds / self._peak_flops
        return rates

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics where they are kept, and the validation loss to the terminal too."""
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
                with open(self._curve, "a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps([step, metrics["validation_loss"]]))
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
    """Steps and their validation losses, in order; of a step that was done again, the last.

    A run that was killed may have left half a line, of a step that was done again.
    """
    losses = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, TypeError):
            step, loss = json.loads(line)
            losses[step] = loss
    return sorted(losses.items())


def _track(tracking: Tracking) -> Any:
    """Begin or go on with a run of Weights & Biases."""
    import wandb  # optional

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
    # An axis of our own: W&B's may not go back, which a run that goes on or is rolled back does.
    run.define_metric("*", step_metric="step")
    return run


def _text(rates: dict[str, float]) -> str:
    if not rates:
        return ""
    inputs, targets = (rates[f"{side}_tokens_per_second"] for side in ("input", "target"))
    mfu = f"  MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
    return f"  {inputs:,.0f} input + {targets:,.0f} target tokens/s{mfu}"
