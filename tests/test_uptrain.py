"""Uptraining: a head start changes nothing, learned heads end plain, a teacher pulls."""

import json
import shutil

import numpy as np
import pytest

from gqa import checkpoint
from gqa.model import Config
from tests.jobs import TINY, differences, launch, outputs

OURS = ("convert.num_kv_heads_decoder", "convert.num_kv_heads_cross", "uptrain.alpha")
SETTINGS = {key: value for key, value in TINY.items() if key not in OURS}
SETTINGS |= {"sweep.alpha.tasks": "none", "sweep.alpha.kv_heads": "2,"}


def sweep(workdir, methods, *alphas, **more):
    grid = {"sweep.alpha.methods": methods, "sweep.alpha.alphas": ",".join(map(str, alphas)) + ","}
    return launch(workdir, SETTINGS | grid | more, config="configs/sweeps/alpha.py")


def stages(workdir):
    """Of each uptraining, by its method and alpha: folder, records by metric."""
    found = {}
    for path in (workdir / "stages").glob("uptrain-*/done.json"):
        variant = json.loads((path.parent / "stage.json").read_text())["settings"]["variant"]
        records = {r["metric"]: r["value"] for r in json.loads(path.read_text())["records"]}
        found[variant["method"], variant["alpha"]] = path.parent, records
    return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uptrain") / "runs"
    sweep(folder, "mean,weighted,fuse,mean-kl9", 0.5, 1.0)
    return folder


def test_a_head_start_changes_nothing(workdir, tmp_path):
    """alpha 1 went on where alpha 0.5 ended; here it has to go all the way itself."""
    for name in ("text", "compiled"):
        shutil.copytree(workdir / name, tmp_path / name)
    text = sweep(tmp_path, "mean,mean-kl9", 1.0)
    assert "step 8/12" in text
    expected = outputs(workdir, like=tmp_path)
    assert any(name.startswith("uptrain") for name in expected)
    assert differences(outputs(tmp_path), expected) == []


def test_a_head_start_is_taken(workdir):
    folder, _ = stages(workdir)["mean", 1.0]
    steps = {int(p.name) for p in (folder / "checkpoints").iterdir()}
    assert steps == {10, 12}  # alpha 0.5 ended at 9


@pytest.mark.parametrize("method", ["weighted", "fuse"])
def test_what_is_learned_ends_as_plain_heads(workdir, method):
    folder, records = stages(workdir)[method, 1.0]
    path = folder / "checkpoints" / "12"
    info = checkpoint.load_config(path)
    assert Config(**info["model"]).num_kv_heads_decoder == 2
    found = outputs(workdir, like=workdir)
    kernels = [name for name in found if name.startswith(folder.name) and "pool" in name]
    assert kernels == []
    keys = found[f"{folder.name}['params']['decoder']['layers']['self_attention']['key']"]
    assert keys.shape == (1, 16, 2, 4)
    # It is not what the mean, trained alike, has become.
    mean, mean_records = stages(workdir)["mean", 1.0]
    other = found[f"{mean.name}['params']['decoder']['layers']['self_attention']['key']"]
    assert np.abs(keys - other).max() > 1e-3
    assert records["validation_loss"] != mean_records["validation_loss"]
    assert records["steps"] == 6


def test_validation_is_of_the_plain_heads(workdir):
    """KL and loss are of what the checkpoint holds: the last logged loss is the stage's."""
    for method in ("weighted", "fuse"):
        folder, records = stages(workdir)[method, 1.0]
        seal = json.loads((folder / "checkpoints" / "12" / "checksums.json").read_text())
        assert seal["metrics"]["validation_loss"] == records["validation_loss"]


def test_a_teacher_keeps_the_network_near(workdir):
    found = stages(workdir)
    near, free = (found[name, 1.0][1] for name in ("mean-kl9", "mean"))
    assert 0 < near["kl_to_parent"] < 0.9 * free["kl_to_parent"]
