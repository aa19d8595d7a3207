"""One step of training: the state that it changes, its loss, and the loss on validation text.

The loop around the step decides when to validate, to save and to roll back: `loop.py`. The sums
over tokens are in `loss.py`, the update rule and the learning rates in `optimizer.py`. Letters are
those of `gqa/model/attention.py`.
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
    """Everything that a training step changes.

    Attributes:
        step: int32 [], the number of steps done. Uptraining goes on from its parent's number.
        params: the parameters, as `init_params` makes them.
        opt_state: Adafactor's state, one entry for each leaf of `params`.
    """

    step: Array
    params: dict
    opt_state: Any


Loss = Callable[..., dict[str, Array]]


class Teacher(NamedTuple):
    """A network that the trained one stays near to: the loss gains beta * KL(teacher || network).

    Attributes:
        config: of the teacher. Its parameters are an argument of the training step.
        beta: the weight of the divergence, per real token.
    """

    config: Config
    beta: float


def init(config: Config, seed: int) -> State:
    """Return a state at step 0 with random parameters and an empty optimizer state."""
    params = init_params(config, seed)
    return State(jnp.int32(0), params, adafactor().init(params))


def abstract(
    config: Config,
    mesh: Mesh,
    layout: Layout = WHOLE,
    change: Callable[[State], State] = lambda x: x,
) -> State:
    """Return the shapes, dtypes and shardings of a training state, to restore a checkpoint into.

    No array is made, so a network that fits the devices only once can be restored.

    Args:
        change: the function that turned a state of `config` into the state that is trained, such as
            one that adds pooling weights.
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
    """Return the sharding of each array of a state, or of the result of `abstract`."""
    return jax.tree.map(lambda x: x.sharding, state)


def make_loss(config: Config, z_loss: float, teacher: Teacher | None = None) -> Loss:
    """Return the training loss as a function (params, batch, key) -> sums over the batch.

    They are those of `cross_entropy`, and input_tokens: how many inputs are real. The network runs
    with dropout, drawn from `key`. With a teacher, the function takes the teacher's parameters as a
    fourth argument and adds the teacher's term to the sum "loss".
    """
    network, pad = Transformer(config), config.pad_token_id

    def loss(
        params: dict, batch: dict, key: Array, teacher_params: dict | None = None
    ) -> dict[str, Array]:
        logits = network.apply({"params": params}, batch, train=True, rngs={"dropout": key})
        sums = cross_entropy(logits, batch["targets"], z_loss, pad)
        sums["input_tokens"] = jnp.sum(batch["inputs"] != pad)
        if teacher is None:
            return sums

        # The teacher runs without dropout. It gets no gradient, because only `params` is
        # differentiated.
        teacher_logits = Transformer(teacher.config).apply({"params": teacher_params}, batch)
        divergence = kl_divergence(teacher_logits, logits, batch["targets"], pad)
        return sums | {"loss": sums["loss"] + teacher.beta * divergence}

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
    """Return the jitted training step (state, batch, ...) -> (state, metrics).

    The step reuses the memory of the state it is given, so that state cannot be read afterwards.
    Arguments behind the batch are passed on to `loss`: the parameters of a teacher. Metrics are
    scalars: the loss and the accuracy per real token, the learning rate, and the numbers of real
    input and target tokens.

    Args:
        loss: of `make_loss`.
        learning_rate: steps done -> learning rate, as in `optimizer.rsqrt`.
        seed: of dropout. The key of a step depends on this seed and the step's number alone.
        num_microbatches: parts into which a batch is cut to save memory; the result is the same.
        placed: shardings of the state, the same before and after a step. None leaves them to JAX.
        view: (trained parameters, steps done) -> the parameters that the network runs with. None
            stands for the trained parameters themselves.
    """
    optimizer = adafactor()

    def train_step(
        state: State, batch: dict, *loss_arguments: dict
    ) -> tuple[State, dict[str, Array]]:
        def loss_of_trained(params: dict, batch: dict, key: Array) -> dict[str, Array]:
            running_params = params if view is None else view(params, state.step)
            return loss(running_params, batch, key, *loss_arguments)

        # Randomness is a function of (seed, step), so that a resumed run draws the same dropout.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        at = placed and placed.params
        grads, sums = accumulate(loss_of_trained, state.params, batch, key, num_microbatches, at)

        # Divide by the real tokens of the whole batch. Then neither padding nor the number of
        # microbatches changes the step.
        tokens = jnp.maximum(sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)

        # `updates` has the sign of the gradient.
        rate = learning_rate(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)

        metrics = _metrics(sums, tokens) | {"learning_rate": rate}
        return State(state.step + 1, params, opt_state), metrics

    # Metrics are replicated, so that every process can read them.
    out: Any = None
    if placed is not None:
        mesh = placed.step.mesh  # type: ignore[attr-defined]  # a state of shardings
        out = placed, NamedSharding(mesh, PartitionSpec())
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)


def _metrics(sums: dict[str, Array], tokens: Array) -> dict[str, Array]:
    """Return the metrics of a step from the sums over its batch; `tokens` is at least 1."""
    return {
        "loss": sums["nats"] / tokens,
        "accuracy": sums["correct"] / tokens,
        "input_tokens": sums["input_tokens"],
        "tokens": sums["tokens"],
    }


def accumulate(
    loss: Loss, params: dict, batch: dict, key: Array, num_microbatches: int, at: Any = None
):
    """Return the gradients and the sums of `loss` over a batch that is cut into microbatches.

    Both are sums over the microbatches. Each microbatch draws dropout from a key of its own.

    Args:
        at: the shardings of the parameters. The gradients of each microbatch get them before they
            are added, so that no device holds gradients of parameters that it does not hold.
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

    # With 8 rows and 2 microbatches, the first microbatch has rows 0, 2, 4, 6. Neighbouring rows
    # lie on one device, so a microbatch of rows 0 to 3 would leave half of the devices without
    # work.
    split = jax.tree.map(
        lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )

    # A loop holds the activations of one microbatch at a time. A single microbatch needs no loop.
    shapes = jax.eval_shape(value, params, batch, key)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, shapes))
    items = (jnp.arange(num_microbatches), split)
    total, _ = jax.lax.scan(add, zeros, items, unroll=num_microbatches == 1)
    return total


@functools.lru_cache(maxsize=4)
def make_validation(config: Config, mesh: Mesh) -> Callable[[dict, Iterable], float]:
    """Return a function (params, batches) -> cross entropy in nats per real token, no dropout.

    `batches` yields pairs of a batch and its number of examples.
    """

    def nats(params: dict, batch: dict) -> Array:
        logits = Transformer(config).apply({"params": params}, batch)
        return cross_entropy(logits, batch["targets"], pad=config.pad_token_id)["nats"]

    return _per_token(nats, mesh, config.pad_token_id)


@functools.lru_cache(maxsize=4)
def make_divergence(teacher: Config, config: Config, mesh: Mesh) -> Callable[..., float]:
    """Return a function (teacher_params, params, batches) -> KL(teacher || network).

    The divergence is in nats per real token. `batches` is as in `make_validation`.
    """

    def nats(teacher_params: dict, params: dict, batch: dict) -> Array:
        teacher_logits = Transformer(teacher).apply({"params": teacher_params}, batch)
        logits = Transformer(config).apply({"params": params}, batch)
        return kl_divergence(teacher_logits, logits, batch["targets"], config.pad_token_id)

    return _per_token(nats, mesh, config.pad_token_id)


def _per_token(nats: Callable[..., Array], mesh: Mesh, pad: int) -> Callable[..., float]:
    """Return a function (*trees, batches) -> the sum of nats(*trees, batch) per real token."""

    @jax.jit
    def sums(batch: dict, *trees: dict) -> tuple[Array, Array]:
        return nats(*trees, batch), jnp.sum(batch["targets"] != pad)

    def mean(*trees_and_batches) -> float:
        *trees, batches = trees_and_batches

        # All batches are dispatched before the first result is read. Nats and tokens are summed
        # apart: a mean of batch means would give the tokens of a short batch more weight.
        results = [sums(place(batch, mesh), *trees) for batch, _ in batches]
        total, tokens = (sum(float(r[i]) for r in results) for i in range(2))
        return total / max(tokens, 1.0)

    return mean
