"""The whole job on a tiny network: complete, TensorFlow-free, resumable, and shared by variants."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from configs import docstrings
from experiments import pipeline
from experiments.stages.folder import StageFolder
from experiments.workdir import lock
from gqa.checkpoints import checkpoint
from gqa.evaluation import results
from gqa.runtime.errors import UserError
from tests.support.jobs import ENVIRONMENT, ROOT, TINY, command, differences, launch, outputs

# What a sweep sets itself.
ONE_POINT = (
    "uptrain.alpha",
    "convert.num_kv_heads_self_attention",
    "convert.num_kv_heads_cross_attention",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three splits of a task of the user's own."""
    folder = tmp_path_factory.mktemp("files")
    for split in ("train", "validation", "test"):
        rows = [{"de": f"{split} zahl {i}", "en": [f"number {i}"]} for i in range(12)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    names = {f"files.{path.stem}": path for path in folder.iterdir()}
    return names | {"files.source": "de", "files.target": "en", "files.metrics": "bleu,f1"}


def end_during(label, workdir, settings, delay, signum):
    """Start the job and signal it `delay` seconds after the stage called `label` began."""
    with subprocess.Popen(
        command(workdir, settings),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith(f"{label} (") and ": in " in line:
                time.sleep(delay)
                begun = time.monotonic()
                process.send_signal(signum)
                break
        else:
            pytest.fail(f"{label} never began:\n" + "".join(printed))
        rest = process.stdout.read()
    assert time.monotonic() - begun < 30
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert process.returncode == 128 + signum
        assert rest.splitlines()[-1].startswith("stopped: ")
        assert "the same command goes on from" in rest


@pytest.fixture(scope="module")
def whole(tmp_path_factory, files):
    """One uninterrupted job: its workdir and what it printed."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, launch(workdir, TINY | files)


def test_the_job_leaves_results_report_and_figures(whole):
    workdir, printed = whole
    records = results.read(workdir / "results.jsonl")
    kinds = {record["stage"] for record in records}
    assert kinds == set(pipeline.KINDS) - {"report"}
    scored = {
        (r["variant"]["num_kv_heads"], r["task"], r["metric"])
        for r in records
        if r["stage"] == "evaluate"
    }
    for heads in (4, 2):
        assert {(heads, "files", "bleu"), (heads, "docstring_summary", "rougeL")} <= scored
        assert {(heads, "files", "test_loss_other_input"), (heads, "files", "headline")} <= scored
    assert {"commit", "device", "time", "value", "unit"} <= records[0].keys()
    assert "GQA-2" in (workdir / "report.md").read_text()
    for figure in ("quality_time", "pretraining_loss", "learning_curves"):
        assert (workdir / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (workdir / f"{figure}.svg").read_text()
    assert list((workdir / "tensorboard").glob("pretrain-*/*tfevents*"))
    assert "validation loss" in printed
    predictions = list(workdir.glob("stages/evaluate-*/predictions.jsonl"))
    assert len(predictions) == 4
    assert all(len(path.read_text().splitlines()) == 8 for path in predictions)


def test_the_cache_halves_and_conversion_keeps_the_rest(whole):
    workdir, _ = whole
    sizes = {
        r["variant"]["num_kv_heads"]: r["value"]
        for r in results.read(workdir / "results.jsonl")
        if r["metric"] == "kv_cache_bytes"
    }
    assert sizes[4] == 2 * sizes[2] == 2 * 4 * 4 * (16 + 4) * 4


def test_a_sweep_does_what_is_not_done_yet(whole, files, tmp_path):
    """Two stages at a time, beside what the single job has left."""
    workdir = shutil.copytree(whole[0], tmp_path / "runs")
    before = {folder.name for folder in (workdir / "stages").iterdir()}
    axes = {"kv_heads": "2,1", "alphas": 0.5, "methods": "mean,none", "tasks": "files"}
    axes["seeds"] = "0,"
    sweep = {f"sweep.groups.{axis}": value for axis, value in axes.items()}
    kept = {key: value for key, value in TINY.items() if key not in ONE_POINT}
    printed = launch(workdir, kept | files | sweep, "--jobs=2", config="configs/sweeps/groups.py")
    new = [f.name.split("-")[0] for f in (workdir / "stages").iterdir() if f.name not in before]
    converted = ["benchmark", "convert", "uptrain", "evaluate", "finetune"]
    from_scratch = ["pretrain", "uptrain", "evaluate", "finetune"]
    assert sorted(new) == sorted([*converted, *from_scratch * 2])
    assert "pretrain (nano, 4 KV heads, seed 0): done before" in printed
    assert "1 of 21 stages left, about " in printed
    report = (workdir / "report.md").read_text()
    assert "MQA mean, alpha 0.5" in report
    assert "MQA from scratch, alpha 0.5" in report
    assert "Stability of training" in report
    assert "How many KV heads?" in report
    assert "<table" in (workdir / "report.html").read_text()
    titles = {path.name for path in (workdir / "tensorboard").iterdir()}
    assert any(name.startswith("uptrain-nano-1_KV_heads-mean-alpha_0.5-seed_0-") for name in titles)


def test_a_dry_run_shows_what_is_done_and_does_nothing(whole, files):
    workdir, _ = whole
    before = sorted((path, path.stat().st_mtime) for path in workdir.rglob("*"))
    printed = launch(workdir, TINY | files | {"evaluate.examples": 4}, "--dry-run")
    assert printed.count(" done ") == 8
    assert printed.count(" to do ") == 4
    assert "4 of 12 stages left" in printed
    assert sorted((path, path.stat().st_mtime) for path in workdir.rglob("*")) == before


def test_a_report_leaves_out_what_its_command_did_not_plan(whole, files, tmp_path):
    """Scores of other examples are not those of this command; its earlier stages are the same."""
    workdir = shutil.copytree(whole[0], tmp_path / "runs")
    page = (workdir / "report.md").read_text()
    with lock(workdir / "lock", "the workdir"):  # a report reads alone
        launch(workdir, TINY | files | {"evaluate.examples": 4}, "--stage=report")
    other = (workdir / "report.md").read_text()
    assert "Conversion and uptraining" in other
    assert "No task has been evaluated yet." in other
    assert "## Predictions" not in other
    launch(workdir, TINY | files, "--stage=report")
    assert (workdir / "report.md").read_text() == page


def test_a_workdir_is_for_one_process(whole, files):
    with lock(whole[0] / "lock", "the workdir"):
        said = launch(whole[0], TINY | files, status=2)
        assert f"is in use by process {os.getpid()} on " in said


def test_a_damaged_checkpoint_is_named_and_replaced_if_wished(whole, files, tmp_path):
    """Of a stage that others build on: found by the next of them."""
    workdir = shutil.copytree(whole[0], tmp_path / "runs")
    (folder,) = (workdir / "stages").glob("uptrain-*")
    for child in map(StageFolder, (workdir / "stages").glob("finetune-*")):
        if folder.name in child.load_description().parents:
            child.discard_outcome()
            shutil.rmtree(child.checkpoints)
    step = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    damaged = max((step / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    said = launch(workdir, TINY | files, status=2)
    last = said.splitlines()[-1]
    assert str(damaged.relative_to(step)) in last
    assert "--config.checkpoint.on_damage=previous" in last
    launch(workdir, TINY | files | {"checkpoint.on_damage": "previous"})
    assert step.with_name(f"{step.name}.damaged").exists()
    assert differences(outputs(workdir), outputs(whole[0])) == []


def test_any_checkpoint_can_be_scored_again(whole, files):
    workdir, _ = whole
    folder = next((workdir / "stages").glob("finetune-*"))
    printed = launch(
        workdir, TINY | files, "--stage=evaluate", f"--checkpoint={folder / 'checkpoints'}"
    )
    config = checkpoint.load_config(folder / "checkpoints")
    assert f"evaluate {config['task']}" in printed
    starts = ("task  ", f"{config['task']}  ")
    header, *rows = [line.split() for line in printed.splitlines() if line.startswith(starts)]
    assert header == ["task", "metric", "score", "unit", "examples"]
    assert {"headline", "test_loss"} <= {row[1] for row in rows}
    assert f"scores: {workdir / 'results.jsonl'}" in printed


def test_a_report_without_the_text_says_what_is_missing(tmp_path, files):
    """Without the text's hash in their keys, its results cannot be found among others."""
    config = docstrings.get_config("pico")
    settings = {key: str(value) if key in files else value for key, value in (TINY | files).items()}
    config.update_from_flattened_dict(settings)
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(UserError, match=f"^{tmp_path}/text: the text of this config is missing"):
        pipeline.run(config, tmp_path, "report", pipeline.Options())


def test_a_job_ended_in_every_stage_ends_the_same(whole, files, tmp_path):
    rng = random.Random(0)
    for label, signum in (
        ("pretrain", signal.SIGKILL),
        ("convert", signal.SIGKILL),
        ("uptrain", signal.SIGTERM),
        ("finetune files", signal.SIGKILL),
        ("evaluate files", signal.SIGTERM),
        ("benchmark", signal.SIGKILL),
    ):
        end_during(label, tmp_path, TINY | files, rng.random(), signum)
    launch(tmp_path, TINY | files)
    assert differences(outputs(tmp_path), outputs(whole[0], like=tmp_path)) == []
