"""On a real SLURM: arrays, requeues, failures.

`tests/start_slurm.sh` starts one on this machine. The stages run a small program instead of the
true worker, with the same contract: `done.json`, and exit status 143 after SIGTERM.
"""

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import base
from experiments.run import slurm
from gqa.runtime.errors import UserError
from tests.experiments.run.test_slurm import chains, stage

with contextlib.suppress(ImportError):  # optional, and it resets logging: not while pytest captures
    importlib.import_module("submitit")

WORKER = """
import json, pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[1])
log = open(folder / "log", "a", buffering=1)
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(log.write("TERM\\n")))
log.write("start\\n")
print("here I am")
needs = (folder / "needs").read_text().split()
assert all((folder.parent / name / "done.json").exists() for name in needs)
while (folder / "wait").exists():
    time.sleep(0.05)
    if signals:
        (folder / "checkpoints").mkdir(exist_ok=True)
        time.sleep(0.5)  # a checkpoint takes its time, and a second signal would interrupt it
        log.write("saved\\n")
        sys.exit(143)
if (folder / "fail").exists():
    sys.exit("error: a mistake")
outcome = {"records": [], "checkpoint": None, "provenance": {}, "seconds": 1.0}
(folder / "done.json").write_text(json.dumps(outcome))
"""


def answers():
    """Whether a SLURM with a node answers here, and there is what submits to it."""
    if shutil.which("sinfo") is None or importlib.util.find_spec("submitit") is None:
        return False
    asked = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=10, check=False)
    return asked.returncode == 0 and bool(asked.stdout)


real = pytest.mark.skipif(
    not answers(), reason="no submitit, or no SLURM answers; see tests/start_slurm.sh"
)


class Cluster:
    """Submits stages with the small program, and looks at what becomes of them."""

    def __init__(self, folder):
        self.workdir = folder / "work dir"
        self.program = folder / "worker.py"
        self.program.write_text(WORKER)

    def prepare(self, stages, **files):
        """Write each stage's folder; `files` names what else lies in those of a kind."""
        for each in stages:
            folder = each.folder(self.workdir).path
            folder.mkdir(parents=True)
            (folder / "needs").write_text(" ".join(p.folder(Path()).name for p in each.parents))
            if each.kind in files:
                (folder / files[each.kind]).touch()

    def submit(self, stages, **settings):
        report = [sys.executable, "-c", f"open({str(self.workdir / 'report.md')!r}, 'w')"]
        worker = [sys.executable, str(self.program)]
        slurm.submit(
            stages, self.workdir, base.get_config().slurm.to_dict() | settings, report, worker
        )

    def id(self, each):
        jobs = json.loads((self.workdir / "slurm" / "jobs.json").read_text())
        return jobs[each.folder(Path()).name]["id"]

    def log(self, each):
        path = each.folder(self.workdir).path / "log"
        return path.read_text().split() if path.exists() else []

    def said(self, each):
        """What its job wrote, in lines."""
        path = self.workdir / "slurm" / f"{self.id(each)}_0_log.out"
        return path.read_text().splitlines()

    def waits_until(self, true):
        until = time.monotonic() + 60
        while not true():
            if time.monotonic() > until:
                logs = [p.read_text() for p in sorted((self.workdir / "slurm").glob("*.out"))]
                queue = subprocess.run(
                    ["squeue"], capture_output=True, text=True, check=False
                ).stdout
                pytest.fail("\n".join(["not within 60 s", queue, *logs]))
            time.sleep(0.1)

    def finished(self, stages):
        return all(s.folder(self.workdir).read_outcome() is not None for s in stages)

    def left(self):
        """The jobs that are pending or running."""
        path = self.workdir / "slurm" / "jobs.json"
        jobs = json.loads(path.read_text()).values() if path.exists() else []
        names = {job["name"] for job in jobs}
        return slurm.squeue(f"--name={','.join(names)}").keys() & {job["id"] for job in jobs}


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    for job in cluster.left():
        subprocess.run(["scancel", job], check=True)


@real
def test_seeds_run_in_order_survive_a_requeue_and_are_submitted_once(cluster, capsys):
    stages = chains([0, 1])
    cluster.prepare(stages, pretrain="wait")
    cluster.submit(stages)
    first = capsys.readouterr().out
    assert [line.split("  ")[0].split("_", 1)[-1] for line in first.splitlines()[:3]] == [
        "[0-1]"
    ] * 3
    cluster.waits_until(lambda: all(cluster.log(s) for s in stages[::3]))
    cluster.submit(stages)
    again = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in again[:6:3]] == [["running", "already"]] * 2
    assert len(again) == 7
    assert all(line.endswith(" already") for line in again)

    subprocess.run(["scontrol", "requeue", cluster.id(stages[0])], check=True)
    subprocess.run(["scancel", "--signal=USR2", cluster.id(stages[3])], check=True)
    for each in stages[::3]:
        cluster.waits_until(lambda each=each: len(cluster.log(each)) == 4)
        assert cluster.log(each) == ["start", "TERM", "saved", "start"]
        assert cluster.said(each).count("here I am") == 2
        (each.folder(cluster.workdir).path / "wait").unlink()
    cluster.waits_until((cluster.workdir / "report.md").exists)
    assert cluster.finished(stages)
    assert all(cluster.log(each) == ["start"] for each in stages if each.kind != "pretrain")
    cluster.waits_until(lambda: not cluster.left())


@real
def test_a_failure_ends_what_builds_on_it(cluster):
    stages = chains([0])
    cluster.prepare(stages, pretrain="fail")
    cluster.submit(stages)
    cluster.waits_until((cluster.workdir / "report.md").exists)
    cluster.waits_until(lambda: not cluster.left())
    assert [cluster.log(s) for s in stages] == [["start"], [], []]
    job = cluster.id(stages[0])
    assert "JobState=FAILED" in shown(job)
    said = cluster.said(stages[0])
    assert "error: a mistake" in said
    assert not any("Traceback" in line for line in said)

    (stages[0].folder(cluster.workdir).path / "fail").unlink()
    cluster.submit(stages)
    cluster.waits_until(lambda: cluster.finished(stages[:1]))


@real
def test_a_time_limit_that_leaves_nothing_to_go_on_from_is_a_failure(cluster):
    stages = [stage("evaluate", 0)]
    cluster.prepare(stages, evaluate="wait")
    program = cluster.program.read_text()
    cluster.program.write_text(program.replace('(folder / "checkpoints")', "pathlib.Path()"))
    cluster.submit(stages, timeout_min=5)
    job = cluster.id(stages[0])
    assert "TimeLimit=00:05:00" in shown(job)
    cluster.waits_until(lambda: cluster.log(stages[0]))
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    cluster.waits_until((cluster.workdir / "report.md").exists)
    assert "JobState=FAILED" in shown(job)
    assert any("error: over the time limit" in line for line in cluster.said(stages[0]))


@real
def test_a_job_told_that_it_will_be_preempted_is_requeued_but_a_cancelled_one_is_not(cluster):
    stages = [stage("pretrain", 0)]
    cluster.prepare(stages, pretrain="wait")
    cluster.submit(stages)
    cluster.waits_until(lambda: cluster.log(stages[0]))
    subprocess.run(["scancel", "--signal=TERM", cluster.id(stages[0])], check=True)
    cluster.waits_until(lambda: len(cluster.log(stages[0])) == 4)
    subprocess.run(["scancel", cluster.id(stages[0])], check=True)
    cluster.waits_until((cluster.workdir / "report.md").exists)
    assert "JobState=CANCELLED" in shown(cluster.id(stages[0]))
    assert cluster.log(stages[0]) == ["start", "TERM", "saved"] * 2


@real
def test_a_benchmark_has_the_node_to_itself(cluster, monkeypatch, tmp_path):
    stages = [stage("benchmark", 0)]
    cluster.prepare(stages)
    monkeypatch.chdir(tmp_path)  # a job finds its code all the same
    cluster.submit(stages)
    job = shown(cluster.id(stages[0]))
    assert "OverSubscribe=NO" in job
    assert "TimeLimit=UNLIMITED" in job
    cluster.waits_until(lambda: cluster.finished(stages))


@real
def test_several_nodes_have_a_task_each(cluster):
    """Which waits in the queue where there is one node."""
    stages = [stage("pretrain", 0)]
    cluster.prepare(stages)
    cluster.submit(stages, nodes=3)
    job = shown(cluster.id(stages[0]))
    assert "NumNodes=3" in job
    assert "NtasksPerN:B:S:C=1:" in job


@real
def test_what_slurm_refuses_is_said_in_one_line(cluster, capfd):
    stages = [stage("pretrain", 0)]
    cluster.prepare(stages)
    with pytest.raises(UserError, match=r"invalid partition.*config section slurm"):
        cluster.submit(stages, partition="nowhere")


def shown(job):
    command = ["scontrol", "show", "job", job]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
