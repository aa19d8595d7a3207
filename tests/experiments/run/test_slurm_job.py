"""A sweep on a real SLURM ends as it does here, also if a job of it is requeued."""

import json
import subprocess
import time

import pytest

from tests.experiments.run.test_slurm_cluster import answers
from tests.support.jobs import TINY, differences, launch, outputs

SWEEP = "configs/sweeps/groups.py"
SECONDS = 400


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Two seeds of the multi-head network alone: six stages and a timing."""
    folder = tmp_path_factory.mktemp("files")
    for split in ("train", "validation", "test"):
        rows = [f"{split} zahl {i}\tnumber {i} of {split}" for i in range(40)]
        (folder / f"{split}.tsv").write_text("\n".join(["de\ten", *rows]) + "\n")
    own = {f"files.{path.stem}": path for path in folder.iterdir()}
    own |= {"files.source": "de", "files.target": "en", "files.metrics": "f1"}
    own |= {
        "pretrain.task": "files",
        "finetune.tasks": "files",
        "pretrain.steps": 40,
        "model.vocab_size": 480,
    }
    own |= {"sweep.groups.kv_heads": 0, "sweep.groups.alphas": "0.0,", "sweep.groups.seeds": "0,1"}
    changed = (
        "uptrain.alpha",
        "convert.num_kv_heads_self_attention",
        "convert.num_kv_heads_cross_attention",
    )
    return {key: value for key, value in TINY.items() if key not in changed} | own


def queue(workdir):
    """The state of each of the workdir's tasks that are pending or running, by stage."""
    jobs = json.loads((workdir / "slurm" / "jobs.json").read_text())
    command = ["squeue", "--noheader", "--array", "--format=%i %T"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    states = dict(line.split() for line in lines)
    return {name: states[job["id"]] for name, job in jobs.items() if job["id"] in states}


@pytest.mark.skipif(
    not answers(), reason="no submitit, or no SLURM answers; see tests/start_slurm.sh"
)
def test_a_sweep_on_a_cluster_ends_as_one_here(settings, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    launch(here, settings, config=SWEEP)
    printed = launch(there, settings, "--executor=slurm", config=SWEEP)
    assert "pretrain (nano, 4 KV heads, seed 0) and 1 other seeds" in printed
    jobs = json.loads((there / "slurm" / "jobs.json").read_text())
    assert len(jobs) == 7 + 1  # and the report

    requeued, until = None, time.monotonic() + SECONDS
    while queue(there):
        assert time.monotonic() < until, queue(there)
        begun = [p for p in there.glob("stages/pretrain-*") if (p / "checkpoints").exists()]
        if begun and requeued is None:
            requeued = begun[0].name
            subprocess.run(["scontrol", "requeue", jobs[requeued]["id"]], check=True)
        time.sleep(0.2)
    assert requeued
    assert differences(outputs(there), outputs(here)) == []
    assert "MHA" in (there / "report.md").read_text()
    again = launch(there, settings, "--executor=slurm", config=SWEEP)
    assert "pretrain" not in again  # nothing is left but a report
