"""The report's tables of all variants: their costs, their scores, and the differences to MHA."""

from experiments.report import safe_text, tables
from experiments.report.estimate import Difference, Estimate
from experiments.report.summary import Summary
from experiments.report.tables import DASH
from experiments.stages.variant import Variant

NO_DIFFERENCE = "none shown"
COSTS = {
    "parameters": ("num_params", tables.count),
    "KV cache / sequence": ("kv_cache_bytes", tables.size),
    "time / token": ("token_seconds", tables.seconds),
    "prefill": ("prefill_seconds", tables.seconds),
    "time / sample": ("sample_seconds", tables.seconds),
}
COST_NOTE = (
    "Parentheses compare with the MHA parent of the same size: a cost as a ratio and in percent, a "
    "score in points and in percent. Prefill (the encoder, and the keys and values of "
    "cross-attention) and time per token are times of a whole batch; time per sample is the time "
    "of a whole batch divided by its size. KV cache and time do not depend on the values of the "
    "weights, so all conversions to the same shape share one measurement. With a per-layer "
    "budget, the method decides how many KV heads each layer has, so every method is measured "
    "separately. Each network is timed in turns with a multi-head network. If the multi-head "
    "network was timed in several runs, the times shown are the ratio of the two in their common "
    "run, multiplied by the multi-head network's latest time."
)
QUALITY_NOTE = (
    "Brackets hold 95% intervals (bootstrap over test examples; with several seeds, the interval "
    "of their mean is added in quadrature). A difference compares two networks on the same "
    "resampled examples and on the seeds that both have, so that examples which are hard for both "
    "cancel, and its interval is narrower than those of the two scores suggest. "
    f'"{NO_DIFFERENCE}" means that the interval of the difference contains 0. "(u)" marks a '
    "difference of scores without resampled examples in common, compared as if they were "
    "independent."
)


def section(summary: Summary) -> str:
    """Return the section as Markdown."""
    parts = ["## Variants", tables.markdown(*_cost_table(summary)), COST_NOTE]
    parts += ["### Scores", tables.markdown(*_score_table(summary))]
    header, rows = _differences(summary)
    if rows:
        parts += ["### Difference to MHA, in points", tables.markdown(header, rows)]
    return "\n\n".join([*parts, QUALITY_NOTE, _sample_sizes(summary)])


def _cost_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            summary.title(variant),
            kv_heads(variant),
            *[_cost(summary, variant, *cost) for cost in COSTS.values()],
        ]
        for variant in summary.scored
    ]
    return ["variant", "KV heads", *COSTS], rows


def _score_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    columns = _quality_columns(summary)
    rows = [
        [
            summary.title(variant),
            _seeds(summary, variant),
            *[_quality(summary, variant, task) for task in columns.values()],
        ]
        for variant in summary.scored
    ]
    return ["variant", "seeds", *columns], rows


def _quality_columns(summary: Summary) -> dict[str, str | None]:
    """Return task by title; None stands for the average of several."""
    columns = {f"{task} ({_unit(summary, task)})": task for task in summary.tasks}
    return columns | ({"average (%)": None} if len(columns) > 1 else {})


def _unit(summary, task):
    return next((s.unit for v in summary.scored if (s := summary.headline(v, task))), "%")


def kv_heads(variant: Variant) -> str:
    """Return the KV heads of the decoder's attentions: `8`, or `self 4, cross 2`."""
    if variant.num_kv_heads_cross_attention == variant.num_kv_heads:
        return str(variant.num_kv_heads)
    return f"self {variant.num_kv_heads}, cross {variant.num_kv_heads_cross_attention}"


def _seeds(summary, variant):
    scores = [summary.headline(variant, task) for task in summary.tasks]

    # Tasks may have different numbers of seeds, as in "2-3".
    counts = sorted({score.seeds for score in scores if score})
    return "-".join(str(count) for count in counts) or DASH


def _cost(summary, variant, metric, form):
    """Return one cost with its ratio to the parent's: `256 KiB (0.50x, -50%)`."""
    cost = summary.get(variant, "benchmark", metric)
    parent_cost = summary.get(variant.parent, "benchmark", metric)
    if cost is None:
        return DASH

    # The parent itself, and a network without a timed parent, have nothing to be compared with.
    if parent_cost is None or variant.shape == variant.parent or not parent_cost.value:
        return form(cost.value)
    ratio = cost.value / parent_cost.value
    return f"{form(cost.value)} ({ratio:.2f}x, {_percent(ratio - 1)})"


def _percent(change):
    return f"{round(100 * change):+d}%"


def _quality(summary: Summary, variant: Variant, task: str | None) -> str:
    """Return a score with its interval and its difference to the parent's score."""
    score = summary.average(variant) if task is None else summary.headline(variant, task)
    difference = summary.against_parent(variant, task)
    if score is None or difference is None:
        return interval(score)
    if not difference.shown:
        return f"{interval(score)} ({NO_DIFFERENCE})"

    # The difference may leave out seeds that only one network has, so take the parent's score that
    # is consistent with the two numbers printed here.
    parent_score = score.value - difference.value
    relative = f", {_percent(difference.value / parent_score)}" if parent_score else ""
    return f"{interval(score)} ({difference.value:+.1f}{relative})"


def interval(score: Estimate | None) -> str:
    """Return a score with its interval: `24.0 [22.5, 25.5]`."""
    if score is None:
        return DASH
    if score.low is None:
        return f"{score.value:.1f}"
    return f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"


def signed(difference: Difference | None) -> str:
    """Return a difference with its interval: `-1.00 [-1.52, -0.48]`."""
    if difference is None:
        return DASH
    if difference.low is None:
        return f"{difference.value:+.2f}"
    unpaired = "" if difference.paired else " (u)"
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]{unpaired}"


def _differences(summary):
    columns = _quality_columns(summary)
    rows = [
        [
            summary.title(variant),
            *[signed(summary.against_parent(variant, task)) for task in columns.values()],
        ]
        for variant in summary.scored
    ]

    # The parents themselves have no difference; their rows would hold dashes alone.
    return ["variant", *columns], [row for row in rows if {*row[1:]} - {DASH}]


def _sample_sizes(summary):
    parts = []
    for task in summary.tasks:
        scores = [summary.headline(v, task) for v in summary.scored]

        # One number, unless variants were scored on different test sets: "200 or 400".
        counts = sorted({s.n for s in scores if s and s.n})
        parts += [f"{safe_text.markdown(task)} {' or '.join(map(str, counts))}"] if counts else []
    return f"Test examples: {', '.join(parts)}." if parts else "No task has been evaluated yet."
