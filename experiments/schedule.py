"""Run a graph of stages on this machine, one at a time or several, and say what is left."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from experiments import worker
from experiments.plan import Stage, ancestors
from experiments.stage import read_done
from gqa.errors import UserError

POLL_SECONDS = 0.1
ROOT = Path(__file__).parent.parent


def run(stages: list[Stage], workdir: Path, jobs: int) -> None:
    """Do what is not done yet, `jobs` stages at a time.

    A stage that fails takes only those that build on it along.

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
        # Timings share the machine with nothing, and nothing builds on them.
        trained = [stage for stage in todo if stage.kind != "benchmark"]
        _several(trained, stages, workdir, jobs, failed)
        timed = [stage for stage in todo if stage.kind == "benchmark"]
        _several(timed, stages, workdir, 1, failed)
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
            failed[stage.key] = error
            print(f"{stage.label}: failed: {error}", flush=True)


def _several(todo, stages, workdir, jobs, failed) -> None:
    """Each stage in a process of its own, as soon as what it builds on is done."""
    waiting, running = list(todo), {}
    try:
        while waiting or running:
            for stage in list(waiting):
                above = {a.key for a in ancestors(stage)[1:]}
                if above & failed.keys():
                    failed[stage.key] = UserError("it builds on a stage that failed")
                    waiting.remove(stage)
                elif len(running) < jobs and not above & {s.key for s in (*waiting, *running)}:
                    _announce(stage, [*running, *waiting], stages, workdir, jobs)
                    waiting.remove(stage)
                    running[stage] = _start(stage.folder(workdir))
            for stage in [stage for stage, (process, _) in running.items() if _ended(process)]:
                error = _outcome(*running.pop(stage))
                if error is not None:
                    failed[stage.key] = error
                    print(f"{stage.label}: failed: {error}", flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _start(folder: Path):
    """The worker's process and the file of what it says on stderr."""
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read after the process has ended)
    command = [sys.executable, "-m", "experiments.worker", str(folder.absolute())]
    return subprocess.Popen(command, cwd=ROOT, stderr=errors), errors


def _ended(process: subprocess.Popen) -> bool:
    return process.poll() is not None


def _outcome(process: subprocess.Popen, errors) -> Exception | None:
    """What went wrong with a process that ended, if anything did."""
    with errors:
        errors.seek(0)
        lines = errors.read().splitlines()
    if process.returncode == 0:
        return None
    said = [line for line in lines if line.startswith("error: ")]
    if process.returncode == 2 and said:
        return UserError(said[-1].removeprefix("error: "))
    print("\n".join(lines), file=sys.stderr, flush=True)
    return RuntimeError(f"a stage's process ended with status {process.returncode}")


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
    return kind, stage.variant["size"]


def _work(stage: Stage) -> float:
    """Steps where there are any."""
    if stage.kind == "uptrain":
        recipe = ancestors(stage)[-1].settings
        return max(1, round(stage.settings["alpha"] * recipe["steps"]))
    return stage.settings.get("steps", 1)


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
