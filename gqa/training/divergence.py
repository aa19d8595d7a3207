"""Losses that are not finite, or far above those before: what they are, and what is done then."""

import math
from typing import NamedTuple

from gqa.runtime.errors import UserError

NEW = {"count": 0, "mean": 0.0, "rollbacks": 0}
WINDOW = 100  # steps that the running mean of the loss is about
LEAST = 20  # steps before it says anything


class Settings(NamedTuple):
    """The config's section `train`."""

    on_divergence: str = "stop"  # or rollback: to the last checkpoint, without the batches since
    max_rollbacks: int = 3
    spike: float = 3.0  # nats per token above the running mean; 0: never


class Diverged(UserError):
    """Training stopped at a loss that cannot be gone on from; `remedy` is the flag that can."""

    remedy = "--config.train.on_divergence=rollback"


class Mishap(Exception):
    """A step whose loss is not finite or a spike, and the place in the data behind its batch."""

    def __init__(self, step: int, what: str, position: dict):
        super().__init__(step, what, position)
        self.step, self.what, self.position = step, what, position


class Guard:
    """The running mean of the loss, and how often training was rolled back."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.set_state(NEW)

    def get_state(self) -> dict:
        """What a resumed run needs to decide as this one would; JSON."""
        return {"count": self._count, "mean": self._mean, "rollbacks": self.rollbacks}

    def set_state(self, state: dict) -> None:
        """Go on from what `get_state` gave."""
        self._count, self._mean = state["count"], state["mean"]
        self.rollbacks = state["rollbacks"]

    def look(self, step: int, loss: float, position: dict) -> None:
        """Take in the loss of a step.

        Raises:
            Mishap: when it is not finite or a spike; the mean stays as it was.
        """
        if not math.isfinite(loss):
            raise Mishap(step, f"the loss is {loss}", position)
        above = loss - self._mean
        if 0 < self._settings.spike < above and self._count >= LEAST:
            what = f"the loss is {loss:.3f}, {above:.3f} above its mean of {self._mean:.3f}"
            raise Mishap(step, what, position)
        self._count += 1
        self._mean += above / min(self._count, WINDOW)

    def roll_back(self, name: str, mishap: Mishap, last_good: str) -> None:
        """Count a rollback, for the run `name`, to the checkpoint `last_good`.

        Raises:
            Diverged: when the settings do not allow it, or not once more.
        """
        what = f"{name}: {mishap.what} at step {mishap.step}"
        if self._settings.on_divergence != "rollback":
            raise Diverged(
                f"{what}; the last good checkpoint is {last_good}: {Diverged.remedy} goes on from "
                "it, skipping the batches since"
            )
        if self.rollbacks >= self._settings.max_rollbacks:
            raise Diverged(
                f"{what}, after {self.rollbacks} rollbacks; the last good checkpoint is "
                f"{last_good}: lower the learning rate, or allow more by "
                "--config.train.max_rollbacks=N"
            )
        self.rollbacks += 1
        print(f"{what}; rollback {self.rollbacks} to {last_good}, without the batches since")
