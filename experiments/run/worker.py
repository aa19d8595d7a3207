"""Run one stage, from what its folder's `stage.json` says.

    python -m experiments.run.worker runs/stages/KIND-KEY

The same code runs a stage in the process of the main program, in a process beside it, in a job of a
cluster, or in several processes together. A stage folder has `stage.json`, checkpoints if it
trains, and `done.json` with its results once it is finished.
"""

import contextlib
import functools
import importlib
import json
import sys
import time
from pathlib import Path

import jax

from experiments.graph.plan import KINDS, Stage
from experiments.run import process
from experiments.stages import text
from experiments.stages.stage import DONE, Job, Outcome, finish, read_done
from experiments.workdir import lock, write_whole
from gqa.checkpoints import checkpoint
from gqa.evaluation import results
from gqa.runtime import distributed, sharding
from gqa.runtime.errors import DamagedCheckpoint, UserError

RESULTS = "results.jsonl"
STAGE = "stage.json"
# Of several processes each does all of these on its own devices, if only the primary's is kept:
# what they compute is one device's or one batch's, and waits for no other. A network that is split
# over more devices than a process has generates on those of all.
ALONE = ("convert", "evaluate", "benchmark")


def describe(stage: Stage, workdir: Path) -> Path:
    """Write what `run` needs to know into the stage's folder; returns the folder."""
    folder = stage.folder(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    what = {"kind": stage.kind, "key": stage.key, "task": stage.task}
    what |= {"label": stage.label, "title": stage.title}
    what |= {"settings": stage.settings, "setup": stage.setup}
    what["parents"] = [parent.folder(workdir).name for parent in stage.parents]
    write_whole(folder / STAGE, json.dumps(what, indent=1))
    return folder


def run(folder: Path) -> None:
    """Run the stage of a folder unless it is done, and see to it that its results are published.

    Raises:
        UserError: where another process is at work on it, or its text is not the planned one.
    """
    what = distributed.by_primary(lambda: _read(folder))
    with lock(folder / "lock", f"the stage in {folder}"):
        done = read_done(folder)
        if done is None:
            fresh = not (folder / "checkpoints").exists()
            begun = time.monotonic()
            outcome = _outcome(folder, what)
            seconds = time.monotonic() - begun if fresh else None  # of all of it, or not known
            done = finish(folder, outcome, results.provenance(), seconds)
    if distributed.is_primary():
        _publish(folder, what, done)


def _read(folder: Path) -> dict:
    try:
        what = json.loads((folder / STAGE).read_text())
        if what["kind"] not in KINDS or any(Path(name).name != name for name in what["parents"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / STAGE}: not the description of a stage") from error
    return what


def _outcome(folder: Path, what: dict) -> Outcome:
    """What the stage's module makes of it.

    A damaged checkpoint is set aside if the user said so, and what is lost with it done again.
    """
    workdir = folder.parent.parent
    module = importlib.import_module(f"experiments.stages.{what['kind']}")
    setup = what["setup"]
    job = _job(json.dumps(setup), workdir, _is_alone(what["kind"], setup))._replace(
        title=what["title"]
    )
    while True:
        try:
            parents = [_result(workdir / "stages" / name) for name in what["parents"]]
            if "checkpoint" in what["settings"]:
                parents = [Path(what["settings"]["checkpoint"])]
            with jax.set_mesh(job.mesh) if job.mesh.size > 1 else contextlib.nullcontext():
                return module.run(what["label"], what["settings"], folder, parents, job)
        except DamagedCheckpoint as damaged:
            owners = [p for p in damaged.step.parents if p.parent == folder.parent]
            if setup["checkpoint"]["on_damage"] != "previous" or not owners:
                raise
            owner = owners[0]
            checkpoint.set_aside(damaged.step)
            if distributed.is_primary():
                (owner / DONE).unlink(missing_ok=True)  # what was made of it is to be made again
            print(f"{damaged.step} is damaged and was set aside, with those after it", flush=True)
            if owner != folder:
                run(owner)


def _result(folder: Path) -> Path:
    """The checkpoint that a finished stage hands on."""
    done = read_done(folder)
    if done is None:
        raise UserError(f"the stage in {folder} is not finished; run it first")
    return folder / "checkpoints" / Path(done["checkpoint"]).name


def _is_alone(kind: str, setup: dict) -> bool:
    together = kind == "evaluate" and setup["mesh"]["model"] > jax.local_device_count()
    return kind in ALONE and not together


@functools.lru_cache(maxsize=1)
def _job(setup: str, workdir: Path, alone: bool) -> Job:
    settings = json.loads(setup)
    layout = sharding.Layout(**settings["mesh"])
    layout = layout.within(jax.local_device_count()) if alone else layout
    mesh = sharding.make_mesh(layout, local=alone)
    return Job(
        workdir=workdir,
        text=text.prepare(settings["text"], workdir)._replace(share=sharding.share(mesh)),
        mesh=mesh,
        layout=layout,
        keep_last=settings["checkpoint"]["keep_last"],
        train=settings["train"],
        wandb=settings["wandb"],
        run_name=settings["run"],
    )


def _publish(folder: Path, what: dict, done: dict) -> None:
    """Append the results unless all of them are in results.jsonl already."""
    path = folder.parent.parent / RESULTS
    published = results.read(path) if path.exists() else []
    same = sum(r["stage_key"] == what["key"] for r in published)
    if same >= len(done["records"]) and "checkpoint" not in what["settings"]:
        return
    common = {"run": what["setup"]["run"], "stage": what["kind"], "stage_key": what["key"]}
    common |= {"task": what["task"], "variant": what["settings"]["variant"]}
    blank = {"low": None, "high": None, "n": None}
    results.append(path, [common | blank | r | done["provenance"] for r in done["records"]])


def main(argv: list[str]) -> None:
    """Run the stages of the folders that are the arguments, one after the other."""
    if len(argv) < 2:
        raise UserError("usage: python -m experiments.run.worker WORKDIR/stages/KIND-KEY ...")
    folders = [Path(arg).absolute() for arg in argv[1:]]
    distributed.initialize()
    jax.config.update("jax_compilation_cache_dir", str(folders[0].parent.parent / "compiled"))
    for folder in folders:
        run(folder)


if __name__ == "__main__":
    process.start()
    sys.exit(process.status(functools.partial(main, sys.argv)))
