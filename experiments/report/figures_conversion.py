"""Figures of the loss by conversion method: after uptraining, at once, by calibration, and saved.

Each draws only if the results have its numbers, and returns its name then. Scores by method are in
`figures_sweep`.
"""

from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report import estimate, method_comparison, plot
from experiments.report.estimate import Estimate
from experiments.report.summary import Summary
from experiments.stages.variant import TRAINED_AS_IT_IS, Conversion, Variant

LOSS = "Loss (nats per token)"
LONGER = "MHA, trained equally long"
ALPHA_LABEL = "alpha (uptraining steps / pretraining steps)"


def by_alpha(summary: Summary, folder: Path) -> str | None:
    """Draw loss against alpha, a panel a network, a line a method; below, its distance to MHA's.

    Return the figure's name, None unless something was uptrained to two alphas.
    """
    shapes = [s for s in method_comparison.shapes(summary, 1) if _uptrained(summary, s)]
    if not shapes:
        return None

    # The same methods in all panels, numbered over all panels, so that a method has one colour in
    # the whole figure. One more line is that of MHA.
    losses: dict[Conversion, float] = {}
    for shape in shapes:
        for method, points in _uptrained(summary, shape).items():
            losses.setdefault(method, next(iter(points.values())).value)
    methods = method_comparison.telling(losses, plot.LINES - 1)

    figure = Figure(figsize=(4.8 * max(len(shapes), 1.5), 5.8), layout="constrained")
    rows = figure.subplots(2, len(shapes), sharey="row", squeeze=False)

    for shape, (above, below) in zip(shapes, rows.T, strict=True):
        _draw_curves(summary, shape, methods, above, below)
        above.set(title=summary.sized(shape.network, shape))
        below.set(xlabel=ALPHA_LABEL)
        plot.ratio_axis(below.yaxis)

        # The axes take their ticks from the lines, so the lines are drawn before.
        for axes in (above, below):
            _alpha_axis(axes)

    rows[0, 0].set(ylabel=LOSS)
    rows[1, 0].set(ylabel="Above MHA trained equally long")
    plot.tidy(*rows.flat)
    plot.label_lines(figure, *rows.flat)
    plot.save_all(figure, folder, "alpha_loss")
    return "alpha_loss"


def _uptrained(summary: Summary, shape: Variant) -> dict[Conversion, dict[float, Estimate]]:
    """Return the losses by alpha of the methods measured at three or more alphas, with alpha 0."""
    methods = method_comparison.methods(summary, shape)
    curves = {m: method_comparison.curve(summary, shape, m) for m in methods}
    return {m: points for m, points in curves.items() if len(points) > 2}


def _draw_curves(summary, shape, methods, above, below):
    longer = method_comparison.curve(summary, shape.parent, TRAINED_AS_IT_IS)
    curves = _uptrained(summary, shape)
    for i, method in enumerate(methods):
        points = curves.get(method)
        if points is None:
            continue
        plot.line(above, list(points.items()), i, method.method_label)

        # The lower axis is logarithmic, so only a loss above that of MHA can be drawn there.
        differences = {
            alpha: estimate.subtract(loss, longer[alpha])
            for alpha, loss in points.items()
            if alpha in longer
        }
        excesses = [(alpha, e) for alpha, e in differences.items() if e and e.value > 0]
        if excesses:
            plot.line(below, excesses, i, method.method_label)

    # MHA is what every method is compared with, so its line has no colour of the palette.
    if len(longer) > 1:
        alphas, losses = zip(*longer.items(), strict=True)
        above.plot(alphas, [e.value for e in losses], "--", color="black", label=LONGER)


def _alpha_axis(axes: Axes) -> None:
    """Scale alphas by ratios, with room for alpha 0 to the left of the smallest alpha."""
    # A logarithmic scale has no 0; symlog is linear between 0 and the smallest alpha above it.
    alphas = sorted({float(x) for drawn in axes.lines for x in drawn.get_xdata()})
    if len(alphas) > 1:
        axes.set_xscale("symlog", linthresh=alphas[1], linscale=0.6)

        # Ticks stand close together, so that ".05" is written for 0.05, and alphas that are near
        # their left neighbour have none.
        ticks = alphas[:2]
        for alpha in alphas[2:]:
            ticks += [alpha] if alpha >= 1.6 * ticks[-1] else []
        axes.set_xticks(ticks, [f"{alpha:g}".removeprefix("0") or "0" for alpha in ticks])
        axes.set_xlim(-alphas[1] / 4, alphas[-1] * 1.2)
        axes.tick_params(axis="x", labelsize=8)
        axes.minorticks_off()


def by_heads(summary: Summary, folder: Path) -> str | None:
    """Draw what conversion alone does to the loss against KV heads, a line a method.

    Return the figure's name, None unless two methods led to three numbers of KV heads.
    """
    lines: dict = {}
    for v in sorted(summary.converted, key=lambda v: v.order):  # a set has no order of its own
        damage = method_comparison.damage(summary, v)

        # The axis is logarithmic, so a loss that conversion did not raise has no place on it.
        if v.groups_decoder_evenly and v.is_usual and damage and damage.value > 0:
            lines.setdefault((v.size, v.conversion), []).append((v.num_kv_heads, damage, v))
    lines = {key: sorted(points, key=lambda p: p[0]) for key, points in lines.items()}
    lines = {key: points for key, points in lines.items() if len(points) > 2}
    if len(lines) < 2:
        return None

    # A method is drawn for every size or for none; the points of fewest KV heads tell most apart.
    methods = method_comparison.telling(
        {method: points[0][1].value for (_, method), points in lines.items()}, plot.LINES
    )
    drawn = [points for (_, method), points in lines.items() if method in methods][: plot.LINES]
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, points in enumerate(drawn):
        label = summary.sized(points[0][2].method_label, points[0][2])
        plot.line(axes, [(heads, damage) for heads, damage, _ in points], i, label)

    plot.kv_heads_axis(axes)
    plot.ratio_axis(axes.yaxis)
    axes.set(title="Converted, alpha 0", ylabel="Loss above the parent's (nats)")
    plot.tidy(axes)
    plot.label_lines(figure, axes)
    plot.save_all(figure, folder, "damage")
    return "damage"


def by_saving(summary: Summary, folder: Path) -> str | None:
    """Draw the alpha at which each method reaches the mean's loss of alpha 0.05.

    Return the figure's name, None unless there is a method beside the mean that does.
    """
    alphas_by_shape: dict = {}
    for shape in method_comparison.shapes(summary):
        for method in method_comparison.methods(summary, shape):
            saved = method_comparison.saved(summary, shape, method)
            if saved and saved.alpha:
                alphas_by_shape.setdefault(shape, {})[method.method_label] = saved.alpha

    # The mean reaches its own loss, so one method alone would be nothing to compare.
    several = [(s, alphas) for s, alphas in alphas_by_shape.items() if len(alphas) > 1]
    alphas_by_shape = dict(several[: plot.LINES])
    if not alphas_by_shape:
        return None

    names = list(dict.fromkeys(name for alphas in alphas_by_shape.values() for name in alphas))
    height = 1.3 + 0.32 * len(names) + plot.legend_height(len(alphas_by_shape))
    figure = Figure(figsize=(6.2, height), layout="constrained")
    axes = figure.subplots()
    for i, (shape, alphas) in enumerate(alphas_by_shape.items()):
        # Spread the shapes around a method's row, so that their intervals do not overlap.
        shift = 0.4 * ((i + 0.5) / len(alphas_by_shape) - 0.5)
        points = [(names.index(name) + shift, alpha) for name, alpha in alphas.items()]
        plot.marks(axes, points, i, summary.sized(shape.network, shape))

    # Rows run downwards: the first method is at the top, as in the tables.
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    reference, alpha = method_comparison.REFERENCE.method_label, method_comparison.ALPHA
    axes.set(xlabel=f"alpha that reaches {reference}'s loss of alpha {alpha:g}")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    plot.tidy(axes)
    plot.legend_below(figure, axes)
    plot.save_all(figure, folder, "saved")
    return "saved"


def by_calibration(summary: Summary, folder: Path) -> str | None:
    """Draw what conversion alone does to the loss against the tokens it was calibrated on.

    Return the figure's name, None unless one method was calibrated on two amounts.
    """
    lines: dict = {}
    for v in summary.converted:
        # Compare runs that differ in nothing but their calibration tokens.
        tokens, usual = v.calibration_tokens, replace(v.conversion, calibration_tokens=None)
        loss_above_parent = method_comparison.damage(summary, v)
        comparable = v.groups_decoder_evenly and usual.is_usual and not usual.renorm
        if tokens and usual.space and comparable and loss_above_parent:
            label = summary.sized(f"{v.network} {usual.method_label}", v)
            lines.setdefault(label, []).append((tokens, loss_above_parent))

    # `summary.converted` is a set, so labels and points are sorted, for equal figures of equal
    # results.
    lines = {name: sorted(points) for name, points in sorted(lines.items()) if len(points) > 1}
    if not lines:
        return None

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate([*lines.items()][: plot.LINES]):
        plot.line(axes, points, i, name)

    plot.ratio_axis(axes.yaxis)
    axes.set(xscale="log", xlabel="Calibration tokens", title="Converted, alpha 0")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(ylabel="Loss above the parent's (nats)")
    plot.tidy(axes)
    plot.label_lines(figure, axes)
    plot.save_all(figure, folder, "calibration")
    return "calibration"
