"""The figures of the report, drawn without pyplot: no global state, no display."""

import os
from pathlib import Path

from matplotlib.figure import Figure

from experiments import paper
from experiments.summary import Summary

# Okabe and Ito's palette, told apart with any colour vision; markers differ too, for grey print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PAPER_STYLE = {  # color, marker, label offset in points, alignment
    "MHA-XXL": (COLORS[0], "o", (-8, -3), "right"),
    "GQA-8-XXL": (COLORS[1], "s", (8, -3), "left"),
    "MQA-XXL": (COLORS[2], "^", (8, -3), "left"),
    "MHA-Large": (COLORS[6], "X", (8, -3), "left"),
}


def quality_against_time(summary: Summary, path: str | os.PathLike) -> None:
    """Draw score against time per sample, ours beside the paper's Figure 3, on separate axes."""
    points = [
        (i, summary.get(v, "benchmark", "sample_seconds"), summary.average(v))
        for i, v in enumerate(summary.variants)
    ]
    points = [point for point in points if None not in point]
    figure = Figure(figsize=(7.2, 3.2 + 0.2 * len(points)), layout="constrained")
    ours, published = figure.subplots(1, 2)
    for i, time, quality in points:
        color, marker = _style(i)
        ours.errorbar(
            time.value * 1e3,
            quality.value,
            xerr=_error_bar(time, 1e3),
            yerr=_error_bar(quality, 1),
            label=summary.title(summary.variants[i]),
            color=color,
            marker=marker,
            linestyle="none",
            elinewidth=0.8,
            capsize=2,
        )
    ours.set(title="Ours", xlabel="Time per sample (ms)", ylabel=f"Score: {_score_name(summary)}")
    if points:
        _legend_below(ours)
        ours.set_xlim(0, 1.08 * ours.get_xlim()[1])
    else:
        note = "no variant has both\na score and a timing yet"
        ours.text(0.5, 0.5, note, ha="center", va="center", transform=ours.transAxes)
    _draw_published(published)
    for axes in (ours, published):
        _tidy(axes)
    _save(figure, path)


def _draw_published(axes):
    for model, (color, marker, offset, alignment) in PAPER_STYLE.items():
        seconds, average = paper.TABLE1[model][:2]
        axes.plot(seconds, average, color=color, marker=marker, linestyle="none")
        axes.annotate(
            model,
            (seconds, average),
            offset,
            textcoords="offset points",
            fontsize=8,
            ha=alignment,
        )
    axes.set(
        title="Published: T5 on TPUv4",
        xlabel="Time per sample (s)",
        ylabel="Average of 7 tasks",
        xlim=(0, 1.7),
        ylim=(45.8, 47.4),
    )


def pretraining_loss(summary: Summary, path: str | os.PathLike) -> bool:
    """Draw validation loss from the parent over conversion to the end of uptraining.

    Returns whether there was anything to draw.
    """
    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, variant in enumerate(summary.variants):
        stages = [
            summary.get(variant.parent, "pretrain", "validation_loss"),
            summary.get(variant, "convert", "validation_loss"),
            summary.get(variant, "uptrain", "validation_loss"),
        ]
        if stages[1] is None:
            continue
        steps = [(x, loss.value) for x, loss in enumerate(stages) if loss is not None]
        color, marker = _style(i)
        axes.plot(*zip(*steps, strict=True), color, marker=marker, label=summary.title(variant))
    if not axes.lines:
        return False
    axes.set_xticks(range(3), ["pretrained MHA", "converted", "uptrained"])
    axes.set(xlim=(-0.2, 2.2), ylabel="Validation loss (nats per token)")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _tidy(axes)
    _save(figure, path)
    return True


def time_by_groups(lines: dict[tuple[str, bool], list], path: str | os.PathLike) -> None:
    """Draw seconds per sample against KV heads, beside the paper's Figure 6.

    `lines` has, by label and whether it is at the largest batch, pairs of a number of KV heads and
    a record with low and high.
    """
    figure = Figure(figsize=(7.2, 3.2 + 0.19 * len(lines)), layout="constrained")
    ours, published = figure.subplots(1, 2)
    labels = list(dict.fromkeys(label for label, _ in lines))
    for (label, largest), points in lines.items():
        heads, seconds = zip(*points, strict=True)
        color, marker = _style(labels.index(label))
        below = [s["value"] - s["low"] for s in seconds]
        above = [s["high"] - s["value"] for s in seconds]
        ours.errorbar(
            heads,
            [s["value"] for s in seconds],
            yerr=[below, above],
            label=f"{label}, largest batch" if largest else label,
            color=color,
            marker=marker,
            markerfacecolor="white" if largest else color,
            linestyle="--" if largest else "-",
            elinewidth=0.8,
            capsize=2,
        )
    published.plot(*zip(*paper.FIGURE6.items(), strict=True), color=COLORS[6], marker="o")
    ours.set_title("This run")
    published.set_title("Published: T5-XXL on TPUv4")
    for axes in (ours, published):
        heads = sorted({int(K) for line in axes.lines for K in line.get_xdata()})
        axes.set_xscale("log", base=2)
        axes.set_xticks(heads, [str(K) for K in heads])
        axes.minorticks_off()
        axes.set(xlabel="KV heads", ylabel="Time per sample (s)", ylim=(0, None))
        _tidy(axes)
    _legend_below(ours)
    _save(figure, path)


def _style(i):
    """Return color and marker of the variant in row `i`, the same in every figure."""
    return COLORS[i % len(COLORS)], MARKERS[(i + i // len(COLORS)) % len(MARKERS)]


def _error_bar(estimate, scale):
    if estimate.low is None:
        return None
    below, above = estimate.value - estimate.low, estimate.high - estimate.value
    return [[max(below, 0) * scale], [max(above, 0) * scale]]


def _score_name(summary):
    count = len(summary.tasks)
    if count != 1:
        return f"average of {count} tasks (%)"
    metric = [summary.get(v, "evaluate", "headline", summary.tasks[0]) for v in summary.variants]
    unit = next((m.unit for m in metric if m is not None), "%")
    return f"{summary.tasks[0]} ({unit})"


def _legend_below(axes):
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _tidy(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure, path):
    """Write under a temporary name first, so that a reader never sees half a picture."""
    temporary = Path(f"{path}.tmp")
    figure.savefig(temporary, format=Path(path).suffix[1:], dpi=200)
    os.replace(temporary, path)
