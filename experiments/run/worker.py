"""Run one stage, as the `stage.json` in its folder describes it.

    python -m experiments.run.worker runs/stages/KIND-KEY

The same code runs a stage in the process of the main program, in a process beside it, in a job of a
cluster, or in several processes together. What lies in a stage's folder is described in
`experiments/stages/folder.py`; only `local.py` and `slurm.py` know which stages there are, and in
what order they run.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import sys
import time
from pathlib import Path

import jax

from experiments.graph.stage import Stage
from experiments.run import process
from experiments.stages import head_start, text
from experiments.stages.folder import Description, Outcome, StageFolder
from experiments.stages.inputs import Job
from experiments.stages.settings import EvaluateSettings, Setup
from experiments.stages.typed_json import from_json, to_json
from experiments.workdir import lock
from gqa.checkpoints import step_folders
from gqa.evaluation import results
from gqa.runtime import compilation_cache, distributed, sharding
from gqa.runtime.errors import DamagedCheckpoint, UserError, renamed_fields
from gqa.runtime.mesh import make_mesh

RESULTS = "results.jsonl"
# Stages that are not spread over several processes: each process does the whole stage on its own
# devices, waiting for no other, and only the primary's outcome is kept.
ALONE = ("convert", "evaluate", "benchmark")


def describe(stage: Stage, workdir: Path) -> StageFolder:
    """Write the description that `run` needs into the stage's folder; return the folder."""
    folder = stage.folder(workdir)
    description = Description(
        kind=stage.kind,
        key=stage.key,
        task=stage.task,
        label=stage.label,
        title=stage.title,
        settings=stage.settings,
        setup=stage.setup,
        parents=tuple(parent.folder(workdir).name for parent in stage.parents),
        texts=stage.texts,
        course=stage.course,
    )
    folder.write_description(description)
    return folder


def run(folder: StageFolder) -> None:
    """Run the stage of a folder unless it is finished, and publish its results.

    Raises:
        UserError: where another process is at work on the stage, or a parent is not finished.
    """
    description = folder.read_description()
    with lock(folder.lock, f"the stage in {folder}"):
        outcome = folder.read_outcome()
        if outcome is None:
            head_start.take(folder)
            fresh, begun = not folder.is_begun, time.monotonic()
            outcome = _run_module(folder, description)
            # The seconds of a stage that was interrupted before are not known.
            seconds = time.monotonic() - begun if fresh else None
            outcome = dataclasses.replace(outcome, provenance=results.provenance(), seconds=seconds)
            folder.write_outcome(outcome)
    if distributed.is_primary():
        _publish(folder, description, outcome)


def _run_module(folder: StageFolder, description: Description) -> Outcome:
    """Return the outcome of the stage's module for the settings and the parents' checkpoints.

    If the user asks for it, a damaged checkpoint is set aside, and the training that is lost with
    it is done again.
    """
    setup, settings = description.setup, description.settings
    module = importlib.import_module(f"experiments.stages.{description.kind}")
    shared = _make_job(
        json.dumps(to_json(setup)), folder.workdir, _is_alone(description.kind, setup)
    )

    # The cached job serves all stages with the same setup; promised texts and title are this one's.
    text_as_promised = shared.text._replace(promised=description.texts)
    job = dataclasses.replace(shared, title=description.title, text=text_as_promised)

    # Each round sets one damaged checkpoint aside, or ends.
    while True:
        try:
            parents = [folder.sibling(name).result() for name in description.parents]
            if isinstance(settings, EvaluateSettings) and settings.checkpoint:
                parents = [Path(settings.checkpoint)]
            with jax.set_mesh(job.mesh) if job.mesh.size > 1 else contextlib.nullcontext():
                return module.run(description.label, settings, folder, parents, job)
        except DamagedCheckpoint as damaged:
            _set_aside(damaged, folder, setup)


def _set_aside(damaged: DamagedCheckpoint, folder: StageFolder, setup: Setup) -> None:
    """Set a damaged checkpoint aside, and do the stage that saved it again if it is a parent.

    Raises:
        DamagedCheckpoint: the same again, if the user did not ask for this, or no stage of the
            workdir saved the checkpoint.
    """
    # The folder of the stage that saved the checkpoint: WORKDIR/stages/KIND-KEY/checkpoints/STEP.
    owners = [path for path in damaged.step.parents if path.parent == folder.path.parent]
    if setup.checkpoint.on_damage != "previous" or not owners:
        raise damaged

    owner = StageFolder(owners[0])
    step_folders.set_aside(damaged.step)
    # The outcome was made from the damaged checkpoint, or from one after it.
    owner.discard_outcome()
    print(f"{damaged.step} is damaged and was set aside, with those after it", flush=True)
    if owner != folder:
        run(owner)  # a parent is done again here, this stage in the next round of `_run_module`


def _is_alone(kind: str, setup: Setup) -> bool:
    # A network split over more devices than a process has generates on the devices of all.
    together = kind == "evaluate" and setup.mesh.model > jax.local_device_count()
    return kind in ALONE and not together


# Stages that a process does in turn have one text and one mesh. The setup is passed as JSON because
# it holds dicts, which cannot be the key of a cache.
@functools.lru_cache(maxsize=1)
def _make_job(setup_json: str, workdir: Path, alone: bool) -> Job:
    setup = from_json(Setup, json.loads(setup_json), "setup")
    layout = setup.mesh.within(jax.local_device_count()) if alone else setup.mesh
    with renamed_fields("mesh."):
        mesh = make_mesh(layout, local=alone)
    prepared = text.prepare(setup.text, workdir)._replace(share=sharding.share(mesh))
    return Job(workdir, setup, prepared, mesh, layout)


def _publish(folder: StageFolder, description: Description, outcome: Outcome) -> None:
    """Append the outcome's records to results.jsonl unless all of them are in the file already."""
    path = folder.workdir / RESULTS
    settings, provenance = description.settings, outcome.provenance or {}
    published = results.read(path) if path.exists() else []

    # A stage that was done again has a new outcome, with a time of its own, under the same key.
    num_published = sum(
        (record["stage_key"], record["time"]) == (description.key, provenance.get("time"))
        for record in published
    )
    # A checkpoint that the user named is scored, and published, each time anew.
    scored_anew = isinstance(settings, EvaluateSettings) and settings.checkpoint
    if num_published >= len(outcome.records) and not scored_anew:
        return

    common = {
        "run": description.setup.run,
        "stage": description.kind,
        "stage_key": description.key,
        "task": description.task,
        "variant": to_json(settings.variant),
        **dict.fromkeys(("low", "high", "n")),
    }
    results.append(path, [common | record | provenance for record in outcome.records])


def main(argv: list[str]) -> None:
    """Run the stages of the folders that are the arguments, one after the other."""
    if len(argv) < 2:
        raise UserError("usage: python -m experiments.run.worker WORKDIR/stages/KIND-KEY ...")
    folders = [StageFolder(Path(argument).absolute()) for argument in argv[1:]]
    distributed.initialize()
    compilation_cache.enable()
    for folder in folders:
        run(folder)


if __name__ == "__main__":
    process.start()
    sys.exit(process.status(functools.partial(main, sys.argv)))
