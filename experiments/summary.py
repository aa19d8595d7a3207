"""Result records -> one estimate per variant, stage, task and metric."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from scipy import stats

from gqa import results

TASK_STAGES = ("finetune", "evaluate")  # the others' task is the pretraining text, or none


class Variant(NamedTuple):
    """What sets one row of the report apart from another; seeds are averaged over."""

    size: str
    num_heads: int
    num_kv_heads: int
    cross_num_kv_heads: int
    encoder_num_kv_heads: int
    method: str
    alpha: float

    @property
    def label(self) -> str:
        """Name the variant as the paper does, with how it was reached where it was converted."""
        name = {self.num_heads: "MHA", 1: "MQA"}.get(self.num_kv_heads, f"GQA-{self.num_kv_heads}")
        if self.cross_num_kv_heads != self.num_kv_heads:
            name += f" cross-{self.cross_num_kv_heads}"
        if self.encoder_num_kv_heads != self.num_heads:
            name += f" encoder-{self.encoder_num_kv_heads}"
        if self.method != "none":
            name += f" {self.method}"
        elif self.parent != self._replace(alpha=0.0):
            name += " from scratch"
        trained_further = self.method != "none" or self.alpha
        return f"{name}, alpha {self.alpha:g}" if trained_further else name

    @property
    def parent(self) -> "Variant":
        """The multi-head model that this variant was converted from, or is compared with."""
        return Variant(self.size, *[self.num_heads] * 4, method="none", alpha=0.0)


class Estimate(NamedTuple):
    """A mean over seeds; `low` and `high` are None where there is no interval."""

    value: float
    low: float | None
    high: float | None
    unit: str
    n: int | None
    seeds: int


class Summary:
    """The estimates of a results file, by variant, stage, task and metric."""

    def __init__(self, records: list[dict]):
        self._uptrained = {_variant(r) for r in records if r["stage"] == "uptrain"}
        by_seed = defaultdict(dict)
        for record in _same_clock(results.latest(records)):
            stage = record["stage"]
            task = record["task"] if stage in TASK_STAGES else None
            key = self.variant_of(record), stage, task, record["metric"]
            by_seed[key][record["variant"]["seed"]] = record
        self._estimates = {key: _estimate([*seeds.values()]) for key, seeds in by_seed.items()}
        sizes = list(dict.fromkeys(key[0].size for key in by_seed))
        trained = {variant for variant, stage, _, _ in by_seed if stage != "convert"}
        converted = {variant for variant, stage, _, _ in by_seed if stage == "convert"}
        self.variants = sorted(
            trained | (converted - {v._replace(alpha=0.0) for v in trained}),
            key=lambda v: (sizes.index(v.size), v != v.parent, *[-k for k in v[1:5]], *v[5:]),
        )
        self.tasks = list(dict.fromkeys(t for _, stage, t, _ in by_seed if stage == "evaluate"))

    def variant_of(self, record: dict) -> Variant:
        """Return the variant of the model that was measured, which a run's settings only imply.

        A converted run pretrains its parent; alpha has no meaning where nothing was uptrained,
        and one conversion may be uptrained to several.
        """
        variant = _variant(record)
        if record["stage"] == "pretrain" and variant.method != "none":
            return variant.parent
        unconverted = variant.method == "none" and variant not in self._uptrained
        if unconverted or record["stage"] == "convert":
            return variant._replace(alpha=0.0)
        return variant

    def title(self, variant: Variant) -> str:
        """Name a variant, with its size where the results hold several."""
        several = len({v.size for v in self.variants}) > 1
        return f"{variant.label}, {variant.size}" if several else variant.label

    def get(self, variant: Variant, stage: str, metric: str, task=None) -> Estimate | None:
        """Return one estimate, None where it was not measured."""
        if stage == "convert":
            variant = variant._replace(alpha=0.0)
        return self._estimates.get((variant, stage, task, metric))

    def metrics(self, stage: str, task: str) -> list[str]:
        """Return the names of all metrics that any variant has there."""
        return list(dict.fromkeys(m for _, s, t, m in self._estimates if (s, t) == (stage, task)))

    def average(self, variant: Variant) -> Estimate | None:
        """Average the headline over all tasks; None unless the variant has every one.

        The tasks' test sets are independent, so their half intervals add in quadrature.
        """
        scores = [self.get(variant, "evaluate", "headline", task) for task in self.tasks]
        if not scores or None in scores:
            return None
        value = float(np.mean([s.value for s in scores]))
        seeds = min(s.seeds for s in scores)
        if any(s.low is None for s in scores):
            return Estimate(value, None, None, "%", None, seeds)
        below = np.linalg.norm([s.value - s.low for s in scores]) / len(scores)
        above = np.linalg.norm([s.high - s.value for s in scores]) / len(scores)
        return Estimate(value, value - below, value + above, "%", None, seeds)


def differ(a: Estimate, b: Estimate) -> bool:
    """Say whether two intervals lie apart; without intervals nothing is shown."""
    if None in (a.low, a.high, b.low, b.high):
        return False
    return a.low > b.high or b.low > a.high


def _same_clock(records):
    """Scale each timing by how the parent's latest differs from the parent's of the same run.

    A timing compares only with what took turns with it (its `parent_value`): the parent is timed
    again beside every variant, on a machine that may be faster or slower by then.
    """
    parents = {
        (_variant(r).size, r["metric"]): r["value"]
        for r in records
        if r["stage"] == "benchmark" and _variant(r) == _variant(r).parent
    }
    for record in records:
        latest = parents.get((_variant(record).size, record["metric"]))
        if "parent_value" in record and latest:
            scale = latest / record["parent_value"]
            scaled = {name: record[name] * scale for name in ("value", "low", "high")}
            record = record | scaled
        yield record


def _variant(record):
    fields = {name: record["variant"][name] for name in Variant._fields}
    return Variant(**fields)._replace(alpha=fields["alpha"] or 0.0)


def _estimate(records):
    """Average over seeds: test-set and seed uncertainty add in quadrature (95%, Student's t)."""
    last = records[-1]
    values = [r["value"] for r in records]
    value, count = float(np.mean(values)), len(values)
    if any(r["low"] is None or r["high"] is None for r in records):
        return Estimate(value, None, None, last["unit"], last["n"], count)
    below = np.mean([r["value"] - r["low"] for r in records])
    above = np.mean([r["high"] - r["value"] for r in records])
    spread = 0.0
    if count > 1:
        spread = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    low, high = value - np.hypot(below, spread), value + np.hypot(above, spread)
    return Estimate(value, float(low), float(high), last["unit"], last["n"], count)
