"""Run a graph of stages on this machine, one at a time or several, and say what is left."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from experiments.graph.stage import Stage, ancestors
from experiments.run import worker
from experiments.stages.settings import FinetuneSettings, PretrainSettings
from gqa.runtime import hardware
from gqa.runtime.command_line import USER_ERROR
from gqa.runtime.distributed import is_several
from gqa.runtime.errors import UserError

POLL_SECONDS = 0.1
ROOT = Path(__file__).parent.parent.parent
WORKER = (sys.executable, "-m", "experiments.run.worker")  # and the folders of stages
# At most this many stages run in turn in one process, which starts and compiles once for all.
CHAIN = 16


def run(stages: list[Stage], workdir: Path, jobs: int) -> None:
    """Run the stages that are not finished, `jobs` at a time.

    If a stage fails, the stages that build on it are left out and all others are run. Where several
    processes run together, the first failure ends the run.

    Raises:
        UserError: at the end, if any stage failed.
    """
    folders = {stage.key: worker.describe(stage, workdir) for stage in stages}
    failed: dict[str, Exception] = {}
    todo = []
    for stage in stages:
        if folders[stage.key].read_outcome() is None:
            todo.append(stage)
        else:
            print(f"{stage.label}: done before, in {folders[stage.key]}")
            # A kill may have come between the outcome and its publication. For a finished stage
            # this call does no more than publish.
            worker.run(folders[stage.key])

    if jobs == 1:
        _one_by_one(todo, stages, workdir, failed)
    else:
        _several(todo, stages, workdir, jobs, failed)

    if failed:
        first = next(iter(failed.values()))
        if len(failed) == 1:
            raise first
        # The cause is kept, because the main program knows a flag that helps against some errors.
        raise UserError(
            f"{len(failed)} stages failed or build on one that did; the first: {first}"
        ) from first


def _one_by_one(todo, stages, workdir, failed) -> None:
    for i, stage in enumerate(todo):
        if any(a.key in failed for a in ancestors(stage)):
            failed[stage.key] = UserError("it builds on a stage that failed")
            continue
        _announce(stage, todo[i:], stages, workdir)
        try:
            worker.run(stage.folder(workdir))
        except UserError as error:
            # Other processes may wait in the middle of the stage, knowing nothing of the error.
            if is_several():
                raise
            failed[stage.key] = error
            print(f"{stage.label}: failed: {error}", flush=True)


class Running(NamedTuple):
    """A process that runs stages in turn, the cores it is bound to, and the file of its stderr."""

    stages: dict[str, Stage]
    process: subprocess.Popen
    cores: frozenset[int]
    errors: TextIO


def _several(todo, stages, workdir, jobs, failed) -> None:
    """Start each stage as soon as its parents are finished and a job is free."""
    waiting = {stage.key: stage for stage in todo}
    # The scheduling below asks for these keys many times a second, and a key is a hash.
    above = {key: {a.key for a in ancestors(stage)[1:]} for key, stage in waiting.items()}
    running: dict[str, Running] = {}  # by the key of each one's first stage
    shares = _shares(jobs)
    try:
        while waiting or running:
            for key in [key for key in waiting if above[key] & failed.keys()]:
                failed[key] = UserError("it builds on a stage that failed")
                del waiting[key]

            # Fill the free jobs. What waits changes with each start, so the next stage is looked
            # for anew.
            while (key := _next(waiting, above, running, jobs)) is not None:
                left = [*(waiting | _busy(running)).values()]
                _announce(waiting[key], left, stages, workdir, jobs)
                chain = _chain(key, waiting, above, _busy(running), jobs)
                running[key] = _start(chain, workdir, shares.pop())
                waiting = {k: stage for k, stage in waiting.items() if k not in chain}

            # A process that failed gives back the stages that it had not begun: they wait again.
            for key in [key for key, each in running.items() if each.process.poll() is not None]:
                ended = running.pop(key)
                shares.append(ended.cores)
                waiting = _end(ended, workdir, failed) | waiting
            time.sleep(POLL_SECONDS)
    finally:
        # All processes are told to end before any is waited for, so that they save at once.
        for each in running.values():
            each.process.terminate()
        for each in running.values():
            each.process.wait()
            each.errors.close()


def _next(waiting: dict, above: dict, running: dict[str, Running], jobs: int) -> str | None:
    """Return the key of the first stage that can be started now; None if there is none."""
    unfinished = waiting.keys() | _busy(running).keys()
    ready = (key for key in waiting if not above[key] & unfinished)
    return next((key for key in ready if _room(waiting[key], waiting, running, jobs)), None)


def _busy(running: dict[str, Running]) -> dict[str, Stage]:
    return {key: stage for each in running.values() for key, stage in each.stages.items()}


def _end(ended: Running, workdir: Path, failed: dict[str, Exception]) -> dict[str, Stage]:
    """Return the stages that an ended process has not finished, without the one that failed."""
    # A worker runs its stages in turn and ends at the first that fails: the first that is left.
    left = {k: s for k, s in ended.stages.items() if s.folder(workdir).read_outcome() is None}
    error = _outcome(ended)
    if error is None and left:
        error = RuntimeError("its process ended without a result")
    if error is not None:
        key = next(iter(left or ended.stages))
        failed[key] = error
        print(f"{ended.stages[key].label}: failed: {error}", flush=True)
        left.pop(key, None)
    return left


def _room(stage: Stage, waiting: dict, running: dict, jobs: int) -> bool:
    """Return whether a stage can start now.

    Timings come last and alone, so that nothing disturbs them.
    """
    if stage.kind == "benchmark":
        return not running and all(other.kind == "benchmark" for other in waiting.values())
    return len(running) < jobs


def _chain(key: str, waiting: dict, above: dict, busy: dict, jobs: int) -> dict[str, Stage]:
    """Return the stages that one process runs in turn: the stage `key` and others of its kind.

    Stages with the same parents come first, because they share compiled programs. The chain is
    short enough that every job gets some stages. Pretraining, which is long, and timings, which run
    alone, have a process each.
    """
    kind = waiting[key].kind
    if kind in ("pretrain", "benchmark"):
        return {key: waiting[key]}
    unfinished = waiting.keys() | busy.keys()
    ready = [k for k, s in waiting.items() if s.kind == kind and not above[k] & unfinished]
    ready.sort(key=lambda k: above[k] != above[key])

    # Example: with 10 stages that are ready and 4 jobs, this chain has 3 stages.
    return {k: waiting[k] for k in ready[: min(CHAIN, -(-len(ready) // jobs))]}


def _shares(jobs: int) -> list[frozenset[int]]:
    """Return the cores that each job is bound to, so that no two processes wait for one core.

    The sets are empty where there are fewer cores than jobs, or the system cannot bind a process.
    """
    # Example: 8 cores and 3 jobs give the cores 0-1, 2-4 and 5-7.
    cores = hardware.cores()
    n = len(cores) if len(cores) >= jobs and hasattr(os, "sched_setaffinity") else 0
    return [frozenset(cores[i * n // jobs : (i + 1) * n // jobs]) for i in range(jobs)]


def _start(chain: dict[str, Stage], workdir: Path, cores: frozenset[int]) -> Running:
    folders = [str(stage.folder(workdir.absolute())) for stage in chain.values()]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read when the process has ended)
    process = subprocess.Popen([*WORKER, *folders], cwd=ROOT, stderr=errors)

    # A benchmark has all cores, because no other process runs beside it.
    alone = next(iter(chain.values())).kind == "benchmark"
    if cores and not alone:
        os.sched_setaffinity(process.pid, cores)  # before it has any threads
    return Running(chain, process, cores, errors)


def _outcome(ended: Running) -> Exception | None:
    """Return the error that a process ended by; None if it succeeded."""
    with ended.errors as file:
        file.seek(0)
        lines = file.read().splitlines()

    # The worker prints a mistake of the user in one line, which becomes an error here. Other
    # failures are defects, whose traceback is shown whole.
    code = ended.process.returncode
    said = [line for line in lines if line.startswith("error: ")]
    if code == USER_ERROR and said:
        return UserError(said[-1].removeprefix("error: "))
    if code == 0:
        return None
    print("\n".join(lines), file=sys.stderr, flush=True)
    label = next(iter(ended.stages.values())).label
    return RuntimeError(f"{label}: its process ended with status {code}")


def _announce(stage, left, stages, workdir, jobs: int = 1) -> None:
    print(f"{stage.label}: in {stage.folder(workdir)}; {remaining(left, stages, workdir, jobs)}")
    sys.stdout.flush()


def remaining(left: list[Stage], stages: list[Stage], workdir: Path, jobs: int = 1) -> str:
    """Say how many stages are left, and estimate their time from the stages that are finished."""
    rates = _rates(stages, workdir)
    known = [rates[_pace(s)] * _work(s) for s in left if _pace(s) in rates]
    text = f"{len(left)} of {len(stages)} stages left"
    if known:
        text += f", about {_duration(sum(known) / jobs)}"
        if len(known) < len(left):
            text += f" and {len(left) - len(known)} of a kind not timed yet"
    return text


def _rates(stages: Iterable[Stage], workdir: Path) -> dict[tuple, float]:
    """Return seconds per unit of work, by kind and size, of stages that were not interrupted."""
    seconds: dict[tuple, float] = {}
    work: dict[tuple, float] = {}
    for stage in stages:
        outcome = stage.folder(workdir).read_outcome()
        if outcome is not None and outcome.seconds:
            pace = _pace(stage)
            seconds[pace] = seconds.get(pace, 0.0) + outcome.seconds
            work[pace] = work.get(pace, 0) + _work(stage)
    return {pace: seconds[pace] / work[pace] for pace in seconds}


def _pace(stage: Stage) -> tuple[str, str]:
    """Return the kind and size of a stage, by which its time for a unit of work is estimated."""
    kind = stage.kind
    if _takes_checkpoint(stage):
        kind = "take a checkpoint"
    elif kind == "uptrain":
        kind = "pretrain"  # a step of either takes equally long
    return kind, stage.variant.size


def _work(stage: Stage) -> float:
    """Return the training steps of a stage; 1 for a stage that does not train."""
    # An uptraining trains a share alpha of the steps of pretraining, its last ancestor.
    if stage.kind == "uptrain":
        pretrain = ancestors(stage)[-1]
        return max(1, round(stage.variant.alpha * _work(pretrain)))
    if isinstance(stage.settings, PretrainSettings | FinetuneSettings):
        return 1 if _takes_checkpoint(stage) else stage.settings.recipe.steps
    return 1


def _takes_checkpoint(stage: Stage) -> bool:
    settings = stage.settings
    return isinstance(settings, PretrainSettings) and settings.initial_checkpoint is not None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def describe(stages: list[Stage], workdir: Path) -> str:
    """Show the graph with one line for each stage: its state, its parents and its folder."""
    number = {stage.key: i for i, stage in enumerate(stages, start=1)}
    # Keys depend on the text: until it is prepared, the names of the folders are not known.
    named = not any(
        isinstance(stage.settings, PretrainSettings | FinetuneSettings)
        and stage.settings.text is None
        for stage in stages
    )

    lines, left = [], []
    for stage in stages:
        folder = stage.folder(workdir)
        done = folder.read_outcome() is not None
        left += [] if done else [stage]
        state = "done" if done else "begun" if folder.is_begun else "to do"
        after = ", ".join(str(number[parent.key]) for parent in stage.parents)
        line = f"{number[stage.key]:4d}  {state:5s}  {stage.label}"
        line += f", after {after}" if after else ""
        lines.append(line + (f"  {folder.name}" if named else ""))
    return "\n".join([*lines, remaining(left, stages, workdir)])
