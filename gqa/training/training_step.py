"""One step of training: the state it changes, the loss, and its measure on validation text.

The loop around the step (when to validate, to save, to roll back) is `gqa.training.loop`, the sums
over tokens are `gqa.training.loss`, the update rule is `gqa.training.optimizer`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa.model.config import Config
from gqa.model.transformer import Transformer, init_params
from gqa.runtime.mesh import WHOLE, Layout
from gqa.runtime.sharding import param_shardings, place
from gqa.training.loss import cross_entropy, kl_divergence
from gqa.training.optimizer import adafactor


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
    placements: Any = State(
        NamedSharding(mesh, PartitionSpec()),  # type: ignore[arg-type]  # of the step, not a step
        param_shardings(shapes.params, mesh, layout),
        param_shardings(shapes.opt_state, mesh, layout, shapes.params),
    )
    return jax.tree.map(lambda x, at: x.update(sharding=at), shapes, placements)


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

    out: Any = None
    if placed is not None:
        mesh = placed.step.mesh  # type: ignore[attr-defined]  # a state of shardings
        out = placed, NamedSharding(mesh, PartitionSpec())
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
        target = Transformer(teacher).apply({"params": given}, batch)
        logits = Transformer(config).apply({"params": params}, batch)
        return kl_divergence(target, logits, batch["targets"])

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
