"""Quality against one setting at a time: conversion method, alpha, KV heads (Figures 4 to 6)."""

from pathlib import Path

from matplotlib.figure import Figure

from experiments.report import method_comparison, paper, plot
from experiments.report.figures import published_times, score_name
from experiments.report.summary import Summary
from experiments.stages.variant import TRAINED_AS_IT_IS, Variant

LOSS = "Loss (nats per token)"


def by_method(summary: Summary, folder: Path) -> str | None:
    """Draw score by conversion method, one mark with its interval each, as the paper's Figure 4.

    Return the figure's name, None unless two methods led to one network at one alpha.
    """
    groups: dict = {}
    for v in summary.variants:
        # The key is the network at its alpha without its conversion, so that networks which differ
        # in the method alone meet under one key.
        if v.is_converted and summary.average(v):
            key = v.made_by(TRAINED_AS_IT_IS, v.alpha)
            groups.setdefault(key, {})[v.conversion] = summary.average(v)
    groups = {key: scores for key, scores in groups.items() if len(scores) > 1}
    if not groups:
        return None

    # Of many networks, those that most methods led to.
    most = sorted(groups, key=lambda key: -len(groups[key]))[: plot.LINES]
    groups = {key: scores for key, scores in groups.items() if key in most}
    methods = method_comparison.in_order({m for scores in groups.values() for m in scores})

    # The paper's panel has three rows, whatever our own panel has.
    height = 1.2 + 0.45 * max(len(methods), 3) + plot.legend_height(len(groups))
    figure = Figure(figsize=(7.2, height), layout="constrained")
    ours, published = figure.subplots(1, 2)
    for i, (key, scores) in enumerate(groups.items()):
        # Spread the networks around a method's row, so that their intervals do not overlap.
        shift = 0.5 * ((i + 0.5) / len(groups) - 0.5)
        points = [(methods.index(m) + shift, e) for m, e in scores.items()]
        plot.marks(ours, points, i, summary.sized(f"{key.network}, alpha {key.alpha:g}", key))

    published.plot(list(paper.FIGURE4.values()), range(3), linestyle="none", **plot.style(6))

    ours.set(title="Ours", xlabel=score_name(summary))
    published.set(title="Published: T5-Large to MQA", xlabel="Average of 3 tasks", xlim=(55, 56))

    # Rows run downwards, the paper's methods first, so that both panels have the same order.
    labels = [method.method_label for method in methods]
    for axes, names in ((ours, labels), (published, list(paper.FIGURE4))):
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)

    plot.tidy(ours, published)
    plot.legend_below(figure, ours)
    plot.save_all(figure, folder, "methods")
    return "methods"


def by_alpha(summary: Summary, folder: Path) -> str | None:
    """Draw score against alpha, a line for each network and method, as the paper's Figure 5.

    Return the figure's name, None unless something was scored at two alphas.
    """
    lines = _alpha_lines(summary)
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    ours, published = figure.subplots(1, 2)
    _draw_alpha_lines(summary, ours, lines)
    _draw_published_alphas(published)
    ours.set(title="Ours", ylabel=score_name(summary))
    return _finish(figure, folder, "alpha", ours, published)


def _alpha_lines(summary):
    """Return, by variant without alpha, pairs of an alpha and the score there."""
    lines: dict = {}
    for v in summary.variants:
        if score := summary.average(v):
            # Networks that differ in alpha alone share a line: give all of them one alpha as key.
            lines.setdefault(v.at(-1.0), {})[v.alpha] = score
    return {key: sorted(points.items()) for key, points in lines.items()}


def _draw_alpha_lines(summary, axes, lines):
    """Draw a line for each network that was scored at two or more alphas.

    A multi-head network that was not uptrained is drawn as a horizontal level, as in the paper. Of
    many lines, the multi-head network's and the best are drawn.
    """
    lines = {
        key: points for key, points in lines.items() if len(points) > 1 or key.shape == key.parent
    }
    ranked = sorted(lines, key=lambda key: (key.shape != key.parent, -lines[key][-1][1].value))
    for i, key in enumerate(key for key in lines if key in ranked[: plot.LINES]):
        name = f"{key.network} {key.method_label}" if key.is_converted else key.shape.label
        label, points = summary.sized(name, key), lines[key]
        if len(points) > 1:
            plot.line(axes, points, i, label)
        else:
            plot.level(axes, points[0][1], i, f"{label}, not uptrained")


def _draw_published_alphas(axes):
    for i, (name, points) in enumerate(paper.FIGURE5.items()):
        alphas, scores = zip(*points.items(), strict=True)
        axes.plot(alphas, scores, linestyle="--" if name == "MHA" else "-", **plot.style(i))
        place = {"textcoords": "offset points", "fontsize": 8}
        axes.annotate(name, (0.0, scores[0]), (0, 5) if name == "MHA" else (8, -9), **place)
    axes.set(title="Published: T5-XXL on TPUv4", ylabel="Average of 3 tasks", ylim=(53.6, 58))


def _finish(figure, folder, name, *several):
    for axes in several:
        axes.set_xlabel("alpha (uptraining steps / pretraining steps)")
    plot.tidy(*several)
    plot.label_lines(figure, several[0])
    plot.save_all(figure, folder, name)
    return name


def by_groups(summary: Summary, folder: Path) -> str | None:
    """Draw time, score and validation loss against KV heads, and the paper's Figure 6.

    Return the figure's name, None unless three numbers of KV heads were timed or scored.
    """
    lines = {
        "time": _group_lines(
            summary,
            lambda v: summary.get(v, "benchmark", "sample_seconds"),
            lambda v: v.size,
        ),
        "score": _group_lines(summary, summary.average, lambda v: _origin(summary, v)),
        "loss": _group_lines(summary, summary.loss, lambda v: _origin(summary, v)),
    }
    if not lines["time"] and not lines["score"]:
        return None

    # Number the labels over all panels, so that a label has one colour in the whole figure.
    labels = list(dict.fromkeys(label for panel in lines.values() for label in panel))
    figure = Figure(figsize=(9.6, 6.0), layout="constrained")
    (time, published), (score, loss) = figure.subplots(2, 2)
    for axes, panel in zip((time, score, loss), lines.values(), strict=True):
        for label, points in panel.items():
            plot.line(axes, points, labels.index(label), label)
        if panel:
            plot.kv_heads_axis(axes)
        else:
            plot.note(axes, "not measured")

    time.set(title="Ours", ylabel="Time per sample (s)", ylim=(0, None))
    score.set(title="Ours, fine-tuned", ylabel=score_name(summary))
    loss.set(title="Ours, before fine-tuning", ylabel=LOSS)
    published_times(published)

    # Lines begin together at MHA, and are labelled where they have parted.
    for axes in (time, published, score, loss):
        axes.invert_xaxis()
    plot.tidy(time, published, score, loss)
    plot.label_lines(figure, time, score, loss)
    plot.save_all(figure, folder, "groups")
    return "groups"


def _group_lines(summary, measure, label):
    """Return the lines of 3 or more points: by label, pairs of KV heads and an estimate.

    The multi-head parent begins every line.
    """
    lines: dict = {}
    for v in summary.scored:
        # The parent takes the label of the network beside it: as MHA it has no method of its own,
        # and it begins the line of every method.
        if v.groups_decoder_evenly and v.shape != v.parent:
            for point in (v.parent, v):
                if estimate := measure(point):
                    lines.setdefault(label(v), {})[point.num_kv_heads] = estimate
    lines = {name: sorted(points.items()) for name, points in lines.items() if len(points) > 2}

    # Of many lines, those that differ most: the extremes at the fewest KV heads, and between them.
    ranked = sorted(lines, key=lambda name: lines[name][0][1].value)
    count = min(plot.LINES, len(ranked))
    kept = {ranked[round(i * (len(ranked) - 1) / max(count - 1, 1))] for i in range(count)}
    return {name: points for name, points in lines.items() if name in kept}


def _origin(summary: Summary, v: Variant) -> str:
    return summary.sized(v.origin, v)
