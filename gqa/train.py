"""The one training loop: pretraining, uptraining and fine-tuning differ only in its arguments."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa.checkpoint import Checkpoints
from gqa.errors import UserError
from gqa.loss import cross_entropy
from gqa.model import Config, Transformer, init_params
from gqa.optim import adafactor
from gqa.progress import Progress
from gqa.sharding import place


class State(NamedTuple):
    """All that a step changes; uptraining goes on from its parent's `step`."""

    step: Array
    params: dict
    opt_state: Any


Loss = Callable[[dict, dict, Array], dict[str, Array]]


def init(config: Config, seed: int) -> State:
    """A fresh state at step 0."""
    params = init_params(config, seed)
    return State(jnp.int32(0), params, adafactor().init(params))


def abstract(config: Config, mesh: Mesh) -> State:
    """Shapes and placement of a state, for restoring one without making one first."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(placed, jax.eval_shape(lambda: init(config, 0)))


def make_loss(config: Config, z_loss: float) -> Loss:
    """`cross_entropy` of the network with dropout, as a function of (params, batch, key)."""
    network = Transformer(config)

    def loss(params: dict, batch: dict, key: Array) -> dict[str, Array]:
        logits = network.apply({"params": params}, batch, train=True, rngs={"dropout": key})
        return cross_entropy(logits, batch["targets"], z_loss)

    return loss


def make_step(loss: Loss, learning_rate: Callable, seed: int, num_microbatches: int = 1):
    """The jitted step (state, batch) -> (state, metrics); the state passed in is consumed."""
    optimizer = adafactor()

    def train_step(state: State, batch: dict) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, sums = accumulate(loss, state.params, batch, key, num_microbatches)
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

    return jax.jit(train_step, donate_argnums=0)


def accumulate(loss: Loss, params: dict, batch: dict, key: Array, num_microbatches: int):
    """Gradients and sums of `loss` over a batch cut into microbatches, each with its own key."""

    def value(params, micro, key):
        sums = loss(params, micro, key)
        return sums["loss"], sums

    def add(total, item):
        index, micro = item
        grads, sums = jax.grad(value, has_aux=True)(params, micro, jax.random.fold_in(key, index))
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


def make_validation(config: Config, mesh: Mesh) -> Callable[[dict, Iterable], float]:
    """A function (params, batches) -> nats per real token, without dropout."""
    network = Transformer(config)

    @jax.jit
    def sums(params, batch):
        return cross_entropy(network.apply({"params": params}, batch), batch["targets"])

    def validation_loss(params: dict, batches: Iterable[tuple[dict, int]]) -> float:
        results = [sums(params, place(batch, mesh)) for batch, _ in batches]
        nats, tokens = (sum(float(r[name]) for r in results) for name in ("nats", "tokens"))
        return nats / max(tokens, 1.0)

    return validation_loss


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
    keep_last: int = 1,
) -> None:
    """Train until `state.step` is `steps`; the result is the last and the best checkpoint.

    Every `every` steps, and at the end, the validation loss is taken and a checkpoint saved. If
    `folder` has checkpoints the run goes on from the last one, bit for bit as if never stopped;
    otherwise from `start()`. With no step to do, the start itself is saved.

    Args:
        batches: iterator with `get_state` and `set_state`, a function of its seed and state alone.
        config: JSON saved beside the parameters; what a reader needs to rebuild the network.

    Raises:
        UserError: when a loss is not finite, naming the step.
    """
    with Checkpoints(folder, keep_last) as checkpoints:
        if checkpoints.latest is None:
            state = start()
        else:
            state = _restore(checkpoints, abstract_state, batches)

        def save(step: int) -> None:
            with progress.pause():
                metrics = {"validation_loss": validate(state.params)}
                progress.scalars(step, metrics)
                items = {"params": state.params, "opt_state": state.opt_state, "config": config}
                checkpoints.save(step, items | {"data": batches.get_state()}, metrics)

        first = int(state.step)
        progress.start(first, steps)
        if first >= steps and checkpoints.latest is None:
            save(first)
        waiting = None
        for step in range(first + 1, steps + 1):
            state, metrics = train_step(state, place(next(batches), mesh))
            # The step before is read while this one runs, so the devices never wait for Python.
            if waiting is not None:
                _record(progress, folder, *waiting)
            waiting = step, metrics
            if step % every == 0 or step == steps:
                _record(progress, folder, *waiting)
                waiting = None
                save(step)


def _restore(checkpoints: Checkpoints, abstract_state: State, batches: Any) -> State:
    step = checkpoints.latest
    items = {"params": abstract_state.params, "opt_state": abstract_state.opt_state, "data": None}
    saved = checkpoints.restore(step, items)
    batches.set_state(saved["data"])
    placed = jax.device_put(jnp.int32(step), abstract_state.step.sharding)
    return State(placed, saved["params"], saved["opt_state"])


def _record(progress: Progress, folder: Path, step: int, metrics: dict[str, Array]) -> None:
    values = {name: float(np.asarray(value)) for name, value in metrics.items()}
    if not np.isfinite(values["loss"]):
        raise UserError(
            f"the loss is {values['loss']} at step {step}; the checkpoints in {folder} are from "
            "before it: lower the learning rate or use another seed"
        )
    progress.step(step, values)
