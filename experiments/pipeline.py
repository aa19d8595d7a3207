"""The main job as a graph of stages, each done once and found again by what determines it.

    pretrain (multi-head) ---------------------> finetune -> evaluate     a task each
        `-> convert -> uptrain ----------------> finetune -> evaluate     a task each
    benchmark (both networks in turn)            report (from results.jsonl alone)

A stage's key is a hash of its settings and its parents' keys, its folder `stages/KIND-KEY`. Stages
meet only there: checkpoints, `stage.json`, and `done.json` with its results once it is finished.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import report, text
from experiments.check import check as check  # as launch.py calls every experiment's
from experiments.check import parent_config, target_heads
from experiments.stage import Job, finish, make_workdir, open_parent, read_done
from gqa import convert, results, sharding
from gqa.errors import UserError

RESULTS = "results.jsonl"
KINDS = ("pretrain", "convert", "uptrain", "finetune", "evaluate", "benchmark", "report")


class Stage(NamedTuple):
    """One piece of work; `settings` and `parents` determine its result."""

    kind: str
    settings: dict[str, Any]
    parents: tuple["Stage", ...]

    @property
    def key(self) -> str:
        """Content hash."""
        what = [self.kind, self.settings, [parent.key for parent in self.parents]]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def task(self) -> str | None:
        """The task it fine-tunes on or scores, if any."""
        return self.settings.get("task")

    def folder(self, workdir: Path) -> Path:
        """Where it works and leaves its results."""
        return workdir / "stages" / f"{self.kind}-{self.key}"

    @property
    def variant(self) -> dict[str, Any]:
        """What result lines say of its network."""
        return self.settings["variant"]

    @property
    def label(self) -> str:
        """What a person calls it."""
        task = f" {self.task}" if self.kind in ("finetune", "evaluate") else ""
        return f"{self.kind}{task} ({self.variant['num_kv_heads']} KV heads)"


def plan(config: ConfigDict, text_hash: str) -> list[Stage]:
    """The stages of a config in the order they run."""
    heads = target_heads(config)
    multi_head = dict.fromkeys(convert.ATTENTIONS, config.model.num_heads)
    mha = _variant(config, multi_head, "none", 0.0)
    settings = {"model": parent_config(config).__dict__, "text": text_hash, "seed": config.seed}
    pretrain = _stage("pretrain", config.pretrain.to_dict() | settings, (), mha)
    stages, leaves = [pretrain], [pretrain]
    if heads != multi_head or config.uptrain.alpha > 0:
        method, alpha = config.convert.method, config.uptrain.alpha
        variant = _variant(config, heads, method, alpha)
        settings = {"num_kv_heads": heads, "method": method, "seed": config.seed}
        settings["optimizer"] = config.convert.optimizer
        converted = _stage("convert", settings, (pretrain,), variant | {"alpha": 0.0})
        uptrained = _stage("uptrain", {"alpha": alpha}, (converted,), variant)
        stages += [converted, uptrained]
        leaves.append(uptrained)
    for leaf in leaves:
        for task in text.split_names(config.finetune.tasks):
            stages += _tune_and_score(config, leaf, task)
    benchmark = _stage("benchmark", config.benchmark.to_dict(), tuple(leaves), leaves[-1].variant)
    return [*stages, benchmark]


def _tune_and_score(config: ConfigDict, leaf: Stage, task: str) -> list[Stage]:
    settings = config.finetune.to_dict() | {"task": task, "seed": config.seed}
    del settings["tasks"]
    tuned = _stage("finetune", settings, (leaf,), leaf.variant)
    settings = config.evaluate.to_dict() | {"task": task}
    return [tuned, _stage("evaluate", settings, (tuned,), leaf.variant)]


def _stage(kind: str, settings: dict, parents: tuple[Stage, ...], variant: dict) -> Stage:
    return Stage(kind, settings | {"variant": variant}, parents)


def _variant(config: ConfigDict, heads: dict[str, int], method: str, alpha: float) -> dict:
    """What a result line says of the network it is about."""
    return {
        "size": config.size,
        "num_heads": config.model.num_heads,
        "num_kv_heads": heads["decoder"],
        "cross_num_kv_heads": heads["cross"],
        "encoder_num_kv_heads": heads["encoder"],
        "method": method,
        "alpha": alpha,
        "seed": config.seed,
    }


def run(config: ConfigDict, workdir: Path, kind: str | None = None) -> None:
    """Do what is not done yet: everything, or the stages of one kind and what they build on."""
    if kind == "report":
        print(report.run(workdir / RESULTS, workdir))
        return
    job = _job(config, workdir)
    stages = plan(config, job.text.hash)
    if kind is not None:
        wanted = [s for s in stages if s.kind == kind]
        if not wanted:
            raise UserError(f"stage={kind}: {config.name} has no such stage")
        stages = [s for s in stages if any(s in _ancestors(w) for w in wanted)]
    for stage in stages:
        _run_stage(stage, config.name, job)
    if kind is None:
        print(report.run(workdir / RESULTS, workdir))
        print(f"report: {workdir / 'report.md'}")


def _job(config: ConfigDict, workdir: Path) -> Job:
    make_workdir(workdir)
    prepared = text.prepare(config, workdir)
    return Job(workdir, prepared, sharding.make_mesh(), config.checkpoint.keep_last)


def _ancestors(stage: Stage) -> list[Stage]:
    return [stage, *(a for parent in stage.parents for a in _ancestors(parent))]


def _run_stage(stage: Stage, run_name: str, job: Job) -> None:
    """Run a stage unless it is done, and see to it that its results are in results.jsonl."""
    folder = stage.folder(job.workdir)
    done = read_done(folder)
    if done is None:
        print(f"{stage.label}: in {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        parents = [_result(parent, job.workdir) for parent in stage.parents]
        module = importlib.import_module(f"experiments.{stage.kind}")
        outcome = module.run(stage.label, stage.settings, folder, parents, job)
        done = finish(folder, outcome, results.provenance())
    else:
        print(f"{stage.label}: done before, in {folder}")
    path = job.workdir / RESULTS
    # A stage that several runs share is published once, by the first.
    if not path.exists() or all(r["stage_key"] != stage.key for r in results.read(path)):
        _publish(stage, done, run_name, path)


def _result(stage: Stage, workdir: Path) -> Path:
    """The checkpoint that a finished stage hands on."""
    folder = stage.folder(workdir)
    return folder / "checkpoints" / read_done(folder)["checkpoint"]


def _publish(stage: Stage, done: dict, run_name: str, path: Path) -> None:
    common = {"run": run_name, "stage": stage.kind, "stage_key": stage.key, "task": stage.task}
    common["variant"] = stage.variant
    blank = {"low": None, "high": None, "n": None}
    results.append(path, [common | blank | r | done["provenance"] for r in done["records"]])


def evaluate_checkpoint(config: ConfigDict, workdir: Path, path: Path) -> None:
    """Score any checkpoint: on the task it was fine-tuned on, else on every task of the config."""
    parent = open_parent(path)
    job = _job(config, workdir)
    tuned_on = parent.info.get("task")
    for task in [tuned_on] if tuned_on else text.split_names(config.finetune.tasks):
        settings = config.evaluate.to_dict() | {"task": task, "checkpoint": str(parent.path)}
        stage = _stage("evaluate", settings, (), parent.info["variant"])
        folder = stage.folder(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        module = importlib.import_module("experiments.evaluate")
        outcome = module.run(stage.label, stage.settings, folder, [parent.path], job)
        _publish(
            stage, finish(folder, outcome, results.provenance()), config.name, workdir / RESULTS
        )
