"""Draw what all figures share: colours, marks with intervals, axes, legends, and files.

The figures themselves are in `figures`, `figures_sweep` and `figures_conversion`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, NullLocator

from experiments.report import safe_text
from experiments.report.estimate import Estimate
from gqa.runtime import atomic_files

# Okabe and Ito's palette, told apart with any colour vision; markers differ too, for grey print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = 6  # of one panel at most; tables hold the rest
LABEL_SIZE = 8  # points
LONGEST_LABEL = 52  # characters beside a line; longer ones would leave no room for the axes
FORMATS = ("png", "svg")
LEGEND_COLUMNS = 2


def style(i: int) -> dict[str, Any]:
    """Return colour and marker of a figure's `i`-th line; hollow when colours repeat."""
    again, i = divmod(i, len(COLORS))

    # Each round of the palette pairs its colours with the next marker, so that lines of one colour
    # differ in their marker and in its filling, also in grey print.
    look = {"color": COLORS[i], "marker": MARKERS[(i + again) % len(MARKERS)]}
    return look | ({"markerfacecolor": "white"} if again % 2 else {})


def error_bar(estimates: list[Estimate], scale: float = 1.0) -> list[list[float]]:
    """Return the interval's lengths below and above each estimate, [2, n]; 0 without interval."""
    below = [0 if e.low is None else scale * max(e.value - e.low, 0) for e in estimates]
    above = [0 if e.high is None else scale * max(e.high - e.value, 0) for e in estimates]
    return [below, above]


def line(axes: Axes, points: Sequence[tuple[float, Estimate]], i: int, label: str, **more) -> None:
    """Draw estimates against numbers, with their intervals."""
    at, estimates = zip(*points, strict=True)
    values = [e.value for e in estimates]
    bars = {"yerr": error_bar(estimates), "elinewidth": 0.8, "capsize": 2}
    more = {"linestyle": "--" if i // len(COLORS) % 2 else "-"} | more
    axes.errorbar(at, values, label=label, **bars, **style(i), **more)


def marks(axes: Axes, points: list[tuple[float, Estimate]], i: int, label: str) -> None:
    """Draw estimates along x in rows, with their intervals."""
    rows, estimates = zip(*points, strict=True)
    bars = {"xerr": error_bar(estimates), "linestyle": "none", "elinewidth": 0.8, "capsize": 2}
    axes.errorbar([e.value for e in estimates], rows, label=label, **bars, **style(i))


def level(axes: Axes, estimate: Estimate, i: int, label: str) -> None:
    """Draw one estimate over the whole width, with its interval as a band."""
    color = COLORS[i % len(COLORS)]
    axes.axhline(estimate.value, color=color, linestyle="--", label=label)
    if estimate.low is not None:
        axes.axhspan(estimate.low, estimate.high, color=color, alpha=0.12, linewidth=0)


def note(axes: Axes, text: str) -> None:
    """Write into the middle of empty axes why they are empty."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def kv_heads_axis(axes: Axes) -> None:
    """Scale x by powers of two, with a tick at every number of KV heads that is drawn."""
    heads = sorted({int(K) for drawn in axes.lines for K in drawn.get_xdata()})

    # Numbers of KV heads usually double, and a linear axis would crowd 1, 2 and 4 at its left end.
    axes.set_xscale("log", base=2)
    axes.set_xticks(heads, [str(K) for K in heads])
    axes.minorticks_off()
    axes.set_xlabel("KV heads")


def ratio_axis(axis: Axis) -> None:
    """Scale by ratios, with plain numbers at 1, 2 and 5."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def legend_height(count: int) -> float:
    """Return the inches that a legend of `count` entries takes."""
    return 0.19 * -(-count // LEGEND_COLUMNS)


def legend_below(figure: Figure, *several: Axes) -> None:
    """Put one legend for all these axes below the figure, where it covers nothing."""
    entries: dict = {}
    for axes in several:
        # A label that several axes have is one entry.
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            entries.values(),
            entries.keys(),
            fontsize=8,
            frameon=False,
            loc="outside lower center",
            ncols=min(LEGEND_COLUMNS, len(entries)),
        )


def label_lines(figure: Figure, *several: Axes) -> None:
    """Write the label of each line to the right of the axes, at the height of its right end.

    Labels that would overlap are moved apart. Call this when everything else is drawn.
    """
    labels: list[tuple[Axes, Any, Annotation]] = []
    place = {"xycoords": "axes fraction", "textcoords": "axes fraction", "annotation_clip": False}
    for axes in several:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            drawn = handle.lines[0] if hasattr(handle, "lines") else handle
            leader = {"arrowstyle": "-", "color": drawn.get_color(), "linewidth": 0.8}
            # Dotted, because it is no data, and from the middle of the text's left side.
            leader |= {"linestyle": ":", "relpos": (0, 0.5)}
            look = {"arrowprops": leader, "va": "center", "fontsize": LABEL_SIZE}
            label = safe_text.visible(label)
            label = label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"
            text = axes.annotate(label, (1, 0.5), (1.05, 0.5), **place, **look)
            labels.append((axes, drawn, text))

    # The layout makes room for the labels, whatever their heights. Only then are heights known.
    _make_plain(figure)
    figure.draw_without_rendering()
    distance = 1.35 * LABEL_SIZE * figure.dpi / 72
    for axes in several:
        ends = [(*_right_end(axes, drawn), text) for own, drawn, text in labels if own is axes]
        ends.sort(key=lambda end: end[1])
        spread = _spread([y for _, y, _ in ends], distance / axes.bbox.height)
        for (x, y, text), height in zip(ends, spread, strict=True):
            text.xy, text.xyann = (x, y), (1.05, height)


def _right_end(axes: Axes, drawn: Any) -> tuple[float, float]:
    """Return where a line ends on the right, in fractions of the axes."""
    # Over pixels, because a level is given in fractions of the width, and other lines in data.
    pixels = drawn.get_transform().transform(drawn.get_xydata())
    x, y = axes.transAxes.inverted().transform(pixels[pixels[:, 0].argmax()])
    return float(x), float(y)


def _spread(heights: list[float], distance: float) -> list[float]:
    """Return ascending heights, moved to be `distance` apart and, if there is room, in 0 to 1."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + distance if moved else 0.0))

    # What was pushed above the axes is pushed down again, from the top.
    ceiling = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - distance
    return moved


def tidy(*several: Axes) -> None:
    """Remove the upper and right spine and draw a light grid."""
    for axes in several:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)


def _make_plain(figure: Figure) -> None:
    # Labels hold names from outside, in which "$" does not begin a formula.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(safe_text.visible(text.get_text()))


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a picture atomically, without date or random names: equal figures give equal bytes."""
    _make_plain(figure)
    settings = {"svg.hashsalt": "gqa", "text.parse_math": False}

    kind = Path(path).suffix[1:]
    metadata = {"Date": None} if kind == "svg" else {}
    with atomic_files.writing(path) as temporary, matplotlib.rc_context(settings):
        figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)


def save_all(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure once for the screen and once for print."""
    for kind in FORMATS:
        save(figure, folder / f"{name}.{kind}")
