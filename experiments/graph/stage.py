"""A stage of the graph: its key, its folder and what a person calls it."""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.stages.folder import Course, StageFolder
from experiments.stages.settings import (
    LATER,
    EvaluateSettings,
    FinetuneSettings,
    PretrainSettings,
    Settings,
    Setup,
    UptrainSettings,
)
from experiments.stages.typed_json import to_json
from experiments.stages.variant import Variant
from gqa.conversion import learned

# Settings that change no parameter and no number, except for the order of additions: `remat` and
# `num_microbatches` exchange memory for time, as the mesh does.
SAME_RESULT = ("num_microbatches", "remat")
# Settings of a training stage that change what is measured, and no parameter that it hands on.
MEASURED = ("every", "validation_examples")
# Settings that say how long a stage trains.
LENGTHS = ("steps", "alpha")


def content_key(identity: list) -> str:
    """Return a hash of what determines a result, given as JSON."""
    return _hash(identity)[:12]


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
        # The parents' keys stand for their settings, so a change anywhere above gives another key.
        settings = _without(self.settings_json, SAME_RESULT)
        return content_key([self.kind, settings, [parent.key for parent in self.parents]])

    @property
    def course(self) -> Course | None:
        """The length of the training and its lineage; None if no longer stage may go on from it."""
        settings, lineage = self.settings, self._identity(LENGTHS)
        if isinstance(settings, UptrainSettings):
            # A learned pooling may follow a schedule over its whole length, as "fuse" does. Then a
            # step of a short uptraining differs from the same step of a longer one.
            is_learned = settings.variant.method in learned.METHODS
            pace = self.setup.pretrain
            measured = (pace.every, pace.validation_examples)
            return None if is_learned else Course(lineage, settings.variant.alpha, *measured)
        if isinstance(settings, PretrainSettings | FinetuneSettings):
            # A checkpoint of another program is not trained, whatever its number of steps.
            recipe = settings.recipe
            is_taken = isinstance(settings, PretrainSettings) and settings.initial_checkpoint
            measured = (recipe.every, recipe.validation_examples)
            return None if is_taken else Course(lineage, float(recipe.steps), *measured)
        return None

    def _identity(self, left_out: tuple[str, ...] = ()) -> str:
        """Return a hash of what determines the parameters, without the settings `left_out`.

        `left_out` applies to this stage alone, not to its parents.
        """
        # A fine-tuning hands on the best of the checkpoints that it validates, so there the
        # settings of validation do determine the parameters.
        if self.kind != "finetune":
            left_out += MEASURED
        settings = _without(self.settings_json, SAME_RESULT + left_out)
        return _hash([self.kind, settings, [parent._identity() for parent in self.parents]])

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
        """The hash of each text that this stage or an ancestor reads, by TASK/PART."""
        texts: dict[str, str | None] = {}
        for stage in ancestors(self):
            settings = stage.settings
            if isinstance(settings, PretrainSettings | FinetuneSettings):
                texts[f"{settings.recipe.task}/training"] = settings.text
            elif isinstance(settings, EvaluateSettings):
                texts[f"{settings.task}/test"] = settings.text
        return {name: text for name, text in texts.items() if text is not None}

    @property
    def variant(self) -> Variant:
        """The description of the network that result records carry."""
        return self.settings.variant

    @property
    def label(self) -> str:
        """The stage's name for a person, e.g. `uptrain (nano, 8 KV heads, mean, seed 0)`."""
        task = f" {self.task}" if self.kind in ("finetune", "evaluate") else ""
        return f"{self.kind}{task} ({', '.join(self._words())})"

    @property
    def title(self) -> str:
        """The label as a folder's name; the stage's TensorBoard events lie in it."""
        # The key makes the name unique: labels leave out most settings.
        task = [self.task] if self.task and self.kind in ("finetune", "evaluate") else []
        return "-".join([self.kind, *task, *self._words(), self.key]).replace(" ", "_")

    def _words(self) -> list[str]:
        variant = self.variant
        self_heads, cross_heads = variant.num_kv_heads, variant.num_kv_heads_cross_attention
        words = [variant.size, f"{self_heads} KV heads"]
        words += [f"cross {cross_heads}"] if cross_heads != self_heads else []
        words += [variant.method_label] if variant.is_converted else []
        # Timings depend neither on how the weights were reached nor on the seed.
        timed = self.kind == "benchmark"
        words += ["from scratch"] if variant.is_from_scratch and not timed else []
        words += [f"alpha {variant.alpha:g}"] if variant.alpha else []
        words += [f"seed {variant.seed}"] if not timed else []
        return words


def _without(settings: Any, names: tuple[str, ...]) -> Any:
    """Return settings without some keys, and without those of LATER, at any depth."""
    if isinstance(settings, dict):
        return {
            key: _without(value, names)
            for key, value in settings.items()
            # So stages that were finished before these settings came are found again.
            if key not in names and not (key in LATER and value == LATER[key])
        }
    if isinstance(settings, list | tuple):
        return [_without(value, names) for value in settings]
    return settings


def _hash(identity: list) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def merge(plans: Iterable[list[Stage]]) -> list[Stage]:
    """Return every stage of several plans once, in the order in which stages first come."""
    merged: dict[str, Stage] = {}
    for stage in itertools.chain(*plans):
        merged.setdefault(stage.key, stage)
    return list(merged.values())


def ancestors(stage: Stage) -> list[Stage]:
    """Return the stage and all it builds on: itself first, the multi-head parent last."""
    return merge([[stage], *(ancestors(parent) for parent in stage.parents)])
