"""Tables of conversion methods: what each does to the loss, and how much uptraining it saves."""

from experiments.report import method_comparison, tables
from experiments.report.estimate import Estimate
from experiments.report.summary import Summary
from experiments.report.tables import DASH
from experiments.report.variant import TRAINED_AS_IT_IS, Variant

NOTE = (
    "Validation loss of the pretraining task, nats per token, in the same text for all. Above the "
    "parent: minus the loss of the multi-head network that was converted, seed by seed. KL: of the "
    "parent to the network, on the same text. Query scale: the query kernel whose size changed "
    "most, by what it was; Adafactor's steps follow the size. ±: half of a 95% interval over "
    "seeds (Student's t)."
)
SAVED_NOTE = (
    "Reaches: the alpha at which the loss equals that of "
    f"`{method_comparison.REFERENCE.label}` after alpha {method_comparison.ALPHA:g}, interpolated "
    "between the measured alphas, for every seed separately. Better from: the smallest measured "
    "alpha whose loss is lower by more than the interval, and by how much."
)


def section(summary: Summary) -> str:
    """Return the section as Markdown; empty unless two methods led to the same network."""
    shapes = method_comparison.shapes(summary)
    if not shapes:
        return ""
    parts = ["## Ways of converting", NOTE]
    for shape in shapes:
        title = summary.sized(shape.network, shape)
        parts += [f"### {title}, converted", tables.markdown(*_at_once(summary, shape))]
        header, rows = _along(summary, shape)
        if len(header) > 2:
            parts += [f"### {title}, loss along uptraining", tables.markdown(header, rows)]
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
        variant = shape._replace(method=method)
        if variant not in summary.converted:
            continue
        found = {name: summary.get(variant, "convert", name) for name in METRICS}
        loss = summary.loss(variant)
        rows.append(
            [
                method.label,
                plus_minus(loss),
                plus_minus(method_comparison.damage(summary, variant)),
                *(_cell(found[name], form) for name, form in METRICS.items()),
                str(loss.seeds),
            ]
        )
    return header, rows


METRICS = {
    "kl_to_parent": ".3f",
    "query_scale": ".2f",
    "convert_seconds": ".1f",
    "calibration_tokens": ",.0f",
}


def _cell(found: Estimate | None, form: str) -> str:
    return DASH if found is None else format(found.value, form)


def plus_minus(found: Estimate | None, digits: int = 3) -> str:
    """Return a number with half of its interval: `0.171 ±0.012`."""
    if found is None:
        return DASH
    half = "" if found.low is None else f" ±{(found.high - found.low) / 2:.{digits}f}"
    return f"{found.value:.{digits}f}{half}"


def _along(summary: Summary, shape: Variant):
    curves = {
        m.label: method_comparison.curve(summary, shape, m)
        for m in method_comparison.methods(summary, shape)
    }
    curves = {label: points for label, points in curves.items() if len(points) > 1}
    longer = method_comparison.curve(summary, shape.parent, TRAINED_AS_IT_IS)
    if curves and len(longer) > 1:
        curves["MHA, trained equally long"] = longer
    alphas = sorted({alpha for points in curves.values() for alpha in points})
    rows = [[name, *(plus_minus(p.get(alpha)) for alpha in alphas)] for name, p in curves.items()]
    return ["method", *(f"alpha {alpha:g}" for alpha in alphas)], rows


def _saved(summary: Summary, shape: Variant) -> list[list[str]]:
    rows = []
    for method in method_comparison.methods(summary, shape):
        saved = method_comparison.saved(summary, shape, method)
        if saved is None:
            continue
        reaches = plus_minus(saved.alpha, 4)
        if saved.alpha is None:
            reaches = f"not in {saved.missed} of {saved.seeds} seeds"
        soonest = method_comparison.soonest(summary, shape, method)
        row = [summary.sized(shape.network, shape), method.label, reaches]
        rows.append(row + ([f"{soonest[0]:g}", plus_minus(soonest[1])] if soonest else [DASH] * 2))
    return rows
