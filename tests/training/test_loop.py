"""Test the training loop: what a step may depend on, and that a killed run loses nothing."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.checkpoints.checkpoint import Checkpoints
from gqa.model.config import Config
from gqa.runtime.errors import UserError
from gqa.runtime.mesh import make_mesh
from gqa.training import loop, optimizer, training_step
from gqa.training.progress import Progress


@pytest.fixture
def config(tiny) -> Config:
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    return dataclasses.replace(tiny, **layers, d_model=8, d_ff=8, head_dim=4)


def make_batch(seed, rows=4):
    rng = np.random.default_rng(seed)
    batch = {
        "inputs": rng.integers(3, 32, (rows, 6), dtype=np.int32),
        "targets": rng.integers(3, 32, (rows, 5), dtype=np.int32),
    }
    for row in range(rows):  # rows of different lengths, so that weights differ
        batch["targets"][row, 1 + row % 5 :] = 0
    return batch


class Batches:
    """An endless stream that is a function of its position, as Grain's iterators are."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return make_batch(self.position)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def gradients(config, batch, num_microbatches, seed=0):
    loss = training_step.make_loss(config, 1e-4)
    params = training_step.init(config, 0).params
    run = jax.jit(
        functools.partial(training_step.accumulate, loss, num_microbatches=num_microbatches)
    )
    return run(params, batch, jax.random.key(seed))


def test_microbatches_do_not_change_gradients_or_sums(config):
    whole, parts = (gradients(config, make_batch(0), n) for n in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)


def test_rows_of_padding_change_nothing(config):
    batch = make_batch(0)
    padded = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
    step = training_step.make_step(
        training_step.make_loss(config, 1e-4), optimizer.constant(1e-2), seed=0
    )
    (a, metrics), (b, padded_metrics) = (
        step(training_step.init(config, 0), x) for x in (batch, padded)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), a.params, b.params)
    assert metrics["tokens"] == padded_metrics["tokens"] == (batch["targets"] > 0).sum()
    counts = (x["input_tokens"] for x in (metrics, padded_metrics))
    assert {int(n) for n in counts} == {batch["inputs"].size}


def test_every_step_and_microbatch_draws_its_own_dropout(config):
    """Rows and parameters are equal, so losses can differ by their dropout alone."""
    config = dataclasses.replace(config, dropout_rate=0.5)
    params = training_step.init(config, 0).params
    seen = []

    def loss(params, batch, key):
        sums = training_step.make_loss(config, 0.0)(params, batch, key)
        jax.debug.callback(lambda x: seen.append(float(x)), sums["nats"])
        return sums

    row = make_batch(0, rows=1)
    batch = {name: np.repeat(x, 4, axis=0) for name, x in row.items()}
    step = training_step.make_step(loss, optimizer.constant(0.0), seed=0, num_microbatches=4)
    state = training_step.State(jnp.int32(0), params, optimizer.adafactor().init(params))
    for _ in range(2):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 8


def test_dropout_is_a_function_of_seed_and_step(config):
    config = dataclasses.replace(config, dropout_rate=0.5)
    loss = training_step.make_loss(config, 0.0)

    def loss_at(seed, step):
        state = training_step.init(config, 0)._replace(step=jnp.int32(step))
        _, metrics = training_step.make_step(loss, optimizer.constant(0.0), seed)(
            state, make_batch(0)
        )
        return float(metrics["loss"])

    assert loss_at(0, 3) == loss_at(0, 3)
    assert len({loss_at(0, 3), loss_at(0, 4), loss_at(1, 3)}) == 3


@functools.cache
def compiled(config, rate):
    """Step and validation of a network, traced once for all tests that run them."""
    loss = training_step.make_loss(dataclasses.replace(config, dropout_rate=0.1), 1e-4)
    step = training_step.make_step(loss, optimizer.constant(rate), seed=0)
    return step, training_step.make_validation(config, make_mesh())


def run_fit(config, folder, steps, every=2, rate=1e-2, batches=None, alive=lambda step: None):
    step, validation = compiled(config, rate)

    def validate(params):
        return validation(params, [(make_batch(1000), 4)])

    class Watched(Progress):
        def step(self, number, metrics):
            super().step(number, metrics)
            alive(number)

    with Watched("test", folder / "events", every, 1.0, None) as progress:
        loop.fit(
            computation(config, step, validate),
            loop.RunSettings(steps, every, {"model": config.__dict__}),
            batches or Batches(),
            folder / "checkpoints",
            progress,
        )


def computation(config, step, validate):
    return loop.Computation(
        start=lambda: training_step.init(config, 0),
        abstract_state=training_step.abstract(config, make_mesh()),
        train_step=step,
        validate=validate,
        mesh=make_mesh(),
    )


def result(config, folder, step):
    state = training_step.abstract(config, make_mesh())
    items = {"params": state.params, "opt_state": state.opt_state, "data": None}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.latest == step
        return checkpoints.restore(step, items)


class Killed(BaseException):
    """Stands for a signal: nothing in the loop catches it."""


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_killed_run_resumes_bit_for_bit(config, tmp_path, at):
    def die(step):
        if step == at:
            raise Killed

    run_fit(config, tmp_path / "whole", 7)
    with pytest.raises(Killed):
        run_fit(config, tmp_path / "killed", 7, alive=die)
    run_fit(config, tmp_path / "killed", 7)
    actual, expected = (result(config, tmp_path / name, 7) for name in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_more_steps_continue_a_finished_run(config, tmp_path):
    run_fit(config, tmp_path / "whole", 6)
    run_fit(config, tmp_path / "parts", 4)
    run_fit(config, tmp_path / "parts", 6)
    actual, expected = (result(config, tmp_path / name, 6) for name in ("parts", "whole"))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_no_steps_save_the_start(config, tmp_path):
    run_fit(config, tmp_path, 0)
    actual = result(config, tmp_path, 0)
    jax.tree.map(
        np.testing.assert_array_equal, actual["params"], training_step.init(config, 0).params
    )


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(config, tmp_path):
    batches = Batches()
    loss = training_step.make_loss(config, 0.0)
    with pytest.raises(
        UserError,
        match=r"^test: the loss is nan at step 3; the last good checkpoint is .*/checkpoints/2$",
    ):
        run_fit_with_nan(config, tmp_path, loss, batches)
    assert result(config, tmp_path, 2)["data"] == {"position": 2}


def run_fit_with_nan(config, folder, loss, batches):
    """Step 3's batch, the third, brings the loss to NaN; every step is a checkpoint."""

    def poisoned(params, batch, key):
        sums = loss(params, batch, key)
        third = jnp.array_equal(batch["inputs"], make_batch(3)["inputs"])
        return sums | {name: sums[name] + jnp.where(third, jnp.nan, 0) for name in ("loss", "nats")}

    with Progress("test", folder / "events", 1, 1.0, None) as progress:
        step = training_step.make_step(poisoned, optimizer.constant(1e-2), seed=0)
        loop.fit(
            computation(config, step, lambda params: 1.0),
            loop.RunSettings(steps=5, every=1, config={"model": config.__dict__}),
            batches,
            folder / "checkpoints",
            progress,
        )


def test_training_lowers_the_loss(config, tmp_path, capsys):
    class OneBatch(Batches):
        def __next__(self):
            self.position += 1
            return make_batch(0)

    run_fit(config, tmp_path, 60, every=30, rate=3e-2, batches=OneBatch())
    losses = [float(x) for x in re.findall(r"loss (\S+)  accuracy", capsys.readouterr().out)]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.3
