"""Decide which loss has diverged, and how often training may go back because of one.

A loss that is not finite, or far above its running mean, is a `BadLoss`. The training loop
(`gqa.training.loop`) catches it and asks the `Guard` whether it may roll back to the last good
checkpoint. This file decides; it moves neither parameters nor data.
"""

import math
from pathlib import Path
from typing import NamedTuple

from gqa.runtime.errors import DivergedError

# The state of a guard that has seen no loss.
NEW = {"count": 0, "mean": 0.0, "spikes": 0, "rollbacks": 0}
WINDOW = 100  # steps over which the running mean forgets
LEAST = 20  # losses that the mean needs before it can call another one a spike


class Settings(NamedTuple):
    """The rules by which a run reacts to a diverging loss.

    Args:
        on_divergence: "stop" ends the run. "rollback" goes on from the last checkpoint with a
            validation loss, and skips the batches since.
        max_rollbacks: how many rollbacks one run may do.
        spike: a loss more than this many nats per token above the running mean has diverged; 0
            turns the check off.
    """

    on_divergence: str = "stop"
    max_rollbacks: int = 3
    spike: float = 3.0


class Counts(NamedTuple):
    """How often training was unstable.

    Args:
        spikes: finite losses more than `Settings.spike` above the running mean.
        rollbacks: returns to an earlier checkpoint, because of a spike or a loss that is not
            finite.
    """

    spikes: int
    rollbacks: int


class BadLoss(Exception):
    """A step's loss is not finite or a spike.

    Args:
        step: the step, counted from 1.
        problem: the loss and what is wrong with it.
        position: the data iterator's state after this step's batch.
    """

    def __init__(self, step: int, problem: str, position: dict):
        super().__init__(step, problem, position)
        self.step, self.problem, self.position = step, problem, position


class Guard:
    """Watches the losses of one run, and counts its spikes and rollbacks.

    Example with the defaults: the mean of the last 100 losses or so is 2.0. A loss of 5.1 is a
    spike, because it is more than 3.0 nats above the mean.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self.set_state(NEW)

    def get_state(self) -> dict:
        """Return the running mean and the counts as JSON, so that a resumed run decides alike."""
        return {"count": self._count, "mean": self._mean, **self.counts._asdict()}

    def set_state(self, state: dict) -> None:
        """Go on from a state that `get_state` returned."""
        # Checkpoints of an earlier version counted no spikes.
        state = NEW | state
        self._count, self._mean = state["count"], state["mean"]
        self.counts = Counts(state["spikes"], state["rollbacks"])

    def check(self, step: int, loss: float, position: dict) -> None:
        """Add the loss of a step, in nats per token, to the running mean.

        Raises:
            BadLoss: if the loss is not finite or a spike, which is counted; the mean then stays as
                it was.
        """
        if not math.isfinite(loss):
            raise BadLoss(step, f"the loss is {loss}", position)

        above = loss - self._mean
        if 0 < self._settings.spike < above and self._count >= LEAST:
            self.counts = self.counts._replace(spikes=self.counts.spikes + 1)
            problem = f"the loss is {loss:.3f}, {above:.3f} above its mean of {self._mean:.3f}"
            raise BadLoss(step, problem, position)

        # The plain mean of the first WINDOW losses. From then on it is an exponential mean, in
        # which the newest loss has the weight 1 / WINDOW.
        self._count += 1
        self._mean += above / min(self._count, WINDOW)

    def count_rollback(self, name: str, bad_loss: BadLoss, last_good: Path | None) -> None:
        """Count a rollback of the run `name` to `last_good`, or to the start if that is None.

        Raises:
            DivergedError: if the settings do not allow a rollback, or no further one.
        """
        problem = f"{name}: {bad_loss.problem} at step {bad_loss.step}"
        target = "the start" if last_good is None else f"checkpoint {last_good}"

        if self._settings.on_divergence != "rollback":
            raise DivergedError(
                f"{problem}; the last good checkpoint is {target}",
                bad_loss.step,
                last_good,
                rollback_allowed=True,
            )

        rollbacks = self.counts.rollbacks
        if rollbacks >= self._settings.max_rollbacks:
            raise DivergedError(
                f"{problem}, after {rollbacks} rollbacks; the last good checkpoint is "
                f"{target}: lower the learning rate, or raise max_rollbacks",
                bad_loss.step,
                last_good,
                rollback_allowed=False,
            )

        self.counts = self.counts._replace(rollbacks=rollbacks + 1)
        print(f"{problem}; rollback {rollbacks + 1} to {target}, without the batches since")
