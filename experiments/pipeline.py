"""The main job, and sweeps of it: check, prepare the text, plan, run or submit, report.

`experiments/graph` turns a config into stages, and `experiments/run` runs them; here is the order.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from experiments.graph import sweep
from experiments.graph import validate as checks
from experiments.graph.plan import evaluate_checkpoint, plan
from experiments.graph.stage import Stage, ancestors, merge
from experiments.report import learning_section
from experiments.run import local, report_job, slurm, worker
from experiments.stages import text
from experiments.stages.inputs import open_parent
from experiments.stages.settings import SETTINGS, TextSettings
from experiments.workdir import lock, make_workdir
from gqa.runtime.distributed import is_primary, is_several
from gqa.runtime.errors import UserError

KINDS = (*SETTINGS, "report")
EXECUTORS = ("local", "slurm")


class Options(NamedTuple):
    """How a graph of stages is run."""

    executor: str = "local"
    jobs: int = 1
    dry_run: bool = False


def check(config: ConfigDict, options: Options) -> None:
    """Refuse, in one line and before any compute, a config that could not run."""
    read = set()  # by their repr, because settings of a text hold dicts and cannot be hashed
    for point in sweep.expand(config):
        checks.check(point, slurm.devices(point) if options.executor == "slurm" else None)
        wanted = repr(text.settings(point))
        if wanted not in read:  # texts may be large: each is read once
            checks.check_text(point)
        read.add(wanted)


def check_options(options: Options) -> None:
    """Refuse options that contradict each other, or that this machine cannot do."""
    if options.executor not in EXECUTORS:
        raise UserError(f"--executor={options.executor}; use one of {', '.join(EXECUTORS)}")
    if options.executor == "slurm":
        slurm.check()
    if options.jobs < 1:
        raise UserError(f"--jobs={options.jobs}; use 1 or more")
    if is_several() and options != Options(dry_run=options.dry_run):
        raise UserError("several processes run one stage at a time: no --jobs, no --executor")
    if options.jobs > 1 and options.executor != "local":
        raise UserError("--jobs goes with --executor=local")
    if options.jobs > 1 and jax.default_backend() != "cpu":
        raise UserError(
            f"--jobs={options.jobs} would share one accelerator; use --jobs=1 or --executor=slurm"
        )


def run(config: ConfigDict, workdir: Path, kind: str | None, options: Options) -> None:
    """Run the stages that are not finished: all, or those of one kind and their ancestors."""
    # A report only reads results. It takes no lock, so that it can be made while stages run.
    if kind == "report":
        results = workdir / worker.RESULTS
        if not os.path.lexists(results):
            raise UserError(f"{results}: No such file or directory; run a stage that writes it")
        _report(config, workdir, _stages(config, workdir, None, _kept))
    elif options.dry_run:
        stages = _stages(config, workdir, kind, _prepared)
        print(local.describe(stages, workdir))
    else:
        make_workdir(workdir)
        with lock(workdir / "lock", str(workdir)):
            _run(config, workdir, kind, options)


def _run(config: ConfigDict, workdir: Path, kind: str | None, options: Options) -> None:
    stages = _stages(config, workdir, kind, text.prepare)
    if options.executor == "slurm":
        # Jobs run without this program, so their descriptions are written before.
        for stage in stages:
            worker.describe(stage, workdir)
        command = report_job.command(stages, workdir, config.report.within)
        slurm.submit(stages, workdir, config.slurm.to_dict(), command)
        return

    local.run(stages, workdir, options.jobs)
    if kind is None:
        _report(config, workdir, stages)


def _report(config: ConfigDict, workdir: Path, stages: list[Stage]) -> None:
    """Report on the stages of this config alone: the workdir may hold those of others."""
    if is_primary():
        report_job.write(workdir, config.report.within, {stage.key for stage in stages})


def _stages(config: ConfigDict, workdir: Path, kind: str | None, prepare: Callable) -> list[Stage]:
    """Return the stages of a config: all, or those of one kind and their ancestors."""
    # Points that share a text share its preparation. The benchmarks of all points have the first
    # one's multi-head network as their reference.
    points = sweep.expand(config)
    texts: dict[str, text.Text | None] = {}
    plans: list[list[Stage]] = []
    for point in points:
        wanted = text.settings(point)
        if repr(wanted) not in texts:
            texts[repr(wanted)] = prepare(wanted, workdir)
        plans.append(plan(point, texts[repr(wanted)], points[0]))
    stages = merge(plans)

    if kind is None:
        return stages
    needed = {a.key for stage in stages if stage.kind == kind for a in ancestors(stage)}
    if not needed:
        raise UserError(f"--stage={kind}: {config.name} has no such stage")
    return [stage for stage in stages if stage.key in needed]


def _prepared(wanted: TextSettings, workdir: Path) -> text.Text | None:
    # A dry run builds nothing. Without the text, keys lack its hash.
    return text.prepare(wanted, workdir) if text.is_prepared(wanted, workdir) else None


def _kept(wanted: TextSettings, workdir: Path) -> text.Text:
    """Return the text that earlier runs have prepared, by whose hash a report finds its results."""
    prepared = _prepared(wanted, workdir)
    if prepared is None:
        raise UserError(
            f"{workdir / 'text'}: the text of this config is missing, without which its results "
            "cannot be told from others; the same command without --stage=report prepares it again"
        )
    return prepared


def score_checkpoint(config: ConfigDict, workdir: Path, path: Path) -> None:
    """Score a checkpoint on the task it was fine-tuned on, or else on every task of the config.

    The scores are printed as a table and appended to results.jsonl. No command plans this stage, so
    no report has them.
    """
    parent, rows = open_parent(path), []
    make_workdir(workdir)
    tuned_on = parent.info.task
    with lock(workdir / "lock", str(workdir)):
        for task in [tuned_on] if tuned_on else text.split_names(config.finetune.tasks):
            stage = evaluate_checkpoint(config, parent.path, parent.info.variant, task)
            # The stage's key holds the checkpoint's path but not its contents, so an earlier score
            # may be that of another checkpoint.
            folder = worker.describe(stage, workdir)
            folder.discard_outcome()
            worker.run(folder)
            outcome = folder.read_outcome()
            assert outcome is not None  # `run` has just written it
            rows += [(task, entry) for entry in outcome.records]
    if is_primary():
        print(learning_section.plain_scores(rows))
        print(f"scores: {workdir / worker.RESULTS}")
