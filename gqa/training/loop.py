"""The one training loop: pretraining, uptraining and fine-tuning differ only in its arguments.

This file decides when a run validates, saves, rolls back and stops. The numbers that one step
computes are in `training_step.py`; which loss counts as diverged is decided in `divergence.py`;
`progress.py` shows the run to a person.
"""

import dataclasses
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
from gqa.training.divergence import NEW, BadLoss, Counts, Guard, Settings
from gqa.training.progress import Progress
from gqa.training.training_step import State


@dataclasses.dataclass(frozen=True)
class Computation:
    """The functions that a run calls, and the devices that they run on.

    Args:
        start: makes the state at which training begins. It is not called if there is a checkpoint
            to resume.
        abstract_state: shapes, dtypes and shardings of the state, to restore a checkpoint into.
        train_step: (state, batch) -> (state, metrics), as `training_step.make_step` returns it.
        validate: parameters -> the validation loss in nats per token.
        mesh: the devices over which batches are spread.
    """

    start: Callable[[], State]
    abstract_state: State
    train_step: Callable
    validate: Callable[[dict], float]
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How long a run trains, and what it leaves behind.

    Args:
        steps: the value of `state.step` at which training ends.
        every: steps from one validation and checkpoint to the next.
        config: JSON that is saved beside the parameters, so that a reader can rebuild the network.
        keep_last: how many of the last checkpoints are kept, in addition to the best.
        divergence: what happens at a loss that is not finite or a spike.
    """

    steps: int
    every: int
    config: dict
    keep_last: int = 1
    divergence: Settings = dataclasses.field(default_factory=Settings)

    def is_due(self, step: int) -> bool:
        """Return whether a step ends with a validation and a checkpoint."""
        return step % self.every == 0 or step >= self.steps


def fit(
    computation: Computation, settings: RunSettings, batches: Any, folder: Path, progress: Progress
) -> Counts:
    """Train until `state.step` is `settings.steps`, and leave checkpoints in `folder`.

    The loop validates and saves every `settings.every` steps and at the end. If `folder` has
    checkpoints, training goes on from the last one, bit for bit as if it had never stopped;
    otherwise it begins with `computation.start()`. If there is no step to do, the start is saved.

    Args:
        batches: an iterator with `get_state` and `set_state`, whose next batch is a function of its
            seed and its state alone.
        folder: holds the last `settings.keep_last` checkpoints and the best one.

    Returns:
        The numbers of loss spikes and rollbacks, which are those of an uninterrupted run.

    Raises:
        DivergedError: at a loss from which training may not go on; it names the step.
        DamagedCheckpoint: if the files of the checkpoint to resume differ from those saved.
        Interrupted: after SIGTERM or SIGINT to any of the processes. The step that was running is
            finished and saved before.
    """
    shared = distributed.is_several()
    with Checkpoints(folder, settings.keep_last) as checkpoints, signals.deferred(shared=shared):
        run = _Run(computation, settings, batches, checkpoints, progress)
        run.resume(checkpoints.latest)

        # A loss that diverged restores an earlier state, from which training goes on. Every other
        # error ends the run.
        while True:
            try:
                run.train()
                return run.guard.counts
            except BadLoss as bad_loss:
                run.roll_back(bad_loss)


class _Run:
    """The variables of one call of `fit`: training state, position in the data, guard, signals."""

    def __init__(
        self,
        computation: Computation,
        settings: RunSettings,
        batches: Any,
        checkpoints: Checkpoints,
        progress: Progress,
    ):
        self._computation, self._settings = computation, settings
        self._batches, self._checkpoints, self._progress = batches, checkpoints, progress
        self.guard = Guard(settings.divergence)

        # The largest signal number that any process had received a step ago; 0 if none had.
        self._signal: Any = 0

    def resume(self, step: int | None) -> None:
        """Restore the checkpoint of `step`, or begin with the start if `step` is None."""
        with signals.immediate():
            if step is None:
                self._state = self._computation.start()
                return
            state = self._computation.abstract_state
            items = {"params": state.params, "opt_state": state.opt_state}
            saved = self._checkpoints.restore(step, items | {"data": None, "guard": None})

        # The position in the data and the running mean of the loss belong to the state. Without
        # them a resumed run would read other batches, and see other spikes, than one that never
        # stopped.
        self._batches.set_state(distributed.state_of_this_process(saved["data"]))
        self.guard.set_state(saved["guard"])
        placed_step = jax.device_put(jnp.int32(step), state.step.sharding)
        self._state = State(placed_step, saved["params"], saved["opt_state"])

    def roll_back(self, bad_loss: BadLoss) -> None:
        """Restore the last validated checkpoint, but skip the batches that were read since.

        A checkpoint without a validation loss was saved because of an interruption. It is passed
        over, so that an interrupted run ends with the same parameters as an uninterrupted one.
        """
        good = self._checkpoints.measured
        target = None if good is None else self._checkpoints.path(good)

        # This call raises if the run may not go back, so it comes before anything is deleted.
        self.guard.count_rollback(self._progress.name, bad_loss, target)
        self._checkpoints.discard_after(good)

        # The running mean restarts with the parameters; the counts do not, because they are of the
        # whole run.
        counts = self.guard.counts
        self.guard.set_state(NEW)
        self.resume(good)
        self.guard.counts = counts
        self._batches.set_state(bad_loss.position)

    def train(self) -> None:
        """Train from the current state to the last step, with validations and checkpoints."""
        steps, latest = self._settings.steps, self._checkpoints.latest
        first = int(self._state.step)
        self._progress.start(first, steps)

        # A run without a step to do saves its start. A run that was interrupted during a validation
        # has saved a checkpoint without the loss that belongs to it, which is measured now.
        unmeasured = latest is not None and latest != self._checkpoints.measured
        if (first >= steps and latest is None) or (unmeasured and self._settings.is_due(first)):
            self._save(first, self._batches.get_state())

        waiting = None
        for step in range(first + 1, steps + 1):
            batch = next(self._batches)
            position = self._batches.get_state()
            self._state, metrics = self._computation.train_step(
                self._state, place(batch, self._computation.mesh)
            )

            # Reading a metric waits for its step. So the metrics of the step before are read while
            # this step runs, and the devices never wait for Python.
            if waiting is not None:
                self._record(*waiting)
            waiting = step, metrics, position

            if self._is_stopped() or self._settings.is_due(step):
                self._record(*waiting)
                waiting = None
                self._save(step, position)

    def _is_stopped(self) -> bool:
        """Return whether a signal ends the run; several processes stop at the same step."""
        if distributed.is_several():
            # The maximum was requested a step ago and has arrived by now, so that reading it does
            # not wait for the devices.
            signals.agree(int(self._signal))
            self._signal = distributed.maximum(signals.received())
        return signals.pending()

    def _record(self, step: int, metrics: dict[str, Array], position: dict) -> None:
        """Check and show the metrics of a step; `position` is the data's state after its batch."""
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self.guard.check(step, values["loss"], position)
        self._progress.step(step, values)

    def _save(self, step: int, position: dict) -> None:
        """Validate and save a checkpoint; after a signal, save it without a validation."""
        state = self._state
        items = {
            "params": state.params,
            "opt_state": state.opt_state,
            "config": self._settings.config,
            "data": distributed.gather_states(position),
            "guard": self.guard.get_state(),
        }
        with self._progress.pause():
            # A validation may take minutes, so a signal interrupts it at once.
            try:
                with signals.immediate():
                    loss = self._computation.validate(state.params)
            except signals.Interrupted as signal:
                self._save_interrupted(step, items, signal.signum)

            if not math.isfinite(loss):
                raise BadLoss(step, f"the validation loss is {loss}", position)
            metrics = {"validation_loss": loss}
            self._progress.scalars(step, metrics)

            # The step may have been saved by an interrupted run, without this loss.
            if self._checkpoints.latest == step:
                self._checkpoints.measure(step, metrics)
            else:
                self._checkpoints.save(step, items, metrics)

    def _save_interrupted(self, step: int, items: dict, signum: int) -> NoReturn:
        """Save the step without a validation loss, and raise `Interrupted` with the advice."""
        # The validation was cut short, but the step was not, so its work is kept. The process ends
        # next, so it waits until the files are complete.
        with signals.saving():
            if self._checkpoints.latest != step:
                self._checkpoints.save(step, items)
                self._checkpoints.wait()
        raise signals.Interrupted(
            signum,
            f"{self._progress.name}: interrupted by {Signals(signum).name}; the same command goes "
            f"on from {self._checkpoints.path(step)}",
        )
