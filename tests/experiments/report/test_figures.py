"""Each figure is drawn when there is something to draw, with the right numbers, and is legible."""

import pytest
from matplotlib.text import Text

from experiments.report import (
    figures,
    figures_conversion,
    figures_sweep,
    headline,
    paper,
    plot,
)
from experiments.report.summary import Summary
from tests.support.made_results import PARENT, WHOLE, curve, network, record, variant

OF_SHOWN = [figures.quality_against_time, figures.pretraining_loss, figures.learning_curves]
DRAW = [
    figures_sweep.by_groups,
    figures_sweep.by_alpha,
    figures_conversion.by_alpha,
    figures_sweep.by_method,
]
GROUPS = [*WHOLE, *(r for k in (2, 4) for r in network(variant(k), 20.0 + k, 0.02 + k / 1e3))]
ALPHAS = [
    *WHOLE,
    *(r for k in (1, 8) for a in (0.0, 0.1) for r in network(variant(k, "mean", a), 20 + a, 0.02)),
]
METHODS = [
    *WHOLE,
    *network(variant(8, "random"), 22, 0.03),
    *network(variant(8, "first"), 23, 0.03),
]
SIZES = [
    *WHOLE,
    *network(variant(16, "none", 0.0, size="mini"), 29.0, 0.12),
    *network(variant(8, size="mini"), 28.0, 0.1),
]
CONTROL = [*ALPHAS, *network(variant(16, "none", 0.05), 25.5, 0.04)]
CURVES = [
    *WHOLE,
    *curve(PARENT, "pretrain", (5.0, 4.0)),
    *curve(PARENT | {"seed": 1}, "pretrain", (5.5, 4.25)),
    *curve(variant(8), "finetune", (3.0, 2.5, 2.75), "parameter_qa"),
]
MANY = [r for i in range(15) for r in network(variant(8, "mean", 0.01 * (i + 1)), 22, 0.03)]
EVERYTHING = [*SIZES, *GROUPS, *CONTROL, *METHODS, *CURVES, *MANY]


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn, by name, without writing it."""
    found = {}
    monkeypatch.setattr(plot, "save_all", lambda figure, _, name: found.update({name: figure}))
    return found


def draw(records):
    summary = Summary(records)
    shown = headline.shown(summary, 1.0, plot.LINES)
    names = [function(summary, None, shown) for function in OF_SHOWN]
    return [*filter(None, [*names, *(function(summary, None) for function in DRAW)])]


@pytest.mark.parametrize(
    ("records", "names"),
    [
        (network(PARENT, 25.0, 0.04), {"quality_time"}),
        (WHOLE, {"quality_time", "pretraining_loss", "groups"}),
        (WHOLE[: len(WHOLE) * 2 // 3], {"quality_time", "pretraining_loss"}),
        (ALPHAS, {"quality_time", "pretraining_loss", "groups", "alpha", "alpha_loss"}),
        (METHODS, {"quality_time", "pretraining_loss", "groups", "methods"}),
        ([r for r in METHODS if r["stage"] == "evaluate"], {"groups", "methods"}),
        ([r for r in GROUPS if r["stage"] in ("finetune", "benchmark")], {"groups"}),
        ([r for r in ALPHAS if r["stage"] == "uptrain"], set()),
        ([r for r in CURVES if r["stage"] == "pretrain"], {"learning_curves"}),
        (curve(PARENT, "pretrain", (5.0,)), set()),
        (MANY, {"quality_time", "pretraining_loss", "alpha", "alpha_loss"}),
    ],
)
def test_a_figure_is_drawn_when_there_is_something_to_draw(drawn, records, names):
    assert set(draw(records)) == names
    assert drawn.keys() == names


@pytest.mark.parametrize(
    "records", [WHOLE, GROUPS, ALPHAS, CONTROL, METHODS, SIZES, EVERYTHING, CURVES]
)
def test_no_text_overlaps_or_is_cut_and_legends_cover_nothing(drawn, records):
    assert len(draw(records)) > 1
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        boxes = [box for axes in figure.axes for box in _text_boxes(axes)]
        legends = [legend.get_window_extent() for legend in figure.legends]
        assert len(boxes) > 10
        assert len(legends) <= 1
        assert len(figure.axes[0].containers) <= plot.LINES
        for box in boxes + legends:
            assert all(figure.bbox.padded(1).containsx(x) for x in box.intervalx), name
            assert all(figure.bbox.padded(1).containsy(y) for y in box.intervaly), name
        assert not any(x.overlaps(axes.bbox) for x in legends for axes in figure.axes), name
        boxes += legends
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), name


def _text_boxes(axes):
    ticks = [
        tick.label1
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        if min(low, high) <= tick.get_loc() <= max(low, high) and tick.label1.get_visible()
    ]
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks]
    # Of an annotation, its text alone: its leader may cross what it leads to.
    return [Text.get_window_extent(text) for text in texts if text.get_text()]


def _labels(figure):
    """What stands beside the lines of our own panels."""
    return {text.get_text() for text in figure.axes[0].texts}


def _lines(axes):
    """What is drawn with intervals, by label: pairs of x and y."""
    return {
        bars.get_label(): list(zip(*(x.tolist() for x in bars[0].get_data()), strict=True))
        for bars in axes.containers
    }


def test_quality_and_loss_hold_every_variant(drawn):
    draw(SIZES)
    labels = {Summary(SIZES).title(v) for v in Summary(SIZES).variants}
    assert _labels(drawn["quality_time"]) == labels
    assert _labels(drawn["pretraining_loss"]) == labels - {"MHA, nano", "MHA, mini"}
    assert _lines(drawn["quality_time"].axes[0])["GQA-8 mean, alpha 0.05, mini"] == [(100, 28)]


def test_learning_curves_hold_every_step_and_the_mean_of_seeds(drawn):
    draw(CURVES)
    pretraining, task = drawn["learning_curves"].axes
    assert (pretraining.get_title(), task.get_title()) == ("pretraining", "parameter_qa")
    assert _lines(pretraining) == {"MHA": [(100, 5.25), (200, 4.125)]}
    assert _lines(task) == {"GQA-8 mean, alpha 0.05": [(100, 3.0), (200, 2.5), (300, 2.75)]}


def test_alpha_begins_at_the_parent_and_at_the_conversion(drawn):
    draw(CONTROL)
    assert _lines(drawn["alpha"].axes[0]) == {
        "MHA": [(0, 25), (0.05, 25.5)],
        "GQA-8 mean": [(0, 20), (0.05, 24), (0.1, 20.1)],
        "MQA mean": [(0, 20), (0.05, 15), (0.1, 20.1)],
    }
    above, _, below, _ = drawn["alpha_loss"].axes
    assert above.get_title() == "GQA-8"
    assert _lines(above)["mean"] == pytest.approx(
        [pytest.approx((x, y)) for x, y in ((0, 4.2), (0.05, 4.1), (0.1, 4.0))]
    )
    longer = next(line for line in above.lines if line.get_label().startswith("MHA"))
    assert longer.get_ydata() == pytest.approx([3.9, 4.1])
    # At alpha 0.05 it is where the parent is by then: nothing that a scale of ratios could show.
    assert _lines(below)["mean"] == [(0, pytest.approx(0.3))]
    published = drawn["alpha"].axes[1].lines
    assert [list(line.get_ydata()) for line in published] == [
        list(points.values()) for points in paper.FIGURE5.values()
    ]


def test_a_parent_that_was_not_uptrained_is_a_level(drawn):
    draw(ALPHAS)
    assert "MHA, not uptrained" in _labels(drawn["alpha"])
    assert _lines(drawn["alpha"].axes[0]).keys() == {"GQA-8 mean", "MQA mean"}


def test_groups_begin_at_the_parent(drawn):
    draw(GROUPS)
    time, published, score, loss = drawn["groups"].axes
    heads = [1, 2, 4, 8, 16]
    assert _lines(time)["nano"] == [*zip(heads, [0.02, 0.022, 0.024, 0.03, 0.04], strict=True)]
    assert _lines(score) == {"mean, alpha 0.05": [*zip(heads, [15, 22, 24, 24, 25], strict=True)]}
    assert [K for K, _ in _lines(loss)["mean, alpha 0.05"]] == heads
    assert dict(zip(*published.lines[0].get_data(), strict=True)) == paper.FIGURE6


def test_methods_stand_in_the_papers_order_with_their_intervals(drawn):
    draw(METHODS)
    ours, published = drawn["methods"].axes
    assert [text.get_text() for text in ours.get_yticklabels()] == ["mean", "first", "random"]
    assert sorted(_lines(ours)["GQA-8, alpha 0.05"]) == [(22, 2), (23, 1), (24, 0)]
    (bars,) = ours.containers[0].lines[2]
    assert all(end - start > 2 for (start, _), (end, _) in bars.get_segments())
    assert list(published.lines[0].get_xdata()) == list(paper.FIGURE4.values())


def test_seeds_without_test_intervals_still_give_error_bars(drawn):
    losses = [
        record(variant(8, seed=s, alpha=a), stage, "validation_loss", 4 + s / 10)
        for s in (1, 2, 3)
        for stage, a in (("convert", 0.0), ("uptrain", 0.05), ("uptrain", 0.1))
    ]
    draw(losses)
    (bars,) = drawn["alpha_loss"].axes[0].containers[0].lines[2]
    assert all(end - start > 0.4 for (_, start), (_, end) in bars.get_segments())


def test_files_are_whole_and_the_same_each_time(tmp_path):
    summary = Summary(WHOLE)
    contents = []
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        figures.quality_against_time(summary, folder, summary.scored)
        contents.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {"quality_time.png", "quality_time.svg"}
    assert contents[0]["quality_time.png"].startswith(b"\x89PNG")
    assert b"</svg>" in contents[0]["quality_time.svg"]
