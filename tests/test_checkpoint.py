"""Checkpoints come back bit for bit, unfinished ones are not seen, and mismatches are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import checkpoint
from gqa.checkpoint import Checkpoints
from gqa.errors import UserError

CONFIG = {"model": {"d_model": 4}, "variant": {"seed": 0}}


def params(step):
    return {"a": jnp.arange(6.0) * step, "b": {"c": jnp.full((2, 3), 1 / step)}}


def save(checkpoints, step, loss):
    items = {"params": params(step), "data": {"next_index": step}, "config": CONFIG}
    checkpoints.save(step, items, {"validation_loss": loss})


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_a_saved_step_comes_back(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.best is None
        save(checkpoints, 3, 1.0)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
        found = checkpoints.restore(3, {"params": params(1), "data": None})
    jax.tree.map(np.testing.assert_array_equal, found["params"], params(3))
    assert found["data"] == {"next_index": 3}
    assert checkpoint.load_config(tmp_path) == CONFIG


def test_saving_is_not_disturbed_by_donation(tmp_path):
    triple = jax.jit(lambda x: x * 3, donate_argnums=0)
    x = jnp.arange(1_000_000.0)
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        for step in range(1, 4):
            x = triple(x)
            items = {"params": {"x": x}, "data": {"next_index": step}, "config": CONFIG}
            checkpoints.save(step, items, {"validation_loss": 1.0})
    for step in range(1, 4):
        found = checkpoint.load(tmp_path / str(step), {"params": {"x": x}})["params"]["x"]
        np.testing.assert_array_equal(found, np.arange(1_000_000, dtype=np.float32) * 3**step)


def test_the_last_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0], start=1):
            save(checkpoints, step, loss)
        assert checkpoints.best == 2
        assert checkpoints.metric(2) == 1.0
    assert steps(tmp_path) == [2, 4, 5]


def test_a_save_that_was_killed_is_not_a_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
    killed = tmp_path / "2.orbax-checkpoint-tmp"
    (killed / "params").mkdir(parents=True)
    assert checkpoint.find(tmp_path).name == "1"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
        save(checkpoints, 2, 1.0)
    assert checkpoint.find(tmp_path).name == "2"
    assert not killed.exists()


def test_a_checkpoint_is_found_from_its_step_or_its_parent(tmp_path):
    with Checkpoints(tmp_path / "run", keep_last=2) as checkpoints:
        save(checkpoints, 9, 1.0)
        save(checkpoints, 10, 2.0)
    assert checkpoint.find(tmp_path / "run").name == "10"
    assert checkpoint.find(tmp_path / "run" / "9").name == "9"
    with pytest.raises(UserError, match=r"no checkpoint in .*run2; name a step folder"):
        checkpoint.find(tmp_path / "run2")


def test_other_shapes_and_names_are_told_apart(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
    expected = {"a": jnp.zeros(6), "b": {"c": jnp.zeros((2, 4)), "d": jnp.zeros(1)}}
    message = r"- b/c \(2, 3\), \+ b/c \(2, 4\), \+ b/d \(1,\)$"
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path, {"params": expected})
