"""Compare conversion methods by the loss that each costs and the uptraining that each saves.

Every loss is the validation loss on the pretraining task, in nats per token. Two losses are
compared seed by seed, because both came from the same multi-head parent and the same text.
`conversion_section` puts these numbers into tables, `figures_conversion` into figures.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from experiments.report import estimate
from experiments.report.estimate import Estimate
from experiments.report.summary import Summary
from experiments.stages.variant import Conversion, Variant

# The paper's method, and the alpha that it recommends (section 3.3).
REFERENCE, ALPHA = Conversion("mean", grouping="contiguous"), 0.05
ORDER = ("mean", "first", "random")  # the methods of the paper come first, in its order


class Saved(NamedTuple):
    """The alpha at which a method reaches the loss of the reference.

    Args:
        alpha: a mean over seeds; None if some seed never reaches the loss.
        missed: how many of the `seeds` never reach the loss.
    """

    alpha: Estimate | None
    missed: int
    seeds: int


def shapes(summary: Summary, least: int = 2) -> list[Variant]:
    """Return the grouped networks that `least` or more methods led to, most KV heads first."""
    by_shape: dict[Variant, set[Conversion]] = {}
    for v in summary.converted:
        by_shape.setdefault(v.shape, set()).add(v.conversion)
    compared = [shape for shape, conversions in by_shape.items() if len(conversions) >= least]
    return sorted(compared, key=lambda shape: (shape.size, shape.order))


def methods(summary: Summary, shape: Variant) -> list[Conversion]:
    """Return the methods that led to a network, the paper's first."""
    converted = {v.conversion for v in summary.converted if v.shape == shape}
    trained = {v.conversion for v in summary.trained if v.shape == shape and v.is_converted}
    return in_order(converted | trained)


def in_order(methods: Iterable[Conversion]) -> list[Conversion]:
    """Sort methods by name, the paper's first."""
    labels = {method: method.method_label for method in methods}
    rank = {label: i for i, label in enumerate(ORDER)}
    return sorted(labels, key=lambda m: (rank.get(labels[m], len(ORDER)), labels[m]))


def telling(losses: dict[Conversion, float], most: int) -> list[Conversion]:
    """Return at most `most` conversions to draw: all, or the paper's and the best of other kinds.

    Args:
        losses: a loss of each conversion, straight after it. Of each method the conversion with the
            lowest loss is drawn; its spaces and settings differ little and would hide each other.
    """
    if len(losses) <= most:
        return in_order(losses)
    best: dict[str, Conversion] = {}
    for conversion in sorted(losses, key=lambda c: (losses[c], c.method_label)):
        best.setdefault(conversion.method, conversion)

    # The paper's methods as the paper has them, not with a setting of ours that makes them better.
    papers = [c for c in in_order(losses) if c.method_label in ORDER]
    others = [c for c in best.values() if c.method not in ORDER]
    return in_order([*papers, *others][:most])


def curve(summary: Summary, shape: Variant, method: Conversion) -> dict[float, Estimate]:
    """Return the loss by alpha; at alpha 0 the network was converted and not uptrained."""
    # Alpha 0 is added, because a network that was only converted is not in `trained`.
    start = shape.made_by(method, 0.0)
    alphas = {v.alpha for v in summary.trained if v.at(0.0) == start} | {0.0}
    losses = {alpha: summary.loss(start.at(alpha)) for alpha in sorted(alphas)}
    return {alpha: loss for alpha, loss in losses.items() if loss}


def damage(summary: Summary, variant: Variant) -> Estimate | None:
    """Return the loss minus that of the multi-head parent, which was not trained further."""
    return estimate.subtract(summary.loss(variant), summary.loss(variant.parent))


def against_reference(summary: Summary, variant: Variant) -> Estimate | None:
    """Return the loss minus that of the reference, the mean after alpha 0.05."""
    reference = summary.loss(variant.made_by(REFERENCE, ALPHA))
    return estimate.subtract(summary.loss(variant), reference)


def soonest(summary: Summary, shape: Variant, method: Conversion) -> tuple[float, Estimate] | None:
    """Return the least alpha whose loss is shown to be below the reference's, and by how much."""
    for alpha in curve(summary, shape, method):
        difference = against_reference(summary, shape.made_by(method, alpha))
        if difference and difference.high is not None and difference.high < 0:
            return alpha, difference
    return None


def saved(summary: Summary, shape: Variant, method: Conversion) -> Saved | None:
    """Return the alpha at which a method reaches the mean's loss of alpha 0.05, interpolated."""
    points = curve(summary, shape, method)
    reference = summary.loss(shape.made_by(REFERENCE, ALPHA))
    if reference is None or len(points) < 2:
        return None

    # Each seed has its own curve and its own target, because networks of one seed share a parent.
    seeds = set(reference.runs).intersection(*(e.runs for e in points.values()))
    reached: dict[int, Any] = {}  # None where the reference is never reached
    for seed in sorted(seeds):
        losses = [(alpha, e.runs[seed].value) for alpha, e in points.items()]
        reached[seed] = next(_crossings(losses, reference.runs[seed].value), None)

    # One seed that never gets there leaves the mean without a value; a mean over the others would
    # flatter the method.
    missed = sum(alpha is None for alpha in reached.values())
    return Saved(None if missed or not seeds else estimate.of(reached, ""), missed, len(seeds))


def _crossings(losses: list[tuple[float, float]], target: float) -> Iterator[float]:
    """Yield the alphas at which straight lines between the points fall to the target loss."""
    if losses[0][1] <= target:
        yield losses[0][0]

    # For example, losses 3.0 at alpha 0 and 2.0 at alpha 0.1 reach the target 2.5 at alpha 0.05.
    for (left, above), (right, below) in itertools.pairwise(losses):
        if above > target >= below:
            yield left + (right - left) * (above - target) / (above - below)
