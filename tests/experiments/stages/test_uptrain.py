"""Uptraining: a head start changes nothing, learned heads end plain, a teacher pulls."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments.stages.folder import StageFolder
from gqa.checkpoints import checkpoint
from gqa.model.config import Config
from tests.support.jobs import ENVIRONMENT, ROOT, TINY, differences, launch, outputs

OURS = (
    "convert.num_kv_heads_self_attention",
    "convert.num_kv_heads_cross_attention",
    "uptrain.alpha",
)
SETTINGS = {key: value for key, value in TINY.items() if key not in OURS}
SETTINGS["pretrain.steps"] = 2
SETTINGS["model.num_decoder_layers"] = 2
for grid, methods, alphas in (
    ("larger", "mean,none", "0.5,1.0"),
    ("at_once", "mean", "0.5,"),
    ("smaller", "weighted-random,fuse,mean-kl9,mean-weight-per_layer_budget", "1.0,"),
):
    axes = {
        "tasks": "none",
        "sizes": "nano",
        "kv_heads": "2,",
        "methods": methods,
        "alphas": alphas,
        "seeds": "0,",
    }
    SETTINGS |= {f"sweep.{grid}.{axis}": value for axis, value in axes.items()}


def stages(workdir):
    """Of each uptraining, by its method and alpha: folder, records by metric."""
    found = {}
    for path in (workdir / "stages").glob("uptrain-*"):
        folder = StageFolder(path)
        variant = folder.read_description().settings.variant
        records = {r["metric"]: r["value"] for r in folder.read_outcome().records}
        found[variant.method_label, variant.alpha] = folder, records
    return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uptrain") / "runs"
    launch(folder, SETTINGS, "--stage=uptrain", config="configs/sweeps/table1.py")
    return folder


def test_a_head_start_changes_nothing(workdir, tmp_path):
    """alpha 1 went on where alpha 0.5 ended; here it has to go all the way itself."""
    longest, _ = stages(workdir)["mean", 1.0]
    assert {"4"} <= {path.name for path in longest.checkpoints.iterdir()}
    copy = tmp_path / "runs"
    shutil.copytree(workdir, copy)
    for folder, _ in stages(copy).values():
        shutil.rmtree(folder.checkpoints)
        folder.discard_outcome()
        if folder.name != longest.name:
            shutil.rmtree(folder.path)
    # A process like that of the sweep compiles nothing: the sweep has left its programs.
    command = [sys.executable, "-m", "experiments.run.worker", copy / "stages" / longest.name]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    assert differences(outputs(copy), outputs(workdir, like=copy)) == []


@pytest.mark.parametrize("method", ["weighted-random", "fuse"])
def test_what_is_learned_ends_as_plain_heads(workdir, method):
    folder, records = stages(workdir)[method, 1.0]
    path = folder.checkpoints / "4"
    info = checkpoint.load_config(path)
    assert Config(**info["model"]).num_kv_heads_self_attention == 2
    found = outputs(workdir, like=workdir)
    kernels = [name for name in found if name.startswith(folder.name) and "pool" in name]
    assert kernels == []
    keys = found[f"{folder.name}['params']['decoder']['layers']['self_attention']['key']"]
    assert keys.shape == (2, 16, 2, 4)
    # It is not what the mean, trained alike, has become.
    mean, mean_records = stages(workdir)["mean", 1.0]
    other = found[f"{mean.name}['params']['decoder']['layers']['self_attention']['key']"]
    assert np.abs(keys - other).max() > 1e-3
    assert records["validation_loss"] != mean_records["validation_loss"]
    assert records["steps"] == 2


def test_learned_heads_are_of_the_group_that_was_chosen(workdir):
    """Training begins from the parent's heads in the order of the conversion."""
    folder, _ = stages(workdir)["weighted-random", 1.0]
    orders = checkpoint.load_config(folder.checkpoints / "4")["head_orders"]
    assert sorted(orders) == ["cross_attention", "self_attention"]
    converted, parent = folder.read_description().parents
    found = outputs(workdir, like=workdir)
    query = "['params']['decoder']['layers']['cross_attention']['query']"
    ends, before, whole = (found[f"{name}{query}"] for name in (folder.name, converted, parent))
    np.testing.assert_array_equal(before[0], whole[0][:, orders["cross_attention"][0]])
    near = np.abs(ends - before).mean()
    assert near < 0.5 * np.abs(ends - whole).mean()


def test_a_cache_spread_over_layers_is_trained(workdir):
    folder, records = stages(workdir)["mean-weight-per_layer_budget", 1.0]
    config = Config(**checkpoint.load_config(folder.checkpoints / "4")["model"])
    heads = {name: config.kv_heads(name) for name in ("self_attention", "cross_attention")}
    # At the benchmark's lengths no more than 2 heads everywhere would take.
    assert sum(heads["self_attention"]) * 4 + sum(heads["cross_attention"]) * 16 <= 2 * 2 * (4 + 16)
    assert len({*heads["self_attention"], *heads["cross_attention"]}) > 1
    assert records["steps"] == 2


def test_a_network_from_scratch_is_trained_as_an_uptrained_one(workdir):
    """As many steps in all, with the same recipe, from which the rate of a step follows."""
    found = stages(workdir)
    (from_scratch, records), (mean, _) = found["none", 1.0], found["mean", 1.0]
    own, other = (checkpoint.load_config(f.checkpoints / "4") for f in (from_scratch, mean))
    assert (own["recipe"], own["model"]) == (other["recipe"], other["model"])

    # It builds on its own pretraining, whose first network has grouped heads already.
    (pretrained,) = from_scratch.read_description().parents
    arrays = outputs(workdir, like=workdir)
    keys = arrays[f"{pretrained}['params']['decoder']['layers']['self_attention']['key']"]
    assert keys.shape == (2, 16, 2, 4)

    # The divergence from a multi-head parent says nothing of it.
    assert "kl_to_parent" not in records
    assert (records["steps"], records["loss_spikes"], records["rollbacks"]) == (2, 0, 0)


def test_validation_is_of_the_plain_heads(workdir):
    """KL and loss are of what the checkpoint holds: the last logged loss is the stage's."""
    for method in ("weighted-random", "fuse"):
        folder, records = stages(workdir)[method, 1.0]
        seal = json.loads((folder.checkpoints / "4" / "checksums.json").read_text())
        assert seal["metrics"]["validation_loss"] == records["validation_loss"]


def test_a_teacher_keeps_the_network_near(workdir):
    found = stages(workdir)
    near, free = (found[name, 1.0][1] for name in ("mean-kl9", "mean"))
    assert 0 < near["kl_to_parent"] < 0.9 * free["kl_to_parent"]
