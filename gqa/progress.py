"""What a training run shows: a bar on a terminal, else lines; and TensorBoard event files."""

import sys
import time
from pathlib import Path

import tensorboardX
import tqdm


class Progress:
    """Progress of one training run called `name`, with TensorBoard events in `folder`."""

    def __init__(self, name: str, folder: Path, every: int):
        self._name, self._folder, self._every = name, folder, every
        self._bar = self._writer = None
        self._tokens, self._since = 0.0, time.monotonic()

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
        self._begun = self._since = time.monotonic()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take in the metrics of one step; show them every `every` steps."""
        self._tokens += metrics["tokens"]
        self._bar.update()
        if step % self._every and step != self._last:
            return
        now = time.monotonic()
        rate = self._tokens / max(now - self._since, 1e-9)
        left = (now - self._begun) / (step - self._first) * (self._last - step)
        self._tokens, self._since = 0.0, now
        self.scalars(step, {n: v for n, v in metrics.items() if n != "tokens"})
        self.scalars(step, {"target_tokens_per_second": rate})
        text = f"loss {metrics['loss']:.3f}  accuracy {metrics['accuracy']:.3f}  "
        text += f"{rate:,.0f} target tokens/s"
        if self._bar.disable:
            print(f"{self._name}  step {step}/{self._last}  {text}  {left:.0f} s left", flush=True)
        else:
            self._bar.set_postfix_str(text)

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
