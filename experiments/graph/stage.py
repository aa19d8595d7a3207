"""A stage of the graph: its key, its folder and what a person calls it."""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.stages.folder import StageFolder
from experiments.stages.settings import (
    EvaluateSettings,
    FinetuneSettings,
    PretrainSettings,
    Settings,
    Setup,
)
from experiments.stages.typed_json import to_json
from experiments.stages.variant import Variant


@dataclass(frozen=True)
class Stage:
    """One piece of work: `settings` and `parents` determine its result, `setup` does not."""

    kind: str
    settings: Settings
    parents: tuple["Stage", ...]
    setup: Setup

    @cached_property
    def settings_json(self) -> dict[str, Any]:
        """The settings as JSON."""
        return to_json(self.settings)

    @cached_property
    def key(self) -> str:
        """A hash of all that determines the result."""
        identity = [self.kind, self.settings_json, [parent.key for parent in self.parents]]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    def folder(self, workdir: Path) -> StageFolder:
        """Return the folder in which the stage works and leaves its outcome."""
        return StageFolder.of(workdir, self.kind, self.key)

    @property
    def task(self) -> str | None:
        """The task that the stage trains on or scores, if any."""
        if isinstance(self.settings, PretrainSettings | FinetuneSettings):
            return self.settings.recipe.task
        return self.settings.task if isinstance(self.settings, EvaluateSettings) else None

    @property
    def texts(self) -> dict[str, str]:
        """For each task that this stage or an ancestor trains on, the hash of its text."""
        return {
            stage.settings.recipe.task: stage.settings.text
            for stage in ancestors(self)
            if isinstance(stage.settings, PretrainSettings | FinetuneSettings)
            and stage.settings.text is not None
        }

    @property
    def variant(self) -> Variant:
        """What result records say of the network."""
        return self.settings.variant

    @property
    def label(self) -> str:
        """What a person calls the stage, e.g. `uptrain (nano, 8 KV heads, mean, seed 0)`."""
        task = f" {self.task}" if self.kind in ("finetune", "evaluate") else ""
        return f"{self.kind}{task} ({', '.join(self._words())})"

    @property
    def title(self) -> str:
        """The label as a folder's name; the stage's TensorBoard events lie in it."""
        task = [self.task] if self.task and self.kind in ("finetune", "evaluate") else []
        return "-".join([self.kind, *task, *self._words(), self.key]).replace(" ", "_")

    def _words(self) -> list[str]:
        variant = self.variant
        self_heads, cross_heads = variant.num_kv_heads, variant.num_kv_heads_cross_attention
        words = [variant.size, f"{self_heads} KV heads"]
        words += [f"cross {cross_heads}"] if cross_heads != self_heads else []
        words += [variant.method_label] if variant.is_converted else []
        words += [f"alpha {variant.alpha:g}"] if variant.alpha else []
        # Timings depend on no seed.
        words += [f"seed {variant.seed}"] if self.kind != "benchmark" else []
        return words


def merge(plans: Iterable[list[Stage]]) -> list[Stage]:
    """Return every stage of several plans once, in the order in which stages first come."""
    merged: dict[str, Stage] = {}
    for stage in itertools.chain(*plans):
        merged.setdefault(stage.key, stage)
    return list(merged.values())


def ancestors(stage: Stage) -> list[Stage]:
    """Return the stage and all it builds on: itself first, the multi-head parent last."""
    return merge([[stage], *(ancestors(parent) for parent in stage.parents)])
