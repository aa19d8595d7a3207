"""Work that is done is not done again: longer stages go on, others are only measured again."""

import json

import pytest

from experiments.stages.folder import StageFolder
from tests.support.jobs import TINY, differences, launch, outputs

SETTINGS = TINY | {
    "pretrain.steps": 4,
    "pretrain.every": 2,
    "finetune.tasks": "docstring_summary",
    "finetune.steps": 2,
    "finetune.every": 1,
    "uptrain.alpha": 0.0,
    "convert.num_kv_heads_self_attention": 4,
    "convert.num_kv_heads_cross_attention": 4,
}


def folders(workdir, kind):
    """The folders of a kind of stages, by the number of steps and the validation's examples."""
    found = {}
    for path in (workdir / "stages").glob(f"{kind}-*"):
        recipe = StageFolder(path).load_description().settings.recipe
        found[recipe.steps, recipe.validation_examples, recipe.every] = StageFolder(path)
    return found


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A pretraining of 4 steps and a fine-tuning of 2."""
    workdir = tmp_path_factory.mktemp("short")
    launch(workdir, SETTINGS, "--stage=finetune")
    return workdir


def test_more_steps_go_on_and_end_as_if_they_had_been_asked_for_at_once(short, tmp_path):
    longer = SETTINGS | {"pretrain.steps": 8}
    printed = launch(short, longer, "--stage=pretrain")
    assert "begins with the checkpoints of pretrain-" in printed
    assert "step 2/8" not in printed
    assert "step 6/8" in printed
    launch(tmp_path, longer, "--stage=pretrain")
    assert differences(outputs(short, like=tmp_path), outputs(tmp_path)) == []


def test_a_fine_tuning_goes_on_with_its_best_checkpoint_too(short, tmp_path):
    longer = SETTINGS | {"finetune.steps": 5}
    printed = launch(short, longer, "--stage=finetune")
    assert "begins with the checkpoints of finetune-" in printed
    launch(tmp_path, longer, "--stage=finetune")
    assert differences(outputs(short, like=tmp_path), outputs(tmp_path)) == []


def test_another_validation_measures_again_and_trains_nothing(short):
    (before,) = [f for key, f in folders(short, "pretrain").items() if key == (4, 8, 2)]
    changes = {"pretrain.validation_examples": 5, "pretrain.every": 3}
    printed = launch(short, SETTINGS | changes, "--stage=pretrain")
    assert "accuracy" not in printed  # no step was shown
    after = folders(short, "pretrain")[4, 5, 3]
    mine, theirs = (f.read_outcome().records for f in (after, before))
    assert [r["n"] for r in mine if r["metric"] == "validation_loss"] == [5]
    assert [r["n"] for r in theirs if r["metric"] == "validation_loss"] == [8]
    assert mine[0]["value"] != theirs[0]["value"]
    seals = [json.loads((f.result() / "checksums.json").read_text()) for f in (before, after)]
    params = [{n: x for n, x in s["files"].items() if "params" in n} for s in seals]
    assert params[0] == params[1]


def test_memory_for_time_changes_no_stage(short):
    changes = {
        "pretrain.num_microbatches": 1,
        "model.remat": "full",
        "finetune.num_microbatches": 1,
    }
    printed = launch(short, SETTINGS | changes, "--stage=pretrain")
    assert "done before" in printed
