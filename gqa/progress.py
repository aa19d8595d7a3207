"""What a training run shows: a bar on a terminal, else lines; and TensorBoard event files."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tensorboardX
import tqdm

COUNTS = ("input_tokens", "tokens")  # per step; `tokens` are those of the targets


class Progress:
    """Progress of one training run called `name`, with TensorBoard events in `folder`.

    Args:
        every: steps from one log line to the next.
        step_flops: model FLOPs of a step, and
        peak_flops: FLOP/s the devices can do, for the model FLOPs utilisation (MFU) of training;
            None, where that is not known, shows none.
    """

    def __init__(
        self, name: str, folder: Path, every: int, step_flops: float, peak_flops: float | None
    ):
        self._name, self._folder, self._every = name, folder, every
        self._step_flops, self._peak_flops = step_flops, peak_flops
        self._bar = self._writer = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()
            self._writer.close()

    def start(self, first: int, last: int) -> None:
        """Begin, or go on, at step `first`; events of later steps that were lost are dropped."""
        self._first, self._last = first, last
        self._writer = tensorboardX.SummaryWriter(str(self._folder), purge_step=first + 1)
        self._bar = tqdm.tqdm(
            desc=self._name, initial=first, total=last, disable=not sys.stderr.isatty(), leave=False
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
            print(f"{self._name}  step {step}/{self._last}  {text}  {left:.0f} s left", flush=True)
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
        """Write metrics to TensorBoard, and the validation loss to the terminal too."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if "validation_loss" in metrics:
            self._bar.write(
                f"{self._name}  step {step}/{self._last}  "
                f"validation loss {metrics['validation_loss']:.3f}",
                file=sys.stdout,
            )


def _text(rates: dict[str, float]) -> str:
    if not rates:
        return ""
    inputs, targets = (rates[f"{side}_tokens_per_second"] for side in ("input", "target"))
    mfu = f"  MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
    return f"  {inputs:,.0f} input + {targets:,.0f} target tokens/s{mfu}"
