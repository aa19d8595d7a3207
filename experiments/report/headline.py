"""Say what fewer KV heads cost and save in a few sentences, with one small table below them.

The report and the text at the end of a run begin with both. Every other number is in the sections:
`variants_section` has all costs and scores, `how_many_heads` compares numbers of KV heads.
"""

import math
from collections.abc import Iterator

from experiments.report import method_comparison, tables
from experiments.report.estimate import Difference, Estimate
from experiments.report.summary import Summary
from experiments.report.tables import DASH
from experiments.report.variants_section import kv_heads
from experiments.stages.variant import Variant

MOST_ROWS = 12  # of the table; of more variants, only the telling ones are shown
NO_DIFFERENCE = "no difference shown"
Interval = tuple[float, float]


def chosen(summary: Summary, within: float) -> Variant | None:
    """Return the network that the sentence is about; None if no network has fewer KV heads.

    Networks that were scored beside their multi-head parent come first. Of these, the sentence is
    about the fewest KV heads whose score is shown to be within `within` points of the parent's, and
    about the best score that a network with so many KV heads has. Where no network is shown to be
    so near, the sentence is about the best score of all.

    Without any score, the sentence is about the lowest validation loss straight after conversion.
    """
    grouped = _grouped(summary, summary.scored)
    compared = [v for v in grouped if summary.against_parent(v)]
    if compared:
        near = [v for v in compared if _is_near(summary, v, within)]
        fewest = min((v.num_kv_heads for v in near), default=None)
        near = [v for v in near if v.num_kv_heads == fewest]
        return max(near or compared, key=lambda v: _gain(summary, v))

    # A set has no order of its own; equal losses should give equal reports.
    scored = [v for v in grouped if summary.average(v)]
    converted = sorted(_grouped(summary, summary.converted), key=lambda v: (v.size, v.order))
    for several in () if scored else (converted, grouped):
        measured = [v for v in several if method_comparison.damage(summary, v)]
        if measured:
            return max(measured, key=lambda v: _gain(summary, v))
    return next(iter(scored or grouped), None)


def _grouped(summary: Summary, variants) -> list[Variant]:
    """Return the variants with fewer KV heads than their parent.

    Networks whose decoder attentions have different numbers of KV heads, or whose encoder has
    fewer, are kept only where there are no others.
    """
    grouped = [v for v in variants if v.shape != v.parent]
    return [v for v in grouped if v.groups_decoder_evenly] or grouped


def _is_near(summary, variant, within):
    """Return whether the whole interval of the difference is better than `within` points worse."""
    difference = summary.against_parent(variant)
    if difference.low is None:
        return False
    return difference.high < within if summary.scores_are_errors else difference.low > -within


def _gain(summary, variant):
    """Return by how much the score, or else the loss, is better than the parent's, if at all."""
    difference = summary.against_parent(variant)
    if difference is not None:
        return -difference.value if summary.scores_are_errors else difference.value
    damage = method_comparison.damage(summary, variant)
    return -math.inf if damage is None else -damage.value


# --- the sentence ---------------------------------------------------------------------------------


def sentence(summary: Summary, within: float) -> str:
    """Return what the chosen network costs and saves, then the paper's method, then the seeds.

    Args:
        within: as for `chosen`.
    """
    variant = chosen(summary, within)
    if variant is None:
        return "These results hold no network with fewer KV heads than its multi-head parent."
    parts = [
        f"{_subject(variant)} ({_origin(summary, variant, within)}) the network "
        f"{_quality(summary, variant, _over(summary))}{_costs(summary, variant)}.",
        *_papers_method(summary, variant),
        *_seeds(summary, variant),
    ]
    return " ".join(parts)


def _subject(variant):
    if variant.groups_decoder_evenly:
        return f"With {variant.num_kv_heads} of {variant.num_heads} KV heads"
    return f"As {variant.network} with {variant.num_heads} query heads"


def _origin(summary, variant, within):
    """Say how the network was made, and of how many networks it was chosen."""
    words = [_reached(variant)]
    if len({v.size for v in summary.variants}) > 1:
        words.append(variant.size)

    # The best of several is flattered by chance, so the reader should know of how many.
    rivals = [v for v in summary.scored if v.shape == variant.shape and summary.against_parent(v)]
    if len(rivals) > 1 and variant in rivals:
        is_best = variant == max(rivals, key=lambda v: _gain(summary, v))
        why = "the best" if is_best else f"shown to be within {within:g} points, one"
        words.append(f"{why} of {len(rivals)} such networks")
    return ", ".join(words)


def _reached(variant):
    if not variant.is_converted:
        return "trained from scratch"
    uptrained = f"uptrained with alpha {variant.alpha:g}" if variant.alpha else "not uptrained"
    return f"{variant.method_label}, {uptrained}"


def _over(summary):
    count = len(summary.tasks)
    return f" on average over {count} tasks" if count > 1 else ""


def _quality(summary: Summary, variant: Variant, over: str = "") -> str:
    """Say the score and its difference to the parent's, or else the validation loss and its own.

    Args:
        over: the words that say which tasks an average is over.
    """
    score = summary.average(variant)
    if score is not None:
        difference = summary.against_parent(variant)
        beside = f", {_points(difference)}" if difference else "; its parent was not scored"
        return f"{_scored(summary, score)}{over}{beside}"

    loss, damage = summary.loss(variant), method_comparison.damage(summary, variant)
    if loss is None:
        return "was not scored"
    text = f"has a validation loss of {loss.value:.3f} nats per token"
    return f"{text}, {_nats(damage)}" if damage else text


def _scored(summary, score):
    metrics = summary.headline_metrics
    if metrics == {"word_accuracy"}:
        return f"says {score.value:.1f}% of the words right"
    names = ", ".join(sorted(metrics)) + (", lower is better" if summary.scores_are_errors else "")
    return f"scores {score.value:.1f} ({names})"


def _points(difference: Difference) -> str:
    """Return `0.3 points below the multi-head parent (95% interval -0.9 to +0.2: ...)`."""
    interval = _interval(difference.low, difference.high, 1, difference.shown)
    if f"{abs(difference.value):.1f}" == "0.0":
        return f"less than 0.1 points from the multi-head parent ({interval})"
    side = "above" if difference.value > 0 else "below"
    return f"{abs(difference.value):.1f} points {side} the multi-head parent ({interval})"


def _nats(damage: Estimate) -> str:
    shown = damage.low is not None and damage.high is not None and damage.low * damage.high > 0
    interval = _interval(damage.low, damage.high, 3, shown)
    side = "above" if damage.value > 0 else "below"
    return f"{abs(damage.value):.3f} {side} the multi-head parent's ({interval})"


def _interval(low: float | None, high: float | None, digits: int, shown: bool) -> str:
    if low is None or high is None:
        return "no interval"
    # An end that is not 0 should not look like 0 where the difference is shown.
    if shown and 0 in (round(low, digits), round(high, digits)):
        digits += 1
    text = f"95% interval {low:+.{digits}f} to {high:+.{digits}f}"
    return text if shown else f"{text}: {NO_DIFFERENCE}"


def _costs(summary: Summary, variant: Variant) -> str:
    """Say the time per sample and the KV cache as parts of the parent's."""
    time = _ratio(summary, variant, "sample_seconds")
    cache = _ratio(summary, variant, "kv_cache_bytes")
    if time is None:
        return f", with {cache:.2f} of the KV cache" if cache else "; its time was not measured"

    spread = _time_spread(summary, variant)
    quartiles = ""
    if spread:
        quartiles = f"quartiles {spread[0]:.2f} to {spread[1]:.2f}"
        quartiles = f" ({quartiles}{'' if _is_clear(spread) else f': {NO_DIFFERENCE}'})"
    takes = f"generates a sample in {time:.2f} of the time{quartiles}"
    if time > 1 and (not spread or _is_clear(spread)):
        takes = f"is slower: a sample takes {time:.2f} times as long{quartiles}"
    return f", and {takes}{f' with {cache:.2f} of the KV cache' if cache else ''}"


def _ratio(summary: Summary, variant: Variant, metric: str) -> float | None:
    own = summary.get(variant, "benchmark", metric)
    parent = summary.get(variant.parent, "benchmark", metric)
    return own.value / parent.value if own and parent and parent.value else None


def _time_spread(summary: Summary, variant: Variant) -> Interval | None:
    """Return the least and the largest ratio of times that lie between the quartiles of both."""
    own = summary.get(variant, "benchmark", "sample_seconds")
    parent = summary.get(variant.parent, "benchmark", "sample_seconds")
    if not own or own.low is None or own.high is None:
        return None
    # A time of 0 is no measurement, and nothing can be divided by it.
    if not parent or not parent.low or not parent.high:
        return None
    return own.low / parent.high, own.high / parent.low


def _is_clear(spread: Interval) -> bool:
    """Return whether both ends of an interval of ratios are on one side of 1."""
    return spread[1] < 1 or spread[0] > 1


def _papers_method(summary: Summary, variant: Variant) -> Iterator[str]:
    """Say how the paper's conversion fares, if the sentence is about another one."""
    if variant.conversion == method_comparison.REFERENCE:
        return
    mean = variant.made_by(method_comparison.REFERENCE, 0.0)
    same = [v for v in summary.scored if v.at(0.0) == mean and summary.against_parent(v)]
    # Losses are compared straight after conversion.
    if not summary.average(variant) and method_comparison.damage(summary, mean):
        same = [mean]
    if same:
        # The alpha that the paper recommends, or else the nearest one.
        best = min(same, key=lambda v: abs(v.alpha - method_comparison.ALPHA))
        yield f"The paper's method ({_reached(best)}) {_quality(summary, best)}."


def _seeds(summary: Summary, variant: Variant) -> Iterator[str]:
    numbers = [summary.average(v) or summary.loss(v) for v in (variant, variant.parent)]
    seeds = min((number.seeds for number in numbers if number), default=0)
    if seeds > 1:
        yield f"These are means over {seeds} seeds."
    elif seeds and summary.average(variant):
        yield "All is from one seed: the intervals leave out the chance in training."
    elif seeds:
        yield "All is from one seed."


# --- the table ------------------------------------------------------------------------------------


def table(summary: Summary, within: float) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: cost and quality of each variant, in at most seven columns."""
    has_scores = bool(summary.tasks)
    quality = ["average" if len(summary.tasks) > 1 else "score", "difference to MHA"]
    header = ["variant", "KV heads", "KV cache", "time / sample"]
    header += quality if has_scores else ["loss", "above MHA's"]
    cells = _score_cells if has_scores else _loss_cells
    rows = [
        [
            summary.title(variant),
            kv_heads(variant),
            _cost(summary, variant, "kv_cache_bytes", tables.size),
            _cost(summary, variant, "sample_seconds", tables.seconds),
            *cells(summary, variant),
        ]
        for variant in shown(summary, within)
    ]
    return header, rows


def shown(summary: Summary, within: float, most: int = MOST_ROWS) -> list[Variant]:
    """Return at most `most` variants to show: all, or the telling ones of many.

    Of many, these are the parent of the chosen network, the chosen network, and of each network the
    best variant and the paper's conversion at the alpha that the paper recommends.
    """
    main = chosen(summary, within)
    if main is None or len(summary.scored) <= most:
        return summary.scored[:most]

    by_shape: dict = {}
    for v in summary.scored:
        by_shape.setdefault(v.shape, []).append(v)
    kept = [main.parent, main]
    for shape, rivals in by_shape.items():
        kept.append(max(rivals, key=lambda v: _gain(summary, v)))
        kept.append(shape.made_by(method_comparison.REFERENCE, method_comparison.ALPHA))

    # The chosen network may have no row of its own: uptrained networks stand for converted ones.
    known = [v for v in dict.fromkeys(kept) if v in summary.scored or v == main][:most]
    order = {v: i for i, v in enumerate(summary.scored)}
    return sorted(known, key=lambda v: order.get(v, order.get(v.parent, 0)))


def note(summary: Summary, within: float) -> str:
    """Return what the columns of the table mean, and how many variants the table leaves out."""
    parts = ["Ratios compare with the multi-head parent (MHA).", "KV cache: of one sequence."]
    if summary.tasks:
        names, metrics = ", ".join(summary.tasks), ", ".join(sorted(summary.headline_metrics))
        what = f"average of {names}" if len(summary.tasks) > 1 else f"of {names}"
        parts.append(
            f"Score: {metrics} in percent, {what}. Difference: in points, with its 95% interval."
        )
    else:
        parts.append("Loss: validation loss of the pretraining task, in nats per token.")
    left_out = len({*summary.scored} - {*shown(summary, within)})
    if left_out:
        parts.append(f"{left_out} more variants are in the report.")
    return " ".join(parts)


def _cost(summary, variant, metric, form):
    """Return a cost with its ratio to the parent's: `256 KiB (0.50x)`."""
    cost, ratio = summary.get(variant, "benchmark", metric), _ratio(summary, variant, metric)
    if cost is None:
        return DASH
    if ratio is None or variant.shape == variant.parent:
        return form(cost.value)
    return f"{form(cost.value)} ({ratio:.2f}x)"


def _score_cells(summary, variant):
    score, difference = summary.average(variant), summary.against_parent(variant)
    cells = [DASH if score is None else f"{score.value:.1f}", DASH]
    if difference:
        cells[1] = f"{difference.value:+.1f}"
        if difference.low is not None and difference.high is not None:
            cells[1] += f" [{difference.low:+.1f}, {difference.high:+.1f}]"
    return cells


def _loss_cells(summary, variant):
    loss, damage = summary.loss(variant), method_comparison.damage(summary, variant)
    cells = [DASH if loss is None else f"{loss.value:.3f}", DASH]
    if damage and variant != variant.parent:
        cells[1] = f"{damage.value:+.3f}"
    return cells
