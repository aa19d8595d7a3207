"""Tables of conversion methods: what each does to the loss, and how much uptraining it saves."""

from experiments.report import method_comparison, safe_text, tables
from experiments.report.estimate import Estimate
from experiments.report.summary import Summary
from experiments.report.tables import DASH
from experiments.stages.variant import TRAINED_AS_IT_IS, Variant

NOTE = (
    "Loss: validation loss of the pretraining task, in nats per token, on the same text for all "
    "networks. Above the parent: this loss minus the loss of the multi-head network that was "
    "converted, seed by seed. KL: divergence of the network from the parent on the same text. "
    "Query scale: size of the query kernel that changed most, divided by its size in the parent; "
    "it matters because Adafactor scales its steps with a kernel's size. ±: half of a 95% "
    "interval over seeds (Student's t)."
)
SAVED_NOTE = (
    "Reaches: the alpha at which the loss equals that of "
    f"`{method_comparison.REFERENCE.method_label}` after alpha {method_comparison.ALPHA:g}, "
    "interpolated between the measured alphas, for every seed separately. Better from: the "
    "smallest measured alpha whose loss is lower by more than the interval, and by how much."
)


def section(summary: Summary) -> str:
    """Return the section as Markdown; empty unless two methods led to the same network."""
    shapes = method_comparison.shapes(summary)
    if not shapes:
        return ""
    parts = ["## Ways of converting", NOTE]

    # One table of the converted networks for each shape; a second one only if some network of this
    # shape was also uptrained, because the first table already holds alpha 0.
    for shape in shapes:
        title = safe_text.markdown(summary.sized(shape.network, shape))
        parts += [f"### {title}, converted", tables.markdown(*_at_once(summary, shape))]
        header, rows = _along(summary, shape)
        if len(header) > 2:
            parts += [f"### {title}, loss along uptraining", tables.markdown(header, rows)]

    # A network whose reference was not uptrained, or a method with one alpha, gives no row.
    rows = [row for shape in shapes for row in _saved(summary, shape)]
    if rows:
        header = ["network", "method", "reaches at alpha", "better from alpha", "by"]
        parts += ["### Uptraining saved", tables.markdown(header, rows), SAVED_NOTE]

    return "\n\n".join(parts)


def _at_once(summary: Summary, shape: Variant):
    header = ["method", "loss", "above the parent", "KL", "query scale", "seconds"]
    header += ["calibration tokens", "seeds"]

    rows = []
    for method in method_comparison.methods(summary, shape):
        variant = shape.made_by(method, 0.0)
        # Some methods of this shape have only an uptrained network, which this table leaves out.
        if variant not in summary.converted:
            continue

        estimates = {name: summary.get(variant, "convert", name) for name in METRICS}
        loss = summary.loss(variant)
        assert loss is not None  # every converted variant has one
        rows.append(
            [
                method.method_label,
                plus_minus(loss),
                plus_minus(method_comparison.damage(summary, variant)),
                *(_cell(estimates[name], form) for name, form in METRICS.items()),
                str(loss.seeds),
            ]
        )
    return header, rows


# Format of each metric that the convert stage writes, in the order of the table's columns.
METRICS = {
    "kl_to_parent": ".3f",
    "query_scale": ".2f",
    "convert_seconds": ".1f",
    "calibration_tokens": ",.0f",
}


def _cell(estimate: Estimate | None, form: str) -> str:
    return DASH if estimate is None else format(estimate.value, form)


def plus_minus(estimate: Estimate | None, digits: int = 3) -> str:
    """Return a number with half of its interval: `0.171 ±0.012`."""
    if estimate is None:
        return DASH

    half = ""
    # The two halves of an interval may differ a little; one number stands for both.
    if estimate.low is not None and estimate.high is not None:
        half = f" ±{(estimate.high - estimate.low) / 2:.{digits}f}"
    return f"{estimate.value:.{digits}f}{half}"


def _along(summary: Summary, shape: Variant):
    curves = {
        method.method_label: method_comparison.curve(summary, shape, method)
        for method in method_comparison.methods(summary, shape)
    }

    # A method measured at one alpha has no course to show.
    curves = {label: points for label, points in curves.items() if len(points) > 1}

    # The parent, trained for as many extra steps, shows how much of a gain is only more training.
    longer = method_comparison.curve(summary, shape.parent, TRAINED_AS_IT_IS)
    if curves and len(longer) > 1:
        curves["MHA, trained equally long"] = longer

    # The methods need not share their alphas, so a cell without a measurement is a dash.
    alphas = sorted({alpha for points in curves.values() for alpha in points})
    rows = [
        [label, *(plus_minus(points.get(alpha)) for alpha in alphas)]
        for label, points in curves.items()
    ]
    return ["method", *(f"alpha {alpha:g}" for alpha in alphas)], rows


def _saved(summary: Summary, shape: Variant) -> list[list[str]]:
    rows = []
    for method in method_comparison.methods(summary, shape):
        saved = method_comparison.saved(summary, shape, method)
        if saved is None:
            continue

        # A mean over only the seeds that reach the loss would flatter the method: say who missed.
        reaches = plus_minus(saved.alpha, 4)
        if saved.alpha is None:
            reaches = f"not in {saved.missed} of {saved.seeds} seeds"

        soonest = method_comparison.soonest(summary, shape, method)
        row = [summary.sized(shape.network, shape), method.method_label, reaches]
        rows.append(row + ([f"{soonest[0]:g}", plus_minus(soonest[1])] if soonest else [DASH] * 2))
    return rows
