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

    steps = [training_step.make_step(loss, optimizer.constant(0.0), seed) for seed in (0, 1)]

    def loss_at(seed, step):
        state = training_step.init(config, 0)._replace(step=jnp.int32(step))
        return float(steps[seed](state, make_batch(0))[1]["loss"])

    drawn = [loss_at(*place) for place in ((0, 3), (0, 4), (1, 3))]
    assert len(set(drawn)) == 3
    assert loss_at(0, 3) == drawn[0]


@functools.cache
def compiled(config):
    """Step and validation of a network, traced once for all tests that run them."""
    loss = training_step.make_loss(dataclasses.replace(config, dropout_rate=0.1), 1e-4)
    step = training_step.make_step(loss, optimizer.constant(3e-2), seed=0)
    return step, training_step.make_validation(config, make_mesh())


def run_fit(config, folder, steps, every=2, batches=None, alive=lambda step: None):
    step, validation = compiled(config)

    def validate(params):
        return validation(params, [(make_batch(1000), 4)])

    class Watched(Progress):
        def step(self, number, metrics):
            super().step(number, metrics)
            alive(number)

    with Watched("test", folder / "events", every, 1.0, None) as progress:
        loop.fit(
            loop.Computation(
                start=lambda: training_step.init(config, 0),
                abstract_state=training_step.abstract(config, make_mesh()),
                train_step=step,
                validate=validate,
                mesh=make_mesh(),
            ),
            loop.RunSettings(steps, every, {"model": config.__dict__}),
            batches or Batches(),
            folder / "checkpoints",
            progress,
        )


def result(config, folder, step):
    state = training_step.abstract(config, make_mesh())
    items = {"params": state.params, "opt_state": state.opt_state, "data": None}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.latest == step
        return checkpoints.restore(step, items)


class Killed(BaseException):
    """Stands for a signal: nothing in the loop catches it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function that gives the folder of a run of 7 steps, which the first call makes."""

    @functools.cache
    def whole(config):
        run_fit(config, folder := tmp_path_factory.mktemp("whole"), 7)
        return folder

    return whole


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_killed_run_resumes_bit_for_bit(config, whole, tmp_path, at):
    def die(step):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        run_fit(config, tmp_path, 7, alive=die)
    run_fit(config, tmp_path, 7)
    actual, expected = (result(config, folder, 7) for folder in (tmp_path, whole(config)))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_more_steps_continue_a_finished_run(config, whole, tmp_path):
    run_fit(config, tmp_path, 4)
    run_fit(config, tmp_path, 7)
    actual, expected = (result(config, folder, 7) for folder in (tmp_path, whole(config)))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_no_steps_save_the_start(config, tmp_path):
    run_fit(config, tmp_path, 0)
    actual = result(config, tmp_path, 0)
    jax.tree.map(
        np.testing.assert_array_equal, actual["params"], training_step.init(config, 0).params
    )


def test_training_lowers_the_loss(config, tmp_path, capsys):
    class OneBatch(Batches):
        def __next__(self):
            self.position += 1
            return make_batch(0)

    run_fit(config, tmp_path, 60, every=30, batches=OneBatch())
    losses = [float(x) for x in re.findall(r"loss (\S+)  accuracy", capsys.readouterr().out)]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.3
