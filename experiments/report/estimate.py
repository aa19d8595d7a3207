"""Average a number over seeds, with its interval, and compare two such averages pair by pair.

All intervals are 95%. Their half widths from the test examples (bootstrap) and from the seeds
(Student's t) add in quadrature, because the two sources of chance are independent.
"""

from typing import Any, NamedTuple, cast

import numpy as np
from scipy import stats

Z = 1.96  # standard errors to either end of a 95% interval of something normal


class Run(NamedTuple):
    """One seed's number; `replicates` [r] are the same number over resampled test examples."""

    value: float
    n: int | tuple | None
    replicates: np.ndarray | None


class Estimate(NamedTuple):
    """A mean over seeds; `low` and `high` are None where there is no interval."""

    value: float
    low: float | None
    high: float | None
    unit: str
    n: int | None
    seeds: int
    runs: dict[int, Run]


class Difference(NamedTuple):
    """One estimate minus another, in their unit.

    `examples` and `seeds` are the half widths that the test examples and the seeds add to the
    interval; `paired` says whether both were compared over the same resampled examples.
    """

    value: float
    low: float | None
    high: float | None
    examples: float
    seeds: float
    paired: bool

    @property
    def shown(self) -> bool:
        """Whether there is an interval, and it does not hold 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def over_seeds(records: dict[int, dict]) -> Estimate:
    """Average the records of one number, by seed."""
    found = [*records.values()]
    values = [r["value"] for r in found]
    value, last = float(np.mean(values)), found[-1]
    runs = {seed: _run(record) for seed, record in records.items()}
    rest = {"unit": last["unit"], "n": last["n"], "seeds": len(found), "runs": runs}
    below, above, spread = 0.0, 0.0, _spread(values)
    if not any(r["low"] is None or r["high"] is None for r in found):
        below = np.mean([r["value"] - r["low"] for r in found])
        above = np.mean([r["high"] - r["value"] for r in found])
    elif not spread:
        return Estimate(value, None, None, **rest)
    low, high = value - np.hypot(below, spread), value + np.hypot(above, spread)
    return Estimate(value, float(low), float(high), **rest)


def _run(record):
    replicates = record.get("replicates")
    return Run(record["value"], record["n"], replicates and np.asarray(replicates))


def _spread(values):
    """Return the half width of the mean's interval that follows from the seeds' spread alone."""
    count = len(values)
    if count < 2:
        return 0.0
    return float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))


def of(values: dict[int, float], unit: str) -> Estimate:
    """Return the mean of one number per seed, with the interval of their spread."""
    value, spread = float(np.mean([*values.values()])), _spread([*values.values()])
    runs = {seed: Run(x, None, None) for seed, x in values.items()}
    low, high = (value - spread, value + spread) if len(values) > 1 else (None, None)
    return Estimate(value, low, high, unit, None, len(values), runs)


def apart(own: Estimate | None, other: Estimate | None) -> Estimate | None:
    """Subtract `other` from `own` seed by seed; None if either is missing or no seed is shared."""
    if own is None or other is None:
        return None
    values = {
        s: own.runs[s].value - other.runs[s].value for s in sorted(own.runs.keys() & other.runs)
    }
    return of(values, own.unit) if values else None


def average(estimates: list[Estimate]) -> Estimate:
    """Average over tasks. Half widths add in quadrature, because test sets are independent."""
    value = float(np.mean([e.value for e in estimates]))
    seeds = set.intersection(*(set(e.runs) for e in estimates))
    runs = {seed: _average_runs([e.runs[seed] for e in estimates]) for seed in sorted(seeds)}
    rest: dict[str, Any] = {
        "unit": "%",
        "n": None,
        "seeds": min(e.seeds for e in estimates),
        "runs": runs,
    }
    if any(e.low is None for e in estimates):
        return Estimate(value, None, None, **rest)
    # An estimate has both ends of its interval or none.
    lows = [cast(float, e.low) for e in estimates]
    highs = [cast(float, e.high) for e in estimates]
    below_mean = [e.value - low for e, low in zip(estimates, lows, strict=True)]
    above_mean = [high - e.value for e, high in zip(estimates, highs, strict=True)]
    below = float(np.linalg.norm(below_mean)) / len(estimates)
    above = float(np.linalg.norm(above_mean)) / len(estimates)
    return Estimate(value, value - below, value + above, **rest)


def _average_runs(runs):
    replicates = [run.replicates for run in runs]
    alike = all(r is not None and len(r) == len(replicates[0]) for r in replicates)
    return Run(
        float(np.mean([run.value for run in runs])),
        tuple(run.n for run in runs),
        np.mean(replicates, axis=0) if alike else None,
    )


def difference(own: Estimate, other: Estimate) -> Difference:
    """Subtract `other` from `own`, seed by seed and replicate by replicate where both have them.

    Both networks were scored on the same examples. An example that is hard for one is hard for the
    other, so this part of the chance cancels and the interval is narrower. Seeds that only one
    network has are left out. Without replicates over the same examples, the two scores are
    compared as if they were independent.
    """
    pairs: list[tuple[Any, Any]] = [
        (own.runs[s], other.runs[s]) for s in own.runs if s in other.runs
    ]
    if not pairs or not all(_comparable(*pair) for pair in pairs):
        return _unpaired(own, other)
    values = [a.value - b.value for a, b in pairs]
    replicates = np.mean([a.replicates - b.replicates for a, b in pairs], axis=0)
    # A difference of means is nearly normal, and 200 replicates tell a deviation better than ends.
    examples, seeds = Z * float(np.std(replicates, ddof=1)), _spread(values)
    value, half = float(np.mean(values)), float(np.hypot(examples, seeds))
    return Difference(value, value - half, value + half, examples, seeds, paired=True)


def _comparable(a, b):
    if a.replicates is None or b.replicates is None:
        return False
    return a.n == b.n and len(a.replicates) == len(b.replicates) > 1


def _unpaired(own, other):
    value = own.value - other.value
    if None in (own.low, own.high, other.low, other.high):
        return Difference(value, None, None, 0.0, 0.0, paired=False)
    below = float(np.hypot(own.value - own.low, other.high - other.value))
    above = float(np.hypot(own.high - own.value, other.value - other.low))
    return Difference(value, value - below, value + above, max(below, above), 0.0, paired=False)
