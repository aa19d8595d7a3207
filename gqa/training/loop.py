"""The one training loop: pretraining, uptraining and fine-tuning differ only in its arguments."""

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa.checkpoints.checkpoint import Checkpoints
from gqa.model.config import Config
from gqa.model.transformer import Transformer, init_params
from gqa.runtime import distributed, signals
from gqa.runtime.sharding import WHOLE, Layout, param_shardings, place
from gqa.training.divergence import NEW, BadLoss, Guard, Settings
from gqa.training.loss import cross_entropy, kl_divergence
from gqa.training.optimizer import adafactor
from gqa.training.progress import Progress


class State(NamedTuple):
    """All that a step changes; uptraining goes on from its parent's `step`."""

    step: Array
    params: dict
    opt_state: Any


Loss = Callable[..., dict[str, Array]]


class Teacher(NamedTuple):
    """A network to stay near to: `beta` times KL(teacher || network) is added to the loss."""

    config: Config
    beta: float


def init(config: Config, seed: int) -> State:
    """A fresh state at step 0."""
    params = init_params(config, seed)
    return State(jnp.int32(0), params, adafactor().init(params))


def abstract(
    config: Config,
    mesh: Mesh,
    layout: Layout = WHOLE,
    change: Callable[[State], State] = lambda x: x,
) -> State:
    """Shapes and placement of a state, for restoring one without making one first.

    `change` is what was done to a state of `config` before training.
    """
    shapes = jax.eval_shape(change, _shapes(config))
    shardings = State(
        NamedSharding(mesh, PartitionSpec()),
        param_shardings(shapes.params, mesh, layout),
        param_shardings(shapes.opt_state, mesh, layout, shapes.params),
    )
    return jax.tree.map(lambda x, at: x.update(sharding=at), shapes, shardings)


@functools.lru_cache(maxsize=4)
def _shapes(config: Config) -> State:
    return jax.eval_shape(lambda: init(config, 0))


def shardings(state: State) -> State:
    """Of each array of a state, or of what `abstract` gives."""
    return jax.tree.map(lambda x: x.sharding, state)


def make_loss(config: Config, z_loss: float, teacher: Teacher | None = None) -> Loss:
    """`cross_entropy` of the network with dropout, as a function of (params, batch, key).

    With a teacher, the function takes its parameters after the key, and "loss" has its term.
    """
    network = Transformer(config)

    def loss(params: dict, batch: dict, key: Array, given: dict | None = None) -> dict[str, Array]:
        logits = network.apply({"params": params}, batch, train=True, rngs={"dropout": key})
        sums = cross_entropy(logits, batch["targets"], z_loss)
        if teacher is None:
            return sums
        target = Transformer(teacher.config).apply({"params": given}, batch)
        apart = kl_divergence(target, logits, batch["targets"])
        return sums | {"loss": sums["loss"] + teacher.beta * apart}

    return loss


def make_step(
    loss: Loss,
    learning_rate: Callable,
    seed: int,
    num_microbatches: int = 1,
    *,
    placed: State | None = None,
    view: Callable[[dict, Array], dict] | None = None,
):
    """The jitted step (state, batch, ...) -> (state, metrics); the state passed in is consumed.

    What follows the batch is given to `loss`: the parameters of a teacher.

    Args:
        placed: the shardings of the state, which stays where it is; None leaves it to JAX.
        view: makes the parameters that `loss` is of from those that are trained, and the step.
    """
    optimizer = adafactor()

    def train_step(state: State, batch: dict, *given: dict) -> tuple[State, dict[str, Array]]:
        def viewed(params: dict, batch: dict, key: Array) -> dict[str, Array]:
            return loss(params if view is None else view(params, state.step), batch, key, *given)

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        at = placed and placed.params
        grads, sums = accumulate(viewed, state.params, batch, key, num_microbatches, at)
        # Real tokens of the whole batch: neither padding nor how it was cut up changes the step.
        tokens = jnp.maximum(sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        rate = learning_rate(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics = {
            "loss": sums["nats"] / tokens,
            "accuracy": sums["correct"] / tokens,
            "learning_rate": rate,
            "input_tokens": jnp.sum(batch["inputs"] > 0),
            "tokens": sums["tokens"],
        }
        return State(state.step + 1, params, opt_state), metrics

    out = (placed, NamedSharding(placed.step.mesh, PartitionSpec())) if placed else None
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)


def accumulate(
    loss: Loss, params: dict, batch: dict, key: Array, num_microbatches: int, at: Any = None
):
    """Gradients and sums of `loss` over a batch cut into microbatches, each with its own key.

    `at` are the shardings of the parameters, and of the gradients from the first on.
    """

    def value(params, micro, key):
        sums = loss(params, micro, key)
        return sums["loss"], sums

    def add(total, item):
        index, micro = item
        grads, sums = jax.grad(value, has_aux=True)(params, micro, jax.random.fold_in(key, index))
        if at is not None:
            grads = jax.lax.with_sharding_constraint(grads, at)
        return jax.tree.map(jnp.add, total, (grads, sums)), None

    # Every k-th row, not blocks of rows, so that each microbatch is spread over all devices.
    split = jax.tree.map(
        lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )
    shapes = jax.eval_shape(value, params, batch, key)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, shapes))
    items = (jnp.arange(num_microbatches), split)
    total, _ = jax.lax.scan(add, zeros, items, unroll=num_microbatches == 1)
    return total


@functools.lru_cache(maxsize=4)
def make_validation(config: Config, mesh: Mesh) -> Callable[[dict, Iterable], float]:
    """A function (params, batches) -> nats per real token, without dropout."""

    def nats(params: dict, batch: dict) -> Array:
        logits = Transformer(config).apply({"params": params}, batch)
        return cross_entropy(logits, batch["targets"])["nats"]

    return _per_token(nats, mesh)


@functools.lru_cache(maxsize=4)
def make_divergence(teacher: Config, config: Config, mesh: Mesh) -> Callable[..., float]:
    """A function (teacher's params, params, batches) -> KL(teacher || network), nats per token."""

    def nats(given: dict, params: dict, batch: dict) -> Array:
        logits = [
            Transformer(network).apply({"params": tree}, batch)
            for network, tree in ((teacher, given), (config, params))
        ]
        return kl_divergence(*logits, batch["targets"])

    return _per_token(nats, mesh)


def _per_token(nats: Callable[..., Array], mesh: Mesh) -> Callable[..., float]:
    """A function (*trees, batches) -> the sum of nats(*trees, batch) over that of real tokens."""

    @jax.jit
    def sums(batch: dict, *trees: dict) -> tuple[Array, Array]:
        return nats(*trees, batch), jnp.sum(batch["targets"] > 0)

    def mean(*given) -> float:
        *trees, batches = given
        results = [sums(place(batch, mesh), *trees) for batch, _ in batches]
        total, tokens = (sum(float(r[i]) for r in results) for i in range(2))
        return total / max(tokens, 1.0)

    return mean


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
        self._signal = 0  # what all processes were asked a step ago

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
