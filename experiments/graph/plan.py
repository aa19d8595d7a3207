"""A config as a graph of stages, each found again by what determines it.

    pretrain (multi-head) ---------------------> finetune -> evaluate     a task each
        `-> convert -> uptrain ----------------> finetune -> evaluate     a task each
    benchmark (both networks in turn; needs no checkpoint unless its KV heads differ by layer)

Without uptraining what was converted is fine-tuned; uptraining also reads the multi-head parent.

A stage's key is a hash of its settings and its parents' keys, its folder `stages/KIND-KEY`. What
several configs have in common is the same stage in each.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.stages import initial_checkpoint, text
from experiments.stages.network import network_config
from experiments.stages.variant import NOT_CONVERTED, Variant, method_label
from gqa import conversion
from gqa.conversion import learned
from gqa.model.config import Config

KINDS = ("pretrain", "convert", "uptrain", "finetune", "evaluate", "benchmark")
# Which of the decoder's attentions convert.where has converted; the others stay multi-head.
WHERE = {
    "self_attention": ("self_attention",),
    "cross_attention": ("cross_attention",),
    "both": ("self_attention", "cross_attention"),
}


class Stage(NamedTuple):
    """One piece of work: `settings` and `parents` determine its result, `setup` does not."""

    kind: str
    settings: dict[str, Any]
    parents: tuple["Stage", ...]
    setup: dict[str, Any]

    @property
    def key(self) -> str:
        """Content hash."""
        return _key(json.dumps(self._identity(), sort_keys=True))

    def _identity(self) -> list:
        return [self.kind, self.settings, [parent.key for parent in self.parents]]

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
        return f"{self.kind}{task} ({', '.join(self._words())})"

    @property
    def title(self) -> str:
        """The same as a folder's name, that of its TensorBoard events."""
        task = [self.task] if self.kind in ("finetune", "evaluate") else []
        return "-".join([self.kind, *task, *self._words(), self.key]).replace(" ", "_")

    def _words(self) -> list[str]:
        variant = self.variant
        K, cross = variant["num_kv_heads"], variant["num_kv_heads_cross_attention"]
        words = [variant["size"], f"{K} KV heads", *([f"cross {cross}"] if cross != K else [])]
        if variant["method"] != NOT_CONVERTED or variant["beta"]:
            words.append(method_label(variant))
        if variant["alpha"]:
            words.append(f"alpha {variant['alpha']:g}")
        if self.kind != "benchmark":
            words.append(f"seed {variant['seed']}")
        return words


@functools.cache
def _key(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def parent_config(config: ConfigDict) -> Config:
    """The multi-head network that everything starts from."""
    heads = {f"num_kv_heads_{name}": config.model.num_heads for name in conversion.ATTENTIONS}
    return network_config(config.model, heads)


def target_heads(config: ConfigDict) -> dict[str, int]:
    """KV heads of each attention after conversion."""
    heads = {name: config.convert[f"num_kv_heads_{name}"] for name in conversion.ATTENTIONS}
    left = {*WHERE["both"]} - {*WHERE[config.convert.where]}
    return heads | dict.fromkeys(left, config.model.num_heads)


def plan(
    config: ConfigDict, prepared: text.Text | None, reference: ConfigDict | None = None
) -> list[Stage]:
    """The stages of a config in the order they run.

    Args:
        prepared: None where only the shape of the graph is asked for: the keys are none to keep.
        reference: the config whose multi-head network is timed beside this one's; itself if None.
    """
    plan_stage = functools.partial(_stage, setup=_setup(config))
    multi_head = dict.fromkeys(conversion.ATTENTIONS, config.model.num_heads)
    mha = _variant(config, multi_head, {}, 0.0)
    settings = {"model": parent_config(config).__dict__, "seed": config.seed}
    settings["text"] = prepared and [prepared.source(config.pretrain.task), prepared.tokenizer.hash]
    if init := initial_checkpoint.identity(config):
        settings["init"] = init
    pretrain = plan_stage("pretrain", config.pretrain.to_dict() | settings, (), mha)
    stages = [pretrain]
    leaves = [pretrain]
    for stage in _grouped(config, pretrain, plan_stage):
        stages.append(stage)
        leaves = [pretrain, stage]  # the last one is what is fine-tuned
    tasks = text.split_names(config.finetune.tasks)
    if not tasks:
        return stages
    for leaf, task in itertools.product(leaves, tasks):
        stages += _tune_and_score(config, leaf, task, prepared, plan_stage)
    return [*stages, _benchmark(config, reference or config, leaves[-1], plan_stage)]


def _grouped(config: ConfigDict, pretrain: Stage, plan_stage) -> Iterable[Stage]:
    """Conversion and uptraining, where the config asks for them."""
    heads, alpha = target_heads(config), config.uptrain.alpha
    start, conversion_settings = pretrain, {}
    if set(heads.values()) != {config.model.num_heads}:
        conversion_settings = _conversion(config)
        settings = conversion_settings | {"num_kv_heads": heads, "seed": config.seed}
        variant = _variant(config, heads, conversion_settings, 0.0)
        start = plan_stage("convert", settings, (pretrain,), variant)
        yield start
    if alpha > 0:
        beta = config.uptrain.beta
        variant = _variant(config, heads, conversion_settings, alpha) | {"beta": beta}
        settings = {"alpha": alpha, "beta": beta}
        if conversion_settings.get("method") in learned.METHODS:
            settings["learned"] = conversion_settings["method"]
        parents = (pretrain,) if start is pretrain else (start, pretrain)
        yield plan_stage("uptrain", settings, parents, variant)


def _conversion(config: ConfigDict) -> dict[str, Any]:
    """The settings that say how to convert, as far as they make a difference."""
    section = config.convert
    settings = {key: section[key] for key in ("method", "grouping", "renorm", "optimizer")}
    if section.method in conversion.ABSORBING:
        settings["space"] = section.space
    if conversion.needs_input_covariances(section.method, section.space, section.grouping):
        settings["calibration_tokens"] = section.calibration_tokens
    if conversion.needs_input_covariances(section.method, section.space):
        settings |= {key: section[key] for key in ("sequential", "shrinkage")}
    if section.per_layer_budget:
        lengths = {"self_attention": "targets_length", "cross_attention": "inputs_length"}
        settings["per_layer_budget"] = {
            name: config.benchmark[key] for name, key in lengths.items()
        }
        settings["space"] = section.space
        if section.space != "weight":
            settings |= {key: section[key] for key in ("calibration_tokens", "shrinkage")}
    return settings


def _tune_and_score(
    config: ConfigDict, leaf: Stage, task: str, prepared: text.Text | None, plan_stage
) -> list[Stage]:
    settings = config.finetune.to_dict() | {"task": task, "seed": config.seed}
    settings |= text.lengths(config.finetune, task)
    settings["text"] = prepared and prepared.source(task)
    del settings["tasks"]
    tuned = plan_stage("finetune", settings, (leaf,), leaf.variant)
    settings = config.evaluate.to_dict() | {"task": task}
    settings["metrics"] = prepared and prepared.metrics(task)
    return [tuned, plan_stage("evaluate", settings, (tuned,), leaf.variant)]


def _benchmark(config: ConfigDict, reference: ConfigDict, leaf: Stage, plan_stage) -> Stage:
    """Times depend on shapes alone: not on how a network was reached, nor on the seed.

    KV heads that were spread over layers are those of the checkpoint `leaf`.
    """
    variant, parents = leaf.variant, ()
    heads = {
        "num_kv_heads_self_attention": variant["num_kv_heads"],
        "num_kv_heads_cross_attention": variant["num_kv_heads_cross_attention"],
        "num_kv_heads_encoder": variant["num_kv_heads_encoder"],
    }
    multi_head = dict.fromkeys(conversion.ATTENTIONS, reference.model.num_heads)
    networks = [
        [_variant(reference, multi_head, {}, 0.0) | {"seed": 0}, parent_config(reference).__dict__]
    ]
    network = parent_config(config).__dict__ | heads
    conversion_settings = {}
    if variant["per_layer_budget"]:
        conversion_settings, network, parents = _conversion(config), None, (leaf,)
    shape = _variant(config, target_heads(config), conversion_settings, 0.0) | {"seed": 0}
    if [shape, network] not in networks:
        networks.append([shape, network])
    settings = config.benchmark.to_dict() | {"networks": networks}
    return plan_stage("benchmark", settings, parents, shape)


def evaluate_checkpoint(config: ConfigDict, checkpoint: Path, variant: dict, task: str) -> Stage:
    """The stage that scores any checkpoint on one task."""
    settings = config.evaluate.to_dict() | {"task": task, "checkpoint": str(checkpoint)}
    return _stage("evaluate", settings, (), variant, _setup(config))


def _stage(kind: str, settings: dict, parents: tuple[Stage, ...], variant: dict, setup: dict):
    return Stage(kind, settings | {"variant": variant}, parents, setup)


def _setup(config: ConfigDict) -> dict[str, Any]:
    """What a stage must know besides, as JSON: how to find its text, what to keep, its run."""
    return {
        "run": config.name,
        "text": text.settings(config),
        "checkpoint": config.checkpoint.to_dict(),
        "train": config.train.to_dict(),
        "wandb": config.wandb.to_dict(),
        "mesh": config.mesh.to_dict(),
    }


def _variant(
    config: ConfigDict, heads: dict[str, int], conversion_settings: dict, alpha: float
) -> dict:
    """What a result line says of its network; without a conversion, its settings are empty."""
    settings = {key: value for key, value in conversion_settings.items() if key != "optimizer"}
    settings["per_layer_budget"] = "per_layer_budget" in settings
    variant = Variant(
        size=config.size,
        num_heads=config.model.num_heads,
        num_kv_heads=heads["self_attention"],
        num_kv_heads_cross_attention=heads["cross_attention"],
        num_kv_heads_encoder=heads["encoder"],
        alpha=alpha,
        seed=config.seed,
        **settings,
    )
    return dataclasses.asdict(variant)


def merge(plans: Iterable[list[Stage]]) -> list[Stage]:
    """Every stage of several plans once, in the order they first come."""
    merged = {}
    for stage in itertools.chain(*plans):
        merged.setdefault(stage.key, stage)
    return list(merged.values())


def ancestors(stage: Stage) -> list[Stage]:
    """The stage and everything it builds on, itself first and the multi-head parent last."""
    return merge([[stage], *(ancestors(parent) for parent in stage.parents)])
