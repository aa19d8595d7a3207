"""Submit a graph of stages to SLURM: a job a stage, one array for stages that differ in their seed.

    pretrain [seeds] --aftercorr--> finetune [seeds] --aftercorr--> evaluate [seeds]
        `---------------------- afterany ----------------------> report

A job runs the worker as a child process, in the project's root. To preempt, requeue or cancel a job
SLURM sends SIGTERM to every process in it: the worker saves a checkpoint, and the job waits for it.
Before the time limit SLURM sends USR2 instead, which the job makes a SIGTERM for the worker. Then
the job asks to be requeued, unless SLURM is ending it anyway; in its next run the worker goes on.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gqa.runtime.errors import UserError
from gqa.runtime.private_folders import make_private
from gqa.runtime.regular_files import read_json

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = (sys.executable, "-m", "experiments.run.worker")
# Several nodes train on one batch, and share out the texts to generate. Conversion takes minutes on
# one, and timings are of one node's devices.
SPREAD = ("pretrain", "uptrain", "finetune", "evaluate")
REPORT = "gqa-report"  # a job's name begins so; others have that of their first stage's folder
# Exit statuses of a worker that SIGTERM stopped; the negative one, if it came before the worker
# could catch the signal.
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


def devices(config: ConfigDict) -> tuple[int, int]:
    """Return the devices of a stage that trains or generates: in all, and in each process."""
    local = max(1, config.slurm.gpus_per_node)
    return config.slurm.nodes * local, local


class Planned(NamedTuple):
    """One job to submit.

    Args:
        stages: the job's tasks; with several stages the job is an array.
        waits: for each task, the stages that it builds on and that are not finished.
    """

    stages: tuple
    waits: tuple[tuple, ...]


def check() -> None:
    """Raise a UserError where there is no SLURM."""
    for command in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(command) is None:
            raise UserError(
                f"--executor=slurm: no {command} on this machine; log in to one that submits to "
                "SLURM, or leave the flag out"
            )
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--executor=slurm: pip install -r requirements-slurm.txt")


def submit(
    stages: Sequence,
    workdir: Path,
    settings: dict[str, Any],
    report: Sequence[str],
    worker: Sequence[str] = WORKER,
) -> None:
    """Submit the stages that are neither finished nor in the queue, and print a line for each job.

    Args:
        stages: `experiments.graph.stage.Stage`s, parents first, each with its description written.
        workdir: a folder that every node has.
        settings: the config section `slurm`.
        report: the command of the last job, which runs however the others ended.
        worker: the command that runs a stage, whose folder is added to it.

    Raises:
        UserError: where there is no SLURM, or it refuses a job.
    """
    check()
    workdir = workdir.absolute()
    queue = _Queue(workdir)

    # A stage that an earlier command has submitted is not submitted again.
    done = {s.key for s in stages if s.folder(workdir).read_outcome() is not None}
    ids = {s.key: i for s in stages if s.key not in done and (i := queue.find(_name(s)))}
    for stage in stages:
        if stage.key in ids:
            print(f"{ids[stage.key]}  {stage.label}: {queue.state(ids[stage.key])} already")

    planned = plan_jobs(stages, done, ids)
    for job in planned:
        folders = [stage.folder(workdir) for stage in job.stages]
        kind = job.stages[0].kind
        options = settings | {"dependency": dependency(job, ids)}
        options["nodes"] = settings["nodes"] if kind in SPREAD else 1
        options["exclusive"] = kind == "benchmark"  # timings do not share a node
        calls = [([*worker, str(folder)], folder.checkpoints) for folder in folders]
        new = queue.submit([folder.name for folder in folders], calls, options)
        ids |= {stage.key: i for stage, i in zip(job.stages, new, strict=True)}
        _say(new, job.stages[0].label, options["dependency"])

    # Each set of stages has its own report, and jobs of other commands do not stand for it.
    keys = json.dumps(sorted(stage.key for stage in stages))
    report_name = f"{REPORT}-{hashlib.sha256(keys.encode()).hexdigest()[:8]}"
    before = queue.find(report_name)
    if before and not planned:
        print(f"{before}  report: {queue.state(before)} already")
        return

    # The report waits for whole arrays, hence the ids without the tasks' indices. It also waits for
    # an earlier report of the same stages: only one of them writes at a time.
    after = sorted({i.split("_")[0] for i in (*ids.values(), before) if i})
    options = settings | {"dependency": ":".join(["afterany", *after]) if after else "", "nodes": 1}
    _say(
        queue.submit([report_name], [(list(report), None)], options),
        "report",
        options["dependency"],
    )
    print(f"logs: {queue.folder}/JOB_0_log.out")


def _name(stage) -> str:
    return stage.folder(Path()).name


def _say(ids: list[str], label: str, dependency: str) -> None:
    job = ids[0] if len(ids) == 1 else f"{ids[0].split('_')[0]}_[0-{len(ids) - 1}]"
    others = f" and {len(ids) - 1} other seeds" if len(ids) > 1 else ""
    print(f"{job}  {label}{others}{f', {dependency}' if dependency else ''}", flush=True)


def plan_jobs(stages: Sequence, done: set[str], ids: dict[str, str]) -> list[Planned]:
    """Return the jobs that are still to be submitted, each after the jobs that it waits for.

    Stages share a job if they differ only in their seed and build on the same jobs.

    Args:
        done: keys of the stages that are finished.
        ids: for the key of each stage in the queue, its task there: `JOB` or `JOB_INDEX`.
    """
    home: dict[str, tuple] = {}  # the job of each stage that is not done
    jobs: dict[tuple, list] = {}  # the stages of each job to be submitted
    for stage in stages:
        if stage.key in done:
            continue
        if stage.key in ids:
            home[stage.key] = ("queued", ids[stage.key].split("_")[0])
            continue

        # Parents in different jobs make different jobs, because one array has one dependency.
        job = (_but_for_seed(stage), *(home.get(parent.key) for parent in stage.parents))
        home[stage.key] = job
        jobs.setdefault(job, []).append(stage)
    return [
        Planned(tuple(job), tuple(tuple(p for p in s.parents if p.key in home) for s in job))
        for job in jobs.values()
    ]


def _but_for_seed(stage) -> tuple:
    """Return a key that stages share if they differ only in their seed and their parents' seeds."""
    settings = json.dumps(_without_seed(stage.settings_json), sort_keys=True)
    return (stage.kind, settings, *(_but_for_seed(parent) for parent in stage.parents))


def _without_seed(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {key: _without_seed(value) for key, value in settings.items() if key != "seed"}


def dependency(job: Planned, ids: dict[str, str]) -> str:
    """Return SLURM's expression for what a job waits for; empty if it waits for nothing.

    A task waits for its counterpart alone where both arrays have the same seeds in the same order.
    """
    # One round for each kind of parent: an uptraining has a conversion and a pretraining. All tasks
    # of a job wait for equally many parents, because only such stages share a job.
    terms = []
    for parents in zip(*job.waits, strict=True):
        tasks = [ids[parent.key] for parent in parents]
        array = tasks[0].split("_")[0]
        if len(tasks) > 1 and tasks == [f"{array}_{i}" for i in range(len(tasks))]:
            terms.append(f"aftercorr:{array}")
        else:
            terms.append(":".join(["afterok", *dict.fromkeys(tasks)]))
    return ",".join(dict.fromkeys(terms))


class _Queue:
    """The jobs submitted for a workdir, kept in `slurm/jobs.json`, and their state in SLURM."""

    def __init__(self, workdir: Path):
        self.folder = workdir / "slurm"
        # submitit keeps in this folder the pickles that jobs load, which run as code.
        make_private(self.folder)
        self._file = self.folder / "jobs.json"
        # By stage folder: the task's id, and the job's name, lest another job has that id by now.
        self._jobs = read_jobs(self._file)
        names = sorted({job["name"] for job in self._jobs.values()})
        self._states = squeue(f"--name={','.join(names)}") if names else {}

    def find(self, name: str) -> str | None:
        """Return the id under which a stage, or a report, is pending or running, if it is."""
        job = self._jobs.get(name)
        return job["id"] if job and job["id"] in self._states else None

    def state(self, task: str) -> str:
        """Return SLURM's word for the state of a task, in lower case."""
        return self._states[task].lower()

    def submit(self, names: list[str], calls: list[tuple], options: dict) -> list[str]:
        """Submit `run_task` with each of `calls`, and remember the ids."""
        import submitit

        # A setting of 0 or "" is left to SLURM.
        executor = submitit.SlurmExecutor(self.folder)
        given = {key: value for key, value in options.items() if value}
        if "mem_gb" in given:
            given["mem"] = f"{given.pop('mem_gb')}GB"
        executor.update_parameters(
            time=given.pop("timeout_min", None),  # else submitit's five minutes
            job_name=names[0],
            ntasks_per_node=1,
            stderr_to_stdout=True,
            # A task has the node's share of the job to itself, not the one core it may be bound to.
            srun_args=["--kill-on-bad-exit=1", "--cpu-bind=none"],
            additional_parameters={"requeue": True, "kill-on-invalid-dep": "yes", "chdir": ROOT},
            **given,
        )
        try:
            with executor.batch():
                jobs = [executor.submit(run_task, *call) for call in calls]
        except submitit.core.utils.FailedJobError as error:
            said = " ".join(str(error).split())
            raise UserError(f"{said}; change what the config section slurm asks for") from error

        # Remember the ids at once: if this program is stopped now, the next command still knows
        # which stages are in the queue.
        ids = [job.job_id for job in jobs]
        new = {name: {"id": i, "name": names[0]} for name, i in zip(names, ids, strict=True)}
        self._jobs |= new
        self._write()
        return ids

    def _write(self) -> None:
        from experiments.workdir import write_whole  # only here: it takes a job seconds to import

        write_whole(self._file, json.dumps(self._jobs, indent=1))


def read_jobs(path: Path) -> dict[str, dict[str, str]]:
    """Read the id and the name of each job that was submitted; empty if there is no file.

    Raises:
        UserError: if the file holds anything else. Its words become arguments of SLURM's commands.
    """
    if not os.path.lexists(path):
        return {}
    jobs = read_json(path)
    patterns = {"id": r"\d+(_\d+)?", "name": r"\w[\w.-]*"}
    for job in jobs.values():
        fields = {key: isinstance(job, dict) and job.get(key) for key in patterns}
        words = {key: word for key, word in fields.items() if isinstance(word, str)}
        if not all(re.fullmatch(p, words.get(key, ""), re.A) for key, p in patterns.items()):
            raise UserError(f"{path}: {job!r:.80} is no job; delete the file if no job is queued")
    return jobs


def squeue(which: str) -> dict[str, str]:
    """Return the state of each task that is pending or running, by the task's id."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T", which]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        raise UserError(f"{' '.join(asked.stderr.split())}; wait until squeue answers")
    return dict(line.split() for line in asked.stdout.splitlines())


def run_task(command: list[str], checkpoints: Path | None) -> None:
    """Run the command of one stage inside its job, and exit with the exit status of the command.

    Args:
        checkpoints: where the stage saves checkpoints, if it is one that does. After a time limit,
            only a stage that has left something there is run again.
    """
    # SLURM sends USR2 to the worker as well, which would die of it: a child inherits the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    worker = subprocess.Popen(command)
    timed_out = []

    def stop(*_) -> None:
        timed_out.append(True)
        worker.terminate()

    # A USR2 that came meanwhile is delivered now, and `stop` passes it on to the worker.
    signal.signal(signal.SIGUSR2, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    status = worker.wait()
    if status == 0:
        return
    if status in STOPPED:
        # Run again, such a stage would reach the same time limit at the same place, for ever.
        if timed_out and not (checkpoints and checkpoints.exists()):
            sys.exit(
                "error: over the time limit with nothing to go on from; raise slurm.timeout_min"
            )

        import submitit

        job = submitit.JobEnvironment()
        if job.global_rank:
            return  # the first task decides, and must not be ended by this one's status
        # While SLURM ends the job itself this is COMPLETING; it also says what comes after.
        if squeue(f"--jobs={job.job_id}").get(job.job_id) == "RUNNING":
            subprocess.run(["scontrol", "requeue", job.job_id], check=True)
    sys.exit(status)
