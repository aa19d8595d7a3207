"""The one training loop: pretraining, uptraining and fine-tuning differ only in its arguments.

This file knows when to validate, to save, to roll back and to stop. What one step computes is
`gqa.training.training_step`; which loss counts as diverged is `gqa.training.divergence`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from gqa.checkpoints.checkpoint import Checkpoints
from gqa.runtime import distributed, signals
from gqa.runtime.sharding import place
from gqa.training.divergence import NEW, BadLoss, Guard, Settings
from gqa.training.progress import Progress
from gqa.training.training_step import State


def fit(
    start: Callable[[], State],
    abstract_state: State,
    train_step: Callable,
    batches: Any,
    *,
    steps: int,
    every: int,
    validate: Callable[[dict], float],
    config: dict,
    folder: Path,
    mesh: Mesh,
    progress: Progress,
    mishaps: Settings,
    keep_last: int = 1,
) -> int:
    """Train until `state.step` is `steps`; the result is the last and the best checkpoint.

    Every `every` steps, and at the end, the validation loss is taken and a checkpoint saved. If
    `folder` has checkpoints the run goes on from the last one, bit for bit as if never stopped;
    otherwise from `start()`. With no step to do, the start itself is saved.

    Args:
        batches: iterator with `get_state` and `set_state`, a function of its seed and state alone.
        config: JSON saved beside the parameters; what a reader needs to rebuild the network.
        mishaps: what to do at a loss that is not finite or a spike.

    Returns:
        How often training was rolled back.

    Raises:
        DivergedError: at a loss that training may not go on from, naming the step.
        DamagedCheckpoint: when the checkpoint to go on from is not what was saved.
        Interrupted: after SIGTERM or SIGINT, to any one of several processes; the step under way is
            finished and saved before.
    """
    shared = distributed.is_several()
    with Checkpoints(folder, keep_last) as checkpoints, signals.deferred(shared=shared):
        run = _Run(checkpoints, start, abstract_state, batches, validate, config, progress, mishaps)
        run.resume(checkpoints.latest)
        while True:
            try:
                run.train(train_step, mesh, steps, every)
                return run.guard.rollbacks
            except BadLoss as bad_loss:
                run.roll_back(bad_loss)


class _Run:
    """What `fit` keeps from step to step: the state, the place in the data and the guard."""

    def __init__(
        self, checkpoints, start, abstract_state, batches, validate, config, progress, mishaps
    ):
        self._checkpoints, self._start, self._abstract = checkpoints, start, abstract_state
        self._batches, self._validate, self._config = batches, validate, config
        self._progress = progress
        self.guard = Guard(mishaps)
        self._signal: Any = 0  # what all processes were asked a step ago

    def resume(self, step: int | None) -> None:
        """Take up the checkpoint of a step, or the start if None."""
        with signals.immediate():
            if step is None:
                self._state = self._start()
                return
            state = self._abstract
            items = {"params": state.params, "opt_state": state.opt_state}
            saved = self._checkpoints.restore(step, items | {"data": None, "guard": None})
        self._batches.set_state(distributed.own(saved["data"]))
        self.guard.set_state(saved["guard"])
        placed = jax.device_put(jnp.int32(step), state.step.sharding)
        self._state = State(placed, saved["params"], saved["opt_state"])

    def roll_back(self, bad_loss: BadLoss) -> None:
        """Go back to the last validated checkpoint, but not to the batches since.

        A run that was interrupted in between has to end like one that was not, so what the
        interruption saved is passed over.
        """
        good = self._checkpoints.measured
        target = None if good is None else self._checkpoints.path(good)
        self.guard.count_rollback(self._progress.name, bad_loss, target)
        self._checkpoints.discard_after(good)
        rollbacks = self.guard.rollbacks
        self.guard.set_state(NEW)
        self.resume(good)
        self.guard.rollbacks = rollbacks
        self._batches.set_state(bad_loss.position)

    def train(self, train_step: Callable, mesh: Mesh, steps: int, every: int) -> None:
        """Steps, validations and checkpoints from the state to step `steps`."""
        first, latest = int(self._state.step), self._checkpoints.latest
        self._progress.start(first, steps)
        unmeasured = latest is not None and latest != self._checkpoints.measured
        if (first >= steps and latest is None) or (unmeasured and _is_due(first, steps, every)):
            self._save(first, self._batches.get_state())
        waiting = None
        for step in range(first + 1, steps + 1):
            batch = next(self._batches)
            position = self._batches.get_state()
            self._state, metrics = train_step(self._state, place(batch, mesh))
            # The step before is read while this one runs, so the devices never wait for Python.
            if waiting is not None:
                self._record(*waiting)
            waiting = step, metrics, position
            if self._is_stopped() or _is_due(step, steps, every):
                self._record(*waiting)
                waiting = None
                self._save(step, position)

    def _is_stopped(self) -> bool:
        """Whether a signal ends the run; several processes learn of one at the same step."""
        if distributed.is_several():
            signals.agree(int(self._signal))  # asked a step ago, so that nothing waits for it
            self._signal = distributed.maximum(signals.received())
        return signals.pending()

    def _record(self, step: int, metrics: dict[str, Array], position: dict) -> None:
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self.guard.check(step, values["loss"], position)
        self._progress.step(step, values)

    def _save(self, step: int, position: dict) -> None:
        """Validate and save; after a signal only the latter."""
        state = self._state
        items = {"params": state.params, "opt_state": state.opt_state, "config": self._config}
        items |= {"data": distributed.joined(position), "guard": self.guard.get_state()}
        with self._progress.pause():
            try:
                with signals.immediate():
                    loss = self._validate(state.params)
            except signals.Interrupted as signal:
                self._save_interrupted(step, items, signal.signum)
            if not math.isfinite(loss):
                raise BadLoss(step, f"the validation loss is {loss}", position)
            metrics = {"validation_loss": loss}
            self._progress.scalars(step, metrics)
            if self._checkpoints.latest == step:
                self._checkpoints.measure(step, metrics)
            else:
                self._checkpoints.save(step, items, metrics)

    def _save_interrupted(self, step: int, items: dict, signum: int) -> NoReturn:
        with signals.saving():
            if self._checkpoints.latest != step:
                self._checkpoints.save(step, items)
                self._checkpoints.wait()
        raise signals.Interrupted(
            signum,
            f"{self._progress.name}: interrupted by {Signals(signum).name}; the same command goes "
            f"on from {self._checkpoints.path(step)}",
        )


def _is_due(step: int, steps: int, every: int) -> bool:
    """Whether a step ends with a validation and a checkpoint."""
    return step % every == 0 or step >= steps
