"""The whole job on a tiny network: complete, TensorFlow-free, resumable, and shared by variants."""

import json
import random
import signal
import subprocess
import time

import pytest

from experiments import pipeline
from gqa import checkpoint, results
from tests.jobs import ROOT, TINY, command, differences, launch, outputs


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


def kill_during(label, workdir, settings, delay):
    """Start the job and SIGKILL it `delay` seconds after the stage called `label` began."""
    with subprocess.Popen(
        command(workdir, settings),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith(f"{label} (") and ": in " in line:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail(f"{label} never began:\n" + "".join(printed))
    assert process.returncode == -signal.SIGKILL


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
    for figure in ("quality_time.png", "pretraining_loss.png"):
        assert (workdir / figure).read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("pretrain-*/events.*"))
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


def test_a_second_variant_reuses_the_parent(whole, files):
    workdir, _ = whole
    before = {folder.name for folder in (workdir / "stages").iterdir()}
    changed = {
        "convert.num_kv_heads_decoder": 1,
        "convert.num_kv_heads_cross": 1,
        "uptrain.alpha": 0.0,
    }
    printed = launch(workdir, TINY | files | changed)
    new = {
        folder.name.split("-")[0]
        for folder in (workdir / "stages").iterdir()
        if folder.name not in before
    }
    assert new == {"convert", "uptrain", "finetune", "evaluate", "benchmark"}
    assert "pretrain (nano, 4 KV heads, seed 0): done before" in printed
    report = (workdir / "report.md").read_text()
    assert "GQA-2" in report
    assert "MQA" in report


def test_any_checkpoint_can_be_scored_again(whole, files):
    workdir, _ = whole
    folder = next((workdir / "stages").glob("finetune-*"))
    printed = launch(
        workdir, TINY | files, "--stage=evaluate", f"--checkpoint={folder / 'checkpoints'}"
    )
    config = checkpoint.load_config(folder / "checkpoints")
    assert f"evaluate {config['task']}" in printed
    assert "headline" in printed


@pytest.mark.parametrize("seed", [0])
def test_a_job_killed_in_every_stage_ends_the_same(whole, files, tmp_path, seed):
    rng = random.Random(seed)
    for label in (
        "pretrain",
        "convert",
        "uptrain",
        "finetune files",
        "evaluate files",
        "benchmark",
    ):
        kill_during(label, tmp_path, TINY | files, delay=rng.random())
    launch(tmp_path, TINY | files)
    assert differences(outputs(tmp_path), outputs(whole[0], like=tmp_path)) == []
