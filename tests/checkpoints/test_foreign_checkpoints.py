"""A checkpoint from a stranger, with a valid seal, is refused in one line that names the fault."""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from gqa.checkpoints import checkpoint, checksums, pieces, step_folders
from gqa.checkpoints.checkpoint import Checkpoints
from gqa.runtime.errors import CheckpointError, ConfigError, DamagedCheckpoint, UserError

SHAPES = {"a": jnp.zeros(6), "b": {"c": jnp.zeros((2, 3))}}


def save(folder, **changes):
    params = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((2, 3))}} | changes
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"params": params, "config": {"x": 1}}, {"validation_loss": 1.0})
    return folder / "1"


@pytest.fixture
def step(tmp_path):
    return save(tmp_path / "run")


def load(step):
    return checkpoint.load(step, {"params": SHAPES, "config": None})


def refused(step, message):
    """Seal the step as a stranger would, and load it."""
    checksums.write(step, {"validation_loss": 1.0})
    with pytest.raises(CheckpointError, match=message) as caught:
        load(step)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named_but_training_resumes_from_them(tmp_path, bad):
    """The divergence check of training sees them, and knows how to go back."""
    step = save(tmp_path / "run", b={"c": jnp.ones((2, 3)).at[1, 2].set(bad)})
    with pytest.raises(CheckpointError, match=r"run/1: params/b/c has NaN or infinite numbers"):
        load(step)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.restore(1, {"params": SHAPES})


def test_whole_numbers_are_no_weights(tmp_path):
    step = save(tmp_path / "run", a=jnp.arange(6))
    with pytest.raises(CheckpointError, match=r"- a \(6,\) int32, \+ a \(6,\)$"):
        load(step)


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "params/_METADATA"])
@pytest.mark.parametrize(
    "content", ["[" * 10**5, "7", "[]", "{}", "", "\x00", '{"item_handlers": 7}']
)
def test_metadata_that_are_something_else_are_refused(step, file, content):
    (step / file).write_text(content)
    checksums.write(step, None)
    with pytest.raises(UserError, match=r"METADATA|run/1") as caught:
        load(step)
    assert "\n" not in str(caught.value)


def test_a_tree_of_other_names_is_refused(step):
    path = step / "params" / "_METADATA"
    tree = json.loads(path.read_text())
    entry = tree["tree_metadata"].pop("('a',)")
    entry["key_metadata"][0]["key"] = "../../../elsewhere/a"
    tree["tree_metadata"]["('../../../elsewhere/a',)"] = entry
    path.write_text(json.dumps(tree))
    refused(step, "run/1")


@pytest.mark.parametrize("key", ["use_ocdbt", "use_zarr3"])
def test_another_format_whose_names_are_paths_is_refused(step, key):
    path = step / "params" / "_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: False}))
    refused(step, "params is not in Orbax's format of OCDBT")


def test_another_reader_of_orbax_is_not_chosen(step):
    path = step / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["item_handlers"]["params"] = "os.system"
    path.write_text(json.dumps(content))
    refused(step, "params is not in Orbax's format of OCDBT")


def test_a_database_that_points_into_another_folder_reads_nothing_there(step, tmp_path):
    """OCDBT's objects name the files that hold their parts; only those of its folder are opened."""
    other = save(tmp_path / "other", a=jnp.full(6, 7.0))
    for path in [*step.glob("params/d/*"), *step.glob("params/ocdbt.process_0/d/*")]:
        path.unlink()
    shutil.copy(other / "params" / "manifest.ocdbt", step / "params" / "manifest.ocdbt")
    refused(step, "run/1 cannot be read|array a")


@pytest.mark.parametrize(
    "files", [7, [], None, {"a": 7}, {"a": []}, {"a": [1, 2]}, {"a": ["1", "x"]}]
)
def test_a_seal_of_another_structure_is_damaged(step, files):
    seal = {"metrics": None, "files": files}
    (step / checksums.NAME).write_text(json.dumps(seal | {"sha256": checksums._digest(seal)}))
    with pytest.raises(DamagedCheckpoint, match=r"contents of checksums\.json have changed"):
        load(step)


@pytest.mark.parametrize("metrics", [7, [], {"validation_loss": "1"}, {"validation_loss": []}])
def test_metrics_that_are_no_numbers_are_damage(step, metrics):
    checksums.write(step, metrics)
    with pytest.raises(DamagedCheckpoint, match=r"contents of checksums\.json have changed"):
        Checkpoints(step.parent)


def test_a_run_whose_metrics_lack_the_loss_is_damaged(step):
    checksums.write(step, {"accuracy": 1.0})
    with pytest.raises(DamagedCheckpoint, match="its metrics have no validation_loss"):
        Checkpoints(step.parent)


@pytest.mark.parametrize(
    "content", ["[" * 10**5, '{"files": ' + "[" * 10**5, '{"a": 1' + "0" * 9999]
)
def test_a_seal_that_is_nested_deeply_or_endless_is_damaged(step, content):
    (step / checksums.NAME).write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"contents of checksums\.json have changed"):
        load(step)


def test_a_seal_that_is_a_pipe_or_huge_is_damaged(step):
    path = step / checksums.NAME
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedCheckpoint, match=r"checksums\.json is missing"):
        load(step)
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(DamagedCheckpoint, match=r"contents of checksums\.json have changed"):
        load(step)


def test_files_of_file_managers_are_no_damage(step):
    for name in (".DS_Store", "params/.DS_Store", "Thumbs.db", "desktop.ini", "params/._d"):
        (step / name).write_text("x")
    (step.parent / ".DS_Store").write_text("x")
    np.testing.assert_array_equal(load(step)["params"]["a"], np.arange(6))
    with Checkpoints(step.parent) as checkpoints:
        assert checkpoints.latest == 1


@pytest.mark.parametrize(
    "name", ["a]b", "a b", "a%20b", "a#b", "a?b", "a*b", "é'\"", "{x}", "$HOME", "~a"]
)
def test_a_checkpoint_lies_in_a_folder_of_any_name(tmp_path, tiny, name):
    """Both of the ways in which arrays are written."""
    step = save(tmp_path / name / "run")
    np.testing.assert_array_equal(load(step)["params"]["a"], np.arange(6))

    def blocks(_):
        yield (slice(None),), np.arange(3, dtype=np.float32)

    with Checkpoints(tmp_path / name / "written") as checkpoints:
        checkpoints.write(1, pieces.Source(tiny, {"x": (3,)}, {"x": (3,)}, blocks), {"config": {}})
    back = checkpoint.load(tmp_path / name / "written", {"params": {"x": jnp.zeros(3)}})["params"]
    np.testing.assert_array_equal(back["x"], np.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a[b]", "a[b", "a\\b", "a**"])
def test_a_folder_whose_checkpoints_could_not_be_read_is_refused_before_anything(tmp_path, name):
    with pytest.raises(ConfigError, match="use a folder whose path has neither"):
        Checkpoints(tmp_path / name / "run")
    with pytest.raises(ConfigError, match="use a folder whose path has neither"):
        step_folders.find(tmp_path / name / "run")
    assert not list(tmp_path.iterdir())
