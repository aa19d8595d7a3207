"""Average a number over seeds, with its interval, and compare two such averages pair by pair.

All intervals are 95%. Their half widths from the test examples (bootstrap) and from the seeds
(Student's t) add in quadrature, because the two sources of chance are independent.
"""

from typing import Any, NamedTuple, cast

import numpy as np
from scipy import stats

Z = 1.96  # a 95% interval of a normal number ends this many standard errors from the mean


class Run(NamedTuple):
    """One seed's number.

    Args:
        n: how many test examples the number is over; of an average over tasks, one count a task.
        replicates: [r], the same number over resampled test examples (bootstrap).
    """

    value: float
    n: int | tuple | None
    replicates: np.ndarray | None


class Estimate(NamedTuple):
    """A mean over seeds.

    Args:
        low, high: ends of the 95% interval; None where there is no interval.
        n: test examples of one seed's number.
        seeds: how many seeds the mean is over.
        runs: each seed's number.
    """

    value: float
    low: float | None
    high: float | None
    unit: str
    n: int | None
    seeds: int
    runs: dict[int, Run]


class Difference(NamedTuple):
    """One estimate minus another, in their unit.

    Args:
        low, high: ends of the 95% interval; None where there is no interval.
        examples: the half width of the interval that follows from the choice of test examples.
        seeds: the half width that follows from the seeds.
        paired: whether both estimates were compared over the same resampled examples.
    """

    value: float
    low: float | None
    high: float | None
    examples: float
    seeds: float
    paired: bool

    @property
    def shown(self) -> bool:
        """Return whether there is an interval and 0 lies outside it: a difference is shown."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def over_seeds(records: dict[int, dict]) -> Estimate:
    """Average the records of one number, given by seed."""
    by_seed = [*records.values()]
    values = [r["value"] for r in by_seed]
    value, last = float(np.mean(values)), by_seed[-1]
    runs = {seed: _run(record) for seed, record in records.items()}
    rest = {"unit": last["unit"], "n": last["n"], "seeds": len(by_seed), "runs": runs}

    # Each record may bring an interval of its own, such as a score's over its test examples. All
    # seeds are scored on the same examples, so more seeds do not narrow it: half widths are
    # averaged, not divided by sqrt(seeds). Without such intervals, the seeds' spread alone makes
    # the interval of the mean, and a single seed has none.
    below, above, spread = 0.0, 0.0, _spread(values)
    if not any(r["low"] is None or r["high"] is None for r in by_seed):
        below = np.mean([r["value"] - r["low"] for r in by_seed])
        above = np.mean([r["high"] - r["value"] for r in by_seed])
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

    # Student's t and not 1.96 standard errors, because so few seeds tell little about their own
    # spread: 12.7 standard errors with 2 seeds, 4.3 with 3.
    return float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))


def of(values: dict[int, float], unit: str) -> Estimate:
    """Return the mean of one number per seed, with the interval of their spread."""
    value, spread = float(np.mean([*values.values()])), _spread([*values.values()])
    runs = {seed: Run(x, None, None) for seed, x in values.items()}
    low, high = (value - spread, value + spread) if len(values) > 1 else (None, None)
    return Estimate(value, low, high, unit, None, len(values), runs)


def subtract(minuend: Estimate | None, subtrahend: Estimate | None) -> Estimate | None:
    """Return `minuend` - `subtrahend`, seed by seed; None if either is missing or no seed shared.

    The interval is that of the seeds' spread. `difference` compares scores, whose interval also
    has the chance of the test examples.
    """
    if minuend is None or subtrahend is None:
        return None
    shared_seeds = sorted(minuend.runs.keys() & subtrahend.runs.keys())
    values = {s: minuend.runs[s].value - subtrahend.runs[s].value for s in shared_seeds}
    return of(values, minuend.unit) if values else None


def average(estimates: list[Estimate]) -> Estimate:
    """Average over tasks. Half widths add in quadrature, because test sets are independent."""
    value = float(np.mean([e.value for e in estimates]))

    # A seed's average needs this seed in every task.
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

    # An estimate has both ends of its interval or none. The half width of a mean of independent
    # numbers is their norm divided by their count: 3 and 4 give 5 / 2 = 2.5.
    lows = [cast(float, e.low) for e in estimates]
    highs = [cast(float, e.high) for e in estimates]
    below_mean = [e.value - low for e, low in zip(estimates, lows, strict=True)]
    above_mean = [high - e.value for e, high in zip(estimates, highs, strict=True)]
    below = float(np.linalg.norm(below_mean)) / len(estimates)
    above = float(np.linalg.norm(above_mean)) / len(estimates)
    return Estimate(value, value - below, value + above, **rest)


def _average_runs(runs):
    replicates = [run.replicates for run in runs]

    # Replicate r of the average is the mean of the tasks' replicates r, so all tasks need equally
    # many. `n` keeps one count a task, so that `difference` sees whether two averages are over the
    # same test sets.
    alike = all(r is not None and len(r) == len(replicates[0]) for r in replicates)
    return Run(
        float(np.mean([run.value for run in runs])),
        tuple(run.n for run in runs),
        np.mean(replicates, axis=0) if alike else None,
    )


def difference(minuend: Estimate, subtrahend: Estimate) -> Difference:
    """Return `minuend` - `subtrahend`, paired by seed and by replicate where both have them.

    Both networks were scored on the same examples. An example that is hard for one is hard for the
    other, so this part of the chance cancels and the interval is narrower. Seeds that only one
    network has are left out. Without replicates over the same examples, the two scores are
    compared as if they were independent.
    """
    pairs: list[tuple[Any, Any]] = [
        (minuend.runs[s], subtrahend.runs[s]) for s in minuend.runs if s in subtrahend.runs
    ]
    if not pairs or not all(_comparable(*pair) for pair in pairs):
        return _unpaired(minuend, subtrahend)

    values = [a.value - b.value for a, b in pairs]
    replicates = np.mean([a.replicates - b.replicates for a, b in pairs], axis=0)

    # A difference of means is nearly normal, and 200 replicates estimate its standard deviation
    # more precisely than its 2.5% and 97.5% quantiles.
    examples, seeds = Z * float(np.std(replicates, ddof=1)), _spread(values)
    value, half = float(np.mean(values)), float(np.hypot(examples, seeds))
    return Difference(value, value - half, value + half, examples, seeds, paired=True)


def _comparable(a, b):
    if a.replicates is None or b.replicates is None:
        return False
    return a.n == b.n and len(a.replicates) == len(b.replicates) > 1


def _unpaired(a, b):
    """Return a - b of independent estimates."""
    value = a.value - b.value
    if None in (a.low, a.high, b.low, b.high):
        return Difference(value, None, None, 0.0, 0.0, paired=False)

    # The difference is low where `a` is low and `b` is high. Their intervals do not say which
    # part of them comes from the seeds, so all of it counts as the examples' part.
    below = float(np.hypot(a.value - a.low, b.high - b.value))
    above = float(np.hypot(a.high - a.value, b.value - b.low))
    return Difference(value, value - below, value + above, max(below, above), 0.0, paired=False)
