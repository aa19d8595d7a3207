"""Checkpoints come back bit for bit; unfinished, damaged and unfitting ones are told apart."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.checkpoints import checkpoint, checksums, step_folders
from gqa.checkpoints.checkpoint import Checkpoints
from gqa.runtime import hardware, signals
from gqa.runtime.errors import DamagedCheckpoint, UserError

CONFIG = {"model": {"d_model": 4, "tied": True}, "variant": {"seed": 0, "method": None}}


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


def test_of_equal_losses_the_later_is_the_best(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        for step, loss in enumerate([1.0, 2.0, 1.0, 1.0, 3.0], start=1):
            save(checkpoints, step, loss)
        assert checkpoints.best == 4
    assert steps(tmp_path) == [4, 5]


def test_what_comes_after_a_step_is_discarded(tmp_path):
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, 1.0)
        checkpoints.discard_after(2)
        assert checkpoints.latest == 2
        assert steps(tmp_path) == [1, 2]
        checkpoints.discard_after(None)
        assert checkpoints.latest is None
    assert steps(tmp_path) == []


def test_a_save_that_was_killed_is_not_a_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
    killed = tmp_path / "2.orbax-checkpoint-tmp"
    (killed / "params").mkdir(parents=True)
    assert step_folders.find(tmp_path).name == "1"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
        save(checkpoints, 2, 1.0)
    assert step_folders.find(tmp_path).name == "2"
    assert not killed.exists()


def test_a_checkpoint_is_found_from_its_step_or_its_parent(tmp_path):
    with Checkpoints(tmp_path / "run", keep_last=2) as checkpoints:
        save(checkpoints, 9, 1.0)
        save(checkpoints, 10, 2.0)
    assert step_folders.find(tmp_path / "run").name == "10"
    assert step_folders.find(tmp_path / "run" / "9").name == "9"
    with pytest.raises(UserError, match=r"no checkpoint in .*run2; name a step folder"):
        step_folders.find(tmp_path / "run2")


def test_other_shapes_and_names_are_told_apart(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
    expected = {"a": jnp.zeros(6), "b": {"c": jnp.zeros((2, 4)), "d": jnp.zeros(1)}}
    message = r"- b/c \(2, 3\), \+ b/c \(2, 4\), \+ b/d \(1,\)$"
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path, {"params": expected})


@pytest.fixture
def saved(tmp_path):
    """A run with two checkpoints; its folder."""
    with Checkpoints(tmp_path / "run", keep_last=2) as checkpoints:
        save(checkpoints, 1, 2.0)
        save(checkpoints, 2, 1.0)
    return tmp_path / "run"


def load_all(step):
    return checkpoint.load(step, {"params": params(1), "data": None, "config": None})


def files(step):
    return sorted(p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip, truncate, os.unlink])
def test_damage_of_any_file_is_found_and_named(saved, damage):
    step = saved / "2"
    names = files(step)
    assert {"checksums.json", "_CHECKPOINT_METADATA"} < set(names)
    assert any(name.startswith("params/ocdbt.process_0/d/") for name in names)
    shutil.copytree(step, saved / "copy")
    for name in names:
        if not (step / name).stat().st_size and damage is not os.unlink:
            continue
        damage(step / name)
        with pytest.raises(DamagedCheckpoint, match=f" {name} |of {name} have changed") as caught:
            load_all(step)
        assert caught.value.step == step
        shutil.rmtree(step)
        shutil.copytree(saved / "copy", step)
    load_all(step)


def test_sizes_are_compared_of_all_items_also_those_not_asked_for(saved):
    truncate(next((saved / "2" / "params" / "d").iterdir()))
    with pytest.raises(DamagedCheckpoint, match=r"params/d/\w+ has \d+ bytes instead of \d+"):
        checkpoint.load_config(saved)


def test_files_that_were_added_are_found(saved, tmp_path):
    step = saved / "2"
    (step / "params" / "d" / "more").write_text("x")
    with pytest.raises(DamagedCheckpoint, match="params/d/more was added"):
        checkpoint.load_config(step)


@pytest.mark.parametrize("make", [os.symlink, lambda _, path: os.mkfifo(path)])
def test_links_and_pipes_are_refused(saved, tmp_path, make):
    """Also in the place of a file, with the same contents outside."""
    path = saved / "2" / "params" / "manifest.ocdbt"
    shutil.move(path, tmp_path / "elsewhere")
    make(tmp_path / "elsewhere", path)
    with pytest.raises(DamagedCheckpoint, match=r"params/manifest.ocdbt is neither a file nor"):
        checkpoint.load_config(saved)


def test_contents_are_compared_before_they_are_used(saved, monkeypatch):
    def fail(*_):
        raise AssertionError("damaged contents were used")

    flip(next((saved / "2" / "params" / "d").iterdir()))
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", fail)
    monkeypatch.setattr(checkpoint.ocp, "metadata", fail)
    with pytest.raises(DamagedCheckpoint), Checkpoints(saved) as checkpoints:
        checkpoints.restore(2, {"params": params(1)})


def test_a_damaged_step_and_later_ones_are_set_aside(saved):
    flip(saved / "1" / "checksums.json")
    with pytest.raises(DamagedCheckpoint) as caught:
        Checkpoints(saved)
    step_folders.set_aside(caught.value.step)
    assert sorted(path.name for path in saved.iterdir()) == ["1.damaged", "2.later"]
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest is None
        save(checkpoints, 1, 2.0)
    step_folders.set_aside(saved / "1")
    assert (saved / "1.damaged-2").is_dir()
    with pytest.raises(UserError, match="no checkpoint in"):
        step_folders.find(saved)


def test_a_step_that_a_kill_left_without_seal_is_sealed_at_the_next_open(saved):
    (saved / "2" / "checksums.json").unlink()
    with Checkpoints(saved) as checkpoints:
        assert (checkpoints.latest, checkpoints.measured) == (2, 1)
        checkpoints.measure(2, {"validation_loss": 1.0})
    load_all(saved / "2")
    with Checkpoints(saved) as checkpoints:
        assert (checkpoints.latest, checkpoints.measured, checkpoints.best) == (2, 2, 2)


def test_a_seal_that_names_files_elsewhere_opens_none(saved, tmp_path):
    step, secret = saved / "2", tmp_path / "secret"
    os.mkfifo(secret)  # reading it would never end
    content = json.loads((step / "checksums.json").read_text())
    content["files"]["../../secret"] = [0, ""]
    del content["sha256"]
    content["sha256"] = checksums._digest(content)
    (step / "checksums.json").write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint, match="secret is missing"):
        load_all(step)


def test_more_than_the_memory_is_refused(saved, monkeypatch):
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: memory)
    memory = type("Memory", (), {"total": 47})
    with pytest.raises(UserError, match=r"2 takes 0\.0 GiB, this machine has 0\.0 GiB"):
        checkpoint.load(saved, {"params": params(1)})
    memory.total = 48
    checkpoint.load(saved, {"params": params(1)})


def test_items_that_are_not_there_are_named(saved):
    for item, abstract in (("opt_state", params(1)), ("guard", None)):
        with pytest.raises(UserError, match=f"has no {item}; use one"):
            checkpoint.load(saved, {item: abstract})


def test_a_step_without_metrics_is_kept_until_one_with_them(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
        checkpoints.save(2, {"params": params(2), "config": CONFIG})
        assert (checkpoints.latest, checkpoints.measured, checkpoints.best) == (2, 1, 1)
        assert steps(tmp_path) == [1, 2]
        save(checkpoints, 3, 2.0)
    assert steps(tmp_path) == [1, 3]


def test_errors_of_a_save_surface(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
        checkpoints.wait()
        monkeypatch.setattr(checksums, "write", fail)
        save(checkpoints, 2, 1.0)
        with pytest.raises(OSError, match="Input/output"):
            checkpoints.wait()
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest, checkpoints.measured) == (2, 1)


@pytest.mark.parametrize("call", ["save_checkpointables_async", "load_checkpointables", "metadata"])
def test_a_signal_waits_for_orbax(saved, tmp_path, monkeypatch, call):
    orbax = getattr(checkpoint.ocp, call)
    monkeypatch.setattr(signals, "_watch", signals._Watch())

    def signalled(*args, **kwargs):
        try:
            signals._handle(signal.SIGTERM, None)
        except signals.Interrupted as error:
            raise RuntimeError("Orbax: error while reading") from error  # as it does
        return orbax(*args, **kwargs)

    monkeypatch.setattr(checkpoint.ocp, call, signalled)

    def copy():
        with Checkpoints(tmp_path / "other") as checkpoints:
            load_all(saved)
            save(checkpoints, 7, 1.0)

    with pytest.raises(signals.Interrupted):
        copy()
    if call == "save_checkpointables_async":
        assert checksums.is_sealed(tmp_path / "other" / "7")
