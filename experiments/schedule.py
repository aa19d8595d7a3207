"""Run a graph of stages on this machine, one at a time or several, and say what is left."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from experiments import worker
from experiments.plan import Stage, ancestors
from experiments.process import USER_ERROR
from experiments.stage import read_done
from gqa.distributed import is_several
from gqa.errors import UserError

POLL_SECONDS = 0.1
ROOT = Path(__file__).parent.parent
WORKER = (sys.executable, "-m", "experiments.worker")  # and the stage's folder


def run(stages: list[Stage], workdir: Path, jobs: int) -> None:
    """Do what is not done yet, `jobs` stages at a time.

    A stage that fails takes only those that build on it along; of several processes, all.

    Raises:
        UserError: at the end, if any stage failed.
    """
    folders = {stage.key: worker.describe(stage, workdir) for stage in stages}
    failed: dict[str, Exception] = {}
    todo = []
    for stage in stages:
        if read_done(folders[stage.key]) is None:
            todo.append(stage)
        else:
            print(f"{stage.label}: done before, in {folders[stage.key]}")
            worker.run(folders[stage.key])  # publishes what a kill may have kept it from
    if jobs == 1:
        _one_by_one(todo, stages, workdir, failed)
    else:
        _several(todo, stages, workdir, jobs, failed)
    if failed:
        first = next(iter(failed.values()))
        if len(failed) == 1:
            raise first
        raise UserError(f"{len(failed)} stages failed or build on one that did; the first: {first}")


def _one_by_one(todo, stages, workdir, failed) -> None:
    for i, stage in enumerate(todo):
        if any(a.key in failed for a in ancestors(stage)):
            failed[stage.key] = UserError("it builds on a stage that failed")
            continue
        _announce(stage, todo[i:], stages, workdir)
        try:
            worker.run(stage.folder(workdir))
        except UserError as error:
            if is_several():  # the others may know nothing of it, and wait in the middle of it
                raise
            failed[stage.key] = error
            print(f"{stage.label}: failed: {error}", flush=True)


class Running(NamedTuple):
    """A stage at work in a process of its own, and the file of what that says on stderr."""

    stage: Stage
    process: subprocess.Popen
    errors: TextIO


def _several(todo, stages, workdir, jobs, failed) -> None:
    """Start each stage as soon as what it builds on is done and there is room for it."""
    waiting, running = list(todo), []
    try:
        while waiting or running:
            for stage in list(waiting):
                above = {a.key for a in ancestors(stage)[1:]}
                unfinished = {s.key for s in (*waiting, *(r.stage for r in running))}
                if above & failed.keys():
                    failed[stage.key] = UserError("it builds on a stage that failed")
                    waiting.remove(stage)
                elif not above & unfinished and _room(stage, waiting, running, jobs):
                    left = [*(r.stage for r in running), *waiting]
                    _announce(stage, left, stages, workdir, jobs)
                    waiting.remove(stage)
                    running.append(_start(stage, workdir))
            for ended in [r for r in running if r.process.poll() is not None]:
                running.remove(ended)
                error = _outcome(ended)
                if error is not None:
                    failed[ended.stage.key] = error
                    print(f"{ended.stage.label}: failed: {error}", flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            each.process.wait()
            each.errors.close()


def _room(stage: Stage, waiting: list[Stage], running: list[Running], jobs: int) -> bool:
    """Timings come last and alone: nothing builds on them, and they share with nothing."""
    if stage.kind == "benchmark":
        return not running and all(other.kind == "benchmark" for other in waiting)
    return len(running) < jobs


def _start(stage: Stage, workdir: Path) -> Running:
    folder = stage.folder(workdir).absolute()
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read when the process has ended)
    return Running(stage, subprocess.Popen([*WORKER, str(folder)], cwd=ROOT, stderr=errors), errors)


def _outcome(ended: Running) -> Exception | None:
    """What went wrong, if anything did."""
    with ended.errors as file:
        file.seek(0)
        lines = file.read().splitlines()
    code = ended.process.returncode
    said = [line for line in lines if line.startswith("error: ")]
    if code == USER_ERROR and said:
        return UserError(said[-1].removeprefix("error: "))
    if code == 0:
        return None
    print("\n".join(lines), file=sys.stderr, flush=True)
    return RuntimeError(f"{ended.stage.label}: its process ended with status {code}")


def _announce(stage, left, stages, workdir, jobs: int = 1) -> None:
    print(f"{stage.label}: in {stage.folder(workdir)}; {remaining(left, stages, workdir, jobs)}")
    sys.stdout.flush()


def remaining(left: list[Stage], stages: list[Stage], workdir: Path, jobs: int = 1) -> str:
    """How many stages are left and how long they take, reckoned from those that are done."""
    rates = _rates(stages, workdir)
    known = [rates[_pace(s)] * _work(s) for s in left if _pace(s) in rates]
    text = f"{len(left)} of {len(stages)} stages left"
    if known:
        text += f", about {_duration(sum(known) / jobs)}"
        if len(known) < len(left):
            text += f" and {len(left) - len(known)} of a kind not timed yet"
    return text


def _rates(stages: Iterable[Stage], workdir: Path) -> dict[tuple, float]:
    """Seconds per unit of work, by kind and size, of the stages done without an interruption."""
    seconds, work = {}, {}
    for stage in stages:
        done = read_done(stage.folder(workdir))
        if done and done["seconds"]:
            pace = _pace(stage)
            seconds[pace] = seconds.get(pace, 0.0) + done["seconds"]
            work[pace] = work.get(pace, 0) + _work(stage)
    return {pace: seconds[pace] / work[pace] for pace in seconds}


def _pace(stage: Stage) -> tuple[str, str]:
    kind = "pretrain" if stage.kind == "uptrain" else stage.kind  # the same steps
    return "init" if "init" in stage.settings else kind, stage.variant["size"]


def _work(stage: Stage) -> float:
    """Steps where there are any."""
    if stage.kind == "uptrain":
        recipe = ancestors(stage)[-1].settings
        return max(1, round(stage.settings["alpha"] * recipe["steps"]))
    return 1 if "init" in stage.settings else stage.settings.get("steps", 1)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def describe(stages: list[Stage], workdir: Path) -> str:
    """The graph, a line a stage: its state, what it builds on, where it is."""
    number = {stage.key: i for i, stage in enumerate(stages, start=1)}
    # Until the text is there, what its stages will be called is not known.
    named = all(stage.settings.get("text", True) for stage in stages)
    lines, left = [], []
    for stage in stages:
        folder = stage.folder(workdir)
        done = read_done(folder) is not None
        left += [] if done else [stage]
        state = "done" if done else "begun" if (folder / "checkpoints").exists() else "to do"
        after = ", ".join(str(number[parent.key]) for parent in stage.parents)
        line = f"{number[stage.key]:4d}  {state:5s}  {stage.label}"
        line += f", after {after}" if after else ""
        lines.append(line + (f"  {folder.name}" if named else ""))
    return "\n".join([*lines, remaining(left, stages, workdir)])
