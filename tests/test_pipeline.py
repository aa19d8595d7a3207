"""The whole job on a tiny network: complete, TensorFlow-free, resumable, and shared by variants."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import pipeline
from gqa import checkpoint, results, sharding, train
from gqa.model import Config

ROOT = Path(__file__).parent.parent
TINY = {
    "model.d_model": 16,
    "model.d_ff": 16,
    "model.num_heads": 4,
    "model.head_dim": 4,
    "model.num_encoder_layers": 1,
    "model.num_decoder_layers": 1,
    "model.vocab_size": 512,
    "text.packages": "absl-py,opt_einsum,optax,rich",
    "pretrain.steps": 6,
    "pretrain.every": 2,
    "pretrain.validation_examples": 8,
    "uptrain.alpha": 0.5,
    "convert.num_kv_heads_encoder": 4,
    "convert.num_kv_heads_decoder": 2,
    "convert.num_kv_heads_cross": 2,
    "finetune.tasks": "docstring_summary,files",
    "finetune.steps": 4,
    "finetune.every": 2,
    "finetune.validation_examples": 8,
    "evaluate.examples": 8,
    "evaluate.batch_size": 8,
    "benchmark.inputs_length": 16,
    "benchmark.targets_length": 4,
    "benchmark.repetitions": 2,
}
for section in ("pretrain", "finetune"):
    TINY |= {f"{section}.batch_size": 4, f"{section}.num_microbatches": 2}
    TINY |= {f"{section}.inputs_length": 32, f"{section}.targets_length": 11}
# The job in a process of its own, which then says whether TensorFlow came along.
SCRIPT = """
import sys
import launch
status = launch.main(sys.argv)
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
sys.exit(status)
"""


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


def command(workdir, settings, *more):
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    script = [sys.executable, "-c", SCRIPT, "--config=configs/gqa8.py", f"--workdir={workdir}"]
    return [*script, *overrides, *more]


def launch(workdir, settings, *more):
    """Run the job to its end; returns what it printed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command(workdir, settings, *more), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


def outputs(workdir):
    """Every stage's checkpoint arrays and timeless numbers, by its folder."""
    found = {}
    for folder in sorted((workdir / "stages").iterdir()):
        done = json.loads((folder / "done.json").read_text())
        if folder.name.startswith("benchmark"):
            found[folder.name] = [r["metric"] for r in done["records"]]
        else:
            found[folder.name] = done["records"]
        if done["checkpoint"]:
            path = folder / "checkpoints" / done["checkpoint"]
            config = Config(**checkpoint.load_config(path)["model"])
            shapes = train.abstract(config, sharding.make_mesh())._asdict() | {"data": None}
            del shapes["step"]
            arrays = checkpoint.load(path, shapes)
            leaves = jax.tree_util.tree_leaves_with_path(arrays)
            found |= {f"{folder.name}{jax.tree_util.keystr(p)}": x for p, x in leaves}
    return found


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
    stages = {path.name for path in (tmp_path / "stages").iterdir()}
    expected = {name: x for name, x in outputs(whole[0]).items() if name.split("[")[0] in stages}
    found = outputs(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if hasattr(value, "shape"):
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        else:
            assert value == expected[name], name
