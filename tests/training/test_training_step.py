"""Test one training step: its divisors, its learning rate, its metrics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.model.transformer import Transformer
from gqa.runtime.mesh import make_mesh
from gqa.training import loop, optimizer, training_step

LENGTHS = (5, 2, 1, 4)  # real tokens of each row of targets


@pytest.fixture
def config(tiny):
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    return dataclasses.replace(tiny, **layers, d_model=8, d_ff=8, head_dim=4)


def make_batch(seed, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    batch = {
        "inputs": rng.integers(3, 32, (rows, 6), dtype=np.int32),
        "targets": rng.integers(3, 32, (rows, 5), dtype=np.int32),
    }
    batch["inputs"][0, 4:] = 0
    for row, length in enumerate(lengths):
        batch["targets"][row, length:] = 0
    return batch


@functools.cache
def network(config):
    return jax.jit(lambda params, batch: Transformer(config).apply({"params": params}, batch))


def token_losses(config, params, batch):
    """Nats and hits of every real token of a batch, in float64."""
    logits = np.asarray(network(config)(params, batch), np.float64)
    real = batch["targets"] > 0
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    return nats[real], (logits.argmax(-1) == batch["targets"])[real]


def perturbed(params, scale=0.3):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(np.float32), params)


def step_of(config, rate=0.0, z_loss=0.0, **options):
    schedule = rate if callable(rate) else optimizer.constant(rate)
    return training_step.make_step(
        training_step.make_loss(config, z_loss), schedule, seed=0, **options
    )


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_what_is_reported_is_a_mean_over_the_real_tokens(config, num_microbatches):
    """With padding and without, in one piece and in several; the regulariser is not reported."""
    step = step_of(config, z_loss=0.1, num_microbatches=num_microbatches)
    for lengths in (LENGTHS, (5, 5, 5, 5)):
        state = training_step.init(config, 0)
        # Some of the tokens must be predicted right, or any denominator would do.
        batches = (make_batch(seed, lengths) for seed in range(100))
        batch = next(b for b in batches if token_losses(config, state.params, b)[1].any())
        nats, hits = token_losses(config, state.params, batch)
        _, metrics = step(state, batch)
        assert metrics["loss"] == pytest.approx(nats.mean(), rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(hits.mean(), abs=1e-6)
        assert metrics["tokens"] == sum(lengths)
        assert metrics["input_tokens"] == 22


def test_a_batch_of_padding_alone_changes_nothing_and_is_finite(config):
    batch = {name: np.zeros_like(x) for name, x in make_batch(0).items()}
    _, metrics = step_of(config)(training_step.init(config, 0), batch)
    assert (metrics["loss"], metrics["tokens"]) == (0, 0)


def test_the_rate_is_that_of_the_step_itself(config):
    """A rate that is zero at step 0 leaves the parameters; at step 2 it is twice that of 1."""
    step = step_of(config, rate=lambda step: 0.01 * step.astype(jnp.float32))
    batch, changes = make_batch(0), []
    for number in (0, 1, 2):
        state = training_step.init(config, 0)._replace(step=jnp.int32(number))
        before = jax.tree.map(np.array, state.params)
        after, metrics = step(state, batch)
        assert metrics["learning_rate"] == pytest.approx(0.01 * number)
        assert after.step == number + 1
        changes.append(jax.tree.map(lambda a, b: np.array(a) - b, after.params, before))
    assert not any(x.any() for x in jax.tree.leaves(changes[0]))
    for one, two in zip(*map(jax.tree.leaves, changes[1:]), strict=True):
        assert one.any()
        np.testing.assert_allclose(two, 2 * one, atol=1e-6)


def test_gradients_are_of_the_mean_over_real_tokens(config):
    """Adafactor hides a factor, so what reaches the optimizer is looked at: its second moments."""
    params, batch = training_step.init(config, 0).params, make_batch(0)

    def mean(params):
        log_p = jax.nn.log_softmax(network(config)(params, batch))
        target_log_p = jnp.take_along_axis(log_p, jnp.asarray(batch["targets"])[..., None], -1)[
            ..., 0
        ]
        return -(target_log_p * (batch["targets"] > 0)).sum() / sum(LENGTHS)

    expected = jax.grad(mean)(params)["logits"]
    after, _ = step_of(config, num_microbatches=2)(training_step.init(config, 0), batch)
    # The first step's decay is 0: a moment is the gradient's square.
    moment = after.opt_state["logits"][0].v
    np.testing.assert_allclose(moment, expected**2, rtol=1e-3, atol=1e-9)


def test_a_view_makes_what_the_loss_is_of_from_the_parameters_and_the_step(config):
    def half_as_many(params, step):
        return jax.tree.map(lambda x: x * (1 + step), params)

    batch = make_batch(0)
    step = step_of(config, view=half_as_many)
    for number in (0, 2):
        params = training_step.init(config, 0).params
        scaled = jax.tree.map(lambda x, n=number: x * (1 + n), params)
        expected = token_losses(config, scaled, batch)[0].mean()
        state = training_step.State(jnp.int32(number), params, optimizer.adafactor().init(params))
        assert step(state, batch)[1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_validation_is_a_mean_over_tokens_and_not_over_batches(config):
    batches = [make_batch(1, (5, 5, 5, 5)), make_batch(2, (1, 1, 0, 0))]
    params = perturbed(training_step.init(config, 0).params)
    each = [token_losses(config, params, batch)[0] for batch in batches]
    validate = training_step.make_validation(
        dataclasses.replace(config, dropout_rate=0.5), make_mesh()
    )
    actual = validate(params, [(batch, 4) for batch in batches])
    assert actual == pytest.approx(np.concatenate(each).mean(), rel=1e-5)
    assert abs(np.mean([x.mean() for x in each]) - actual) > 1e-3
    assert validate(params, []) == 0


def divergence(config, teacher, params, batch):
    """Of each real token, KL(teacher || network) in float64."""
    real = batch["targets"] > 0
    log_p, log_q = (
        np.asarray(jax.nn.log_softmax(network(config)(tree, batch)), np.float64)[real]
        for tree in (teacher, params)
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def test_divergence_is_from_the_teacher_and_a_mean_over_tokens(config):
    params, batches = (
        training_step.init(config, 0).params,
        [make_batch(1), make_batch(2, (1, 0, 0, 1))],
    )
    teacher = perturbed(params)
    expected = np.concatenate([divergence(config, teacher, params, b) for b in batches]).mean()
    backward = np.concatenate([divergence(config, params, teacher, b) for b in batches]).mean()
    measure = training_step.make_divergence(config, config, make_mesh())
    actual = measure(teacher, params, [(batch, 4) for batch in batches])
    assert actual == pytest.approx(expected, rel=1e-4)
    assert abs(expected - backward) > 1e-3 * expected


def test_a_teacher_adds_its_divergence_times_beta_and_is_not_dropped_out(config):
    params, batch = training_step.init(config, 0).params, make_batch(0)
    given = perturbed(params)
    teacher = training_step.Teacher(dataclasses.replace(config, dropout_rate=0.9), beta=0.5)
    loss = jax.jit(training_step.make_loss(config, 0.0, teacher))
    sums = loss(params, batch, jax.random.key(0), given)
    expected = 0.5 * divergence(config, given, params, batch).sum()
    assert sums["loss"] - sums["nats"] == pytest.approx(expected, rel=1e-3)
    nats, _ = token_losses(config, params, batch)
    assert sums["nats"] == pytest.approx(nats.sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("step", "steps", "every", "due"),
    [(2, 9, 2, True), (3, 9, 2, False), (9, 9, 2, True), (10, 9, 2, True), (8, 9, 5, False)],
)
def test_a_checkpoint_is_due_every_so_many_steps_and_at_the_end(step, steps, every, due):
    assert loop.RunSettings(steps, every, config={}).is_due(step) is due
