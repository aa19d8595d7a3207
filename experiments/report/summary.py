"""Turn result records into one estimate per variant, stage, task and metric.

The report has one row for each variant (`experiments/stages/variant.py`), averaged over its seeds
by `estimate`. The sections and figures read their numbers from a `Summary` and from nowhere else.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from experiments.report import estimate
from experiments.report.estimate import Difference, Estimate
from experiments.stages.typed_json import from_json
from experiments.stages.variant import Variant
from gqa.evaluation import results
from gqa.evaluation.metrics import LOWER_IS_BETTER
from gqa.runtime.errors import UserError

# Stages whose numbers belong to a task. Records of pretraining and uptraining name their text as
# task, but all networks of a report share this text; conversions and timings have no task.
TASK_STAGES = ("finetune", "evaluate")


def check_variant(record: dict[str, Any]) -> None:
    """Refuse a record whose variant is not one, such as a file may hold that was edited.

    Raises:
        UserError: naming the field of the variant.
    """
    variant = from_json(Variant, record["variant"], "variant")
    counts = [variant.num_heads, *variant.heads.values()]
    if min(counts) < 1:
        raise UserError("variant has a number of heads below 1")
    if not 0 <= variant.alpha < math.inf:
        raise UserError(f"variant.alpha is {variant.alpha}")


def variant_of(record: dict[str, Any]) -> Variant:
    """Return the variant that a result record is about, without its seed.

    A converted network is not uptrained yet, so its alpha is 0.
    """
    variant = dataclasses.replace(Variant(**record["variant"]), seed=0)
    return variant.at(0.0) if record["stage"] == "convert" else variant


class Summary:
    """The estimates of one command's records, by variant, stage, task and metric.

    Attributes:
        trained: the variants that were trained or scored.
        converted: the networks straight after their conversion, at alpha 0.
        variants: the rows of the report: sizes as they first come, each parent first.
        tasks: the names of the scored tasks, as they first come.
    """

    def __init__(self, records: list[dict]):
        by_seed: dict = defaultdict(dict)
        points: dict = defaultdict(lambda: defaultdict(dict))
        self._predictions = defaultdict(list)
        self._keys: dict = {}

        # A record is a point of a learning curve, one prediction, or a number of its own.
        for record in _same_clock(results.latest(records)):
            stage = record["stage"]
            task = record["task"] if stage in TASK_STAGES else None
            variant, seed = variant_of(record), record["variant"]["seed"]
            self._keys.setdefault((variant, stage, task), {})[seed] = record["stage_key"]
            if "step" in record:
                points[variant, stage, task][record["step"]][seed] = record
            elif "example" in record:
                self._predictions[variant, task, seed].append(record)
            else:
                by_seed[variant, stage, task, record["metric"]][seed] = record

        self._estimates = {key: estimate.over_seeds(seeds) for key, seeds in by_seed.items()}
        self._curves = {
            key: [(step, estimate.over_seeds(seeds)) for step, seeds in sorted(steps.items())]
            for key, steps in points.items()
        }

        # A converted network has a row only if nothing was trained from it. Otherwise the trained
        # network has the row, which also shows the loss after conversion.
        sizes = list(dict.fromkeys(key[0].size for key in by_seed))
        self.trained = {v for v, stage, _, _ in by_seed if stage not in ("convert", "benchmark")}
        self.converted = {v for v, stage, _, _ in by_seed if stage == "convert"}
        self.variants = sorted(
            self.trained | (self.converted - {v.at(0.0) for v in self.trained}),
            key=lambda v: (sizes.index(v.size), v != v.parent, v.order),
        )
        self.tasks = list(dict.fromkeys(t for _, stage, t, _ in by_seed if stage == "evaluate"))

    @property
    def scored(self) -> list[Variant]:
        """The variants that have a score in some task; all variants if no variant has a score."""
        scored = [v for v in self.variants if any(self.headline(v, task) for task in self.tasks)]
        return scored or self.variants

    @property
    def headline_metrics(self) -> set[str]:
        """The names of the headline metrics of all tasks."""
        scores = [self.headline(v, task) for v in self.scored for task in self.tasks]
        return {score.unit.removesuffix(" %") for score in scores if score}

    @property
    def scores_are_errors(self) -> bool:
        """Whether the headline scores are error rates, of which a lower one is better."""
        metrics = self.headline_metrics
        return bool(metrics) and metrics <= set(LOWER_IS_BETTER)

    def title(self, variant: Variant) -> str:
        """Name a variant, with its size where the results hold several."""
        return self.sized(variant.label, variant)

    def sized(self, name: str, variant: Variant) -> str:
        """Add the variant's size to `name` where the results hold several."""
        several = len({v.size for v in self.variants}) > 1
        return f"{name}, {variant.size}" if several else name

    def get(self, variant: Variant, stage: str, metric: str, task=None) -> Estimate | None:
        """Return one estimate, None if the variant was not measured so."""
        # One conversion serves every alpha and beta, one timing every way of reaching the weights.
        if stage == "convert":
            variant = variant.made_by(variant.conversion.before_uptraining, 0.0)
        if stage == "benchmark":
            variant = variant.timed
        return self._estimates.get((variant, stage, task, metric))

    def metrics(self, stage: str, task: str) -> list[str]:
        """Return the names of all metrics that any variant has in a stage and task."""
        return list(dict.fromkeys(m for _, s, t, m in self._estimates if (s, t) == (stage, task)))

    def curve(self, variant: Variant, stage: str, task=None) -> list[tuple[int, Estimate]]:
        """Return pairs of a step and the validation loss at that step."""
        return self._curves.get((variant, stage, task), [])

    def predictions(self, variant: Variant, task: str) -> list[dict]:
        """Return the records of the example predictions, from the first seed that has any."""
        seeds = [s for v, t, s in self._predictions if (v, t) == (variant, task)]
        return self._predictions[variant, task, min(seeds)] if seeds else []

    def stage_key(self, variant: Variant, stage: str, task: str | None = None) -> str | None:
        """Return the key of the stage that gave these numbers, of the first seed that has any."""
        keys = self._keys.get((variant, stage, task), {})
        return keys[min(keys)] if keys else None

    def headline(self, variant: Variant, task: str) -> Estimate | None:
        """Return the variant's score in one task."""
        return self.get(variant, "evaluate", "headline", task)

    def average(self, variant: Variant) -> Estimate | None:
        """Average the headline over all tasks; None unless the variant has every one."""
        # An average over fewer tasks would compare with no other variant's.
        scores = [self.headline(variant, task) for task in self.tasks]
        known = [score for score in scores if score is not None]
        if not known or len(known) < len(scores):
            return None
        return estimate.average(known)

    def against_parent(self, variant: Variant, task: str | None = None) -> Difference | None:
        """Subtract the multi-head parent's score in one task, or its average over all."""
        score = self.average if task is None else lambda v: self.headline(v, task)
        variant_score, parent_score = score(variant), score(variant.parent)
        if variant_score is None or parent_score is None or variant == variant.parent:
            return None
        return estimate.difference(variant_score, parent_score)

    def losses(self, variant: Variant) -> tuple[Estimate | None, ...]:
        """Return three validation losses on the pretraining task: pretrained, converted, uptrained.

        A converted variant started as its multi-head parent, any other as itself.
        """
        start = variant.parent if variant.is_converted else variant.shape
        stages = ((start, "pretrain"), (variant, "convert"), (variant, "uptrain"))
        return tuple(self.get(v, stage, "validation_loss") for v, stage in stages)

    def loss(self, variant: Variant) -> Estimate | None:
        """Return the validation loss on the pretraining task before any fine-tuning."""
        before, converted, uptrained = self.losses(variant)
        if variant.alpha:
            return uptrained
        return converted if variant.is_converted else before


def _same_clock(records: list[dict]) -> Iterator[dict]:
    """Scale every timing to the machine's speed at the latest timing of its reference.

    Each network is timed in turns with a reference: the multi-head network of size `parent_size`,
    which took `parent_value`. The reference is timed again with the next network, when the machine
    may be faster or slower. Times of two networks therefore compare only as ratios to their
    reference, so the report shows this ratio multiplied by the latest time of the reference.
    """
    # Records are in the order in which they were written, so the latest of each reference remains.
    references = {}
    for record in records:
        variant = variant_of(record)
        if record["stage"] == "benchmark" and variant == variant.parent:
            references[variant.size, record["metric"]] = record
    for record in records:
        scale = _clock(record, references)
        if scale != 1:
            scaled = {name: record[name] * scale for name in ("value", "low", "high")}
            record = record | scaled
        yield record


def _clock(record, references, seen=()):
    """Return the factor by which `_same_clock` multiplies a record; 1 if it has no reference.

    A reference may itself have been timed beside a reference of another size.
    """
    # `seen` ends the chain where two references were timed beside each other.
    key = record.get("parent_size", record["variant"]["size"]), record["metric"]
    if "parent_value" not in record or key not in references or key in seen:
        return 1.0
    latest = references[key]
    if latest is record:
        return 1.0
    return latest["value"] * _clock(latest, references, (*seen, key)) / record["parent_value"]
