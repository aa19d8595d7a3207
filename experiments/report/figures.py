"""Quality against time, loss over conversion, and time against KV heads.

Drawn without pyplot: no global state, no display.
"""

import os
from pathlib import Path

from matplotlib.figure import Figure

from experiments.report import paper, plot
from experiments.report.summary import Summary
from experiments.stages.variant import Variant

PAPER_STYLE = {  # place in the palette, label offset in points, alignment
    "MHA-XXL": (0, (-8, -3), "right"),
    "GQA-8-XXL": (1, (8, -3), "left"),
    "MQA-XXL": (2, (8, -3), "left"),
    "MHA-Large": (6, (8, -3), "left"),
}


def quality_against_time(summary: Summary, folder: Path, shown: list[Variant]) -> str | None:
    """Draw score against time per sample, ours beside the paper's Figure 3, on separate axes.

    Return the figure's name, None if no shown variant has both.
    """
    # `i` counts all shown variants, also those without a point, so that a variant has the same
    # colour here and in `pretraining_loss`.
    points = []
    for i, variant in enumerate(shown):
        time = summary.get(variant, "benchmark", "sample_seconds")
        quality = summary.average(variant)
        if time is not None and quality is not None:
            points.append((i, time, quality))
    if not points:
        return None

    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    ours, published = figure.subplots(1, 2)
    for i, time, quality in points:
        ours.errorbar(
            time.value * 1e3,
            quality.value,
            xerr=plot.error_bar([time], 1e3),
            yerr=plot.error_bar([quality]),
            label=summary.title(shown[i]),
            linestyle="none",
            elinewidth=0.8,
            capsize=2,
            **plot.style(i),
        )

    ours.set(title="Ours", xlabel="Time per sample (ms)", ylabel=score_name(summary))

    # Begin at 0, so that a network which is twice as fast is drawn at half the distance.
    ours.set_xlim(0, 1.08 * ours.get_xlim()[1])

    _draw_published(published)
    plot.tidy(ours, published)
    plot.label_lines(figure, ours)
    plot.save_all(figure, folder, "quality_time")
    return "quality_time"


def _draw_published(axes):
    for model, (i, offset, alignment) in PAPER_STYLE.items():
        seconds, average = paper.TABLE1[model][:2]
        axes.plot(seconds, average, linestyle="none", **plot.style(i))
        place = {"textcoords": "offset points", "fontsize": 8, "ha": alignment}
        axes.annotate(model, (seconds, average), offset, **place)
    axes.set(
        title="Published: T5 on TPUv4",
        xlabel="Time per sample (s)",
        ylabel="Average of 7 tasks",
        xlim=(0, 1.7),
        ylim=(45.8, 47.4),
    )


def score_name(summary: Summary) -> str:
    """Name the axis of the average score."""
    count = len(summary.tasks)
    if count != 1:
        return f"Score: average of {count} tasks (%)"
    task = summary.tasks[0]
    scores = (summary.headline(v, task) for v in summary.scored)
    return f"Score: {task} ({next((s.unit for s in scores if s), '%')})"


def pretraining_loss(summary: Summary, folder: Path, shown: list[Variant]) -> str | None:
    """Draw validation loss from the parent over conversion to the end of uptraining.

    Return the figure's name, None if no shown variant was converted.
    """
    lines = {}
    for i, variant in enumerate(shown):
        losses = summary.losses(variant)

        # losses[1] is the loss after conversion. Without it there is no conversion to follow.
        if losses[1]:
            lines[i] = [(x, loss) for x, loss in enumerate(losses) if loss]
    if not lines:
        return None

    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, points in lines.items():
        plot.line(axes, points, i, summary.title(shown[i]))

    axes.set_xticks(range(3), ["pretrained MHA", "converted", "uptrained"])
    axes.set(xlim=(-0.2, 2.2), ylabel="Validation loss (nats per token)")
    plot.tidy(axes)
    plot.label_lines(figure, axes)
    plot.save_all(figure, folder, "pretraining_loss")
    return "pretraining_loss"


def learning_curves(summary: Summary, folder: Path, shown: list[Variant]) -> str | None:
    """Draw validation loss against steps, of pretraining and of each task's fine-tuning.

    Return the figure's name, None if no shown variant has a curve.
    """
    panels = {}
    for stage, task in (("pretrain", None), *(("finetune", task) for task in summary.tasks)):
        curves = {i: summary.curve(v, stage, task) for i, v in enumerate(shown)}
        # One point is no curve.
        curves = {i: points for i, points in curves.items() if len(points) > 1}
        if curves:
            panels["pretraining" if task is None else task] = curves
    if not panels:
        return None

    # Two panels stand beside each other: labels stand between them and need room.
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.8 * columns + 0.8, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for i, points in curves.items():
            plot.line(axes, points, i, summary.title(shown[i]), markersize=4)
        axes.set(title=title, xlabel="Step", ylabel="Loss (nats per token)")
    for axes in grid[len(panels) :]:
        axes.remove()

    plot.tidy(*grid[: len(panels)])
    plot.label_lines(figure, *grid[: len(panels)])
    plot.save_all(figure, folder, "learning_curves")
    return "learning_curves"


def time_by_groups(lines: dict[tuple[str, bool], list], path: str | os.PathLike) -> None:
    """Draw seconds per sample against KV heads, beside the paper's Figure 6.

    `lines` has, by label and whether it is at the largest batch, pairs of a number of KV heads and
    a record with low and high.
    """
    height = 3.2 + plot.legend_height(len(lines))
    figure = Figure(figsize=(7.2, height), layout="constrained")
    ours, published = figure.subplots(1, 2)

    # Both batch sizes of a label have its colour; the largest batch is dashed and hollow.
    labels = list(dict.fromkeys(label for label, _ in lines))
    for (label, largest), points in lines.items():
        heads, seconds = zip(*points, strict=True)
        below = [s["value"] - s["low"] for s in seconds]
        above = [s["high"] - s["value"] for s in seconds]
        ours.errorbar(
            heads,
            [s["value"] for s in seconds],
            yerr=[below, above],
            label=f"{label}, largest batch" if largest else label,
            markerfacecolor="white" if largest else None,
            linestyle="--" if largest else "-",
            elinewidth=0.8,
            capsize=2,
            **plot.style(labels.index(label)),
        )

    ours.set(title="This run", ylabel="Time per sample (s)", ylim=(0, None))
    plot.kv_heads_axis(ours)
    published_times(published)
    plot.tidy(ours, published)
    plot.legend_below(figure, ours)
    plot.save(figure, path)


def published_times(axes) -> None:
    """Draw the paper's Figure 6."""
    axes.plot(*zip(*paper.FIGURE6.items(), strict=True), **plot.style(6))
    axes.set(title="Published: T5-XXL on TPUv4", ylabel="Time per sample (s)", ylim=(0, None))
    plot.kv_heads_axis(axes)
