"""The report from a results file like the ones runs write, from a whole one to nearly nothing."""

import re

import pytest

from experiments import figures, paper, report, tables
from experiments.summary import Summary, Variant, differ
from gqa import results
from gqa.errors import UserError

TASKS = {"parameter_qa": "f1 %", "docstring_summary": "rougeL %"}


def variant(num_kv_heads, method="mean", alpha=0.05, seed=0, size="nano"):
    heads = {"num_heads": 16, "num_kv_heads": num_kv_heads, "cross_num_kv_heads": num_kv_heads}
    settings = {"encoder_num_kv_heads": 16, "method": method, "alpha": alpha, "seed": seed}
    return {"size": size} | heads | settings


def record(variant, stage, metric, value, unit="", task=None, interval=None, n=None):
    low, high = interval or (None, None)
    where = {"run": f"run-{variant['num_kv_heads']}", "stage": stage, "task": task}
    number = {"metric": metric, "value": value, "unit": unit, "low": low, "high": high, "n": n}
    origin = {"commit": "abc1234", "device": "cpu, 2 cores", "time": "2025-01-01T00:00:00+00:00"}
    return where | {"variant": variant} | number | origin


def score(variant, task, value, width=1.5):
    interval = (value - width, value + width)
    return record(variant, "evaluate", "headline", value, TASKS[task], task, interval, 400)


def job(settings, quality, speed):
    """Return what one run of the whole job writes."""

    def add(stage, task=None, **metrics):
        return [record(settings, stage, m, v, task=task) for m, v in metrics.items()]

    records = add("pretrain", validation_loss=3.9, steps=2000, train_seconds=200.0)
    if settings["method"] != "none":
        records += add("convert", validation_loss=4.6 - settings["num_kv_heads"] / 20)
        records += add("uptrain", validation_loss=4.0, steps=100)
    for task in TASKS:
        records += add("finetune", task, validation_loss=2.4, steps=300)
        losses = {"test_loss": 2.5, "test_loss_other_input": 3.5, "test_loss_unigram": 5.0}
        records += add("evaluate", task, rouge1=quality + 2, bleu=quality / 2, **losses)
        records += add("evaluate", task, constant_answer=11.0, first_sentence=9.0)
        records.append(score(settings, task, quality))
    heads = settings["num_kv_heads"]
    records += add("benchmark", num_params=1_200_000 + 20_000 * heads, kv_cache_bytes=heads * 32768)
    records += add("benchmark", prefill_seconds=3e-3, token_seconds=speed / 40)
    records += add("benchmark", batch_size=8, inputs_length=256, targets_length=40)
    bars = (speed * 0.9, speed * 1.2)
    return [*records, record(settings, "benchmark", "sample_seconds", speed, "s", interval=bars)]


PARENT = variant(16, "none", 0.0)
WHOLE = job(PARENT, 25.0, 0.04) + job(variant(8), 24.0, 0.03) + job(variant(1), 15.0, 0.02)


def make(tmp_path, records):
    results.append(tmp_path / "results.jsonl", records)
    text = report.run(tmp_path / "results.jsonl", tmp_path / "report")
    return text, (tmp_path / "report/report.md").read_text()


def test_timings_compare_within_their_own_run(tmp_path):
    """The parent timed again at half the speed, beside another variant, changes no ratio."""

    def timed(settings, seconds, **beside):
        interval = (seconds * 0.9, seconds * 1.1)
        line = record(settings, "benchmark", "token_seconds", seconds, "s", interval=interval)
        return line | beside

    lines = [timed(PARENT, 0.04), timed(variant(8), 0.03, parent_value=0.04)]
    lines += [timed(PARENT, 0.08), timed(variant(1), 0.02, parent_value=0.08)]
    summary = Summary(lines)
    parent, grouped, single = (
        summary.get(v, "benchmark", "token_seconds") for v in summary.variants
    )
    assert parent.value == pytest.approx(0.08)
    assert grouped.value == pytest.approx(0.06)
    assert (grouped.low, grouped.high) == pytest.approx((0.054, 0.066))
    assert single.value == pytest.approx(0.02)


def test_whole_job(tmp_path):
    text, page = make(tmp_path, WHOLE)
    assert max(map(len, text.splitlines())) <= 100
    for cell in ("MHA", "GQA-8 mean, alpha 0.05", "MQA mean, alpha 0.05", "512 KiB", "1.52M"):
        assert cell in text
        assert cell in page
    assert "256 KiB (0.50x, -50%)" in text
    assert "500 us (0.50x, -50%)" in text
    assert "24.0 [22.5, 25.5] (none shown)" in text
    assert "15.0 [13.5, 16.5] (-10.0, -40%)" in text
    assert "parameter_qa 400, docstring_summary 400" in page
    assert "+1.000" in page
    assert "+2.500" in page
    assert "published: T5-XXL on TPUv4" in page
    assert re.search(r"MQA-XXL +\| 0.24 +\| 46.6 \(\*\)", page)
    assert "timed at batch 8, 256 input and 40 target tokens" in page
    assert "several" not in page.split("## Provenance")[1]
    for name in re.findall(r"\]\((.*?)\)", page):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_missing_pieces_are_dashes(tmp_path):
    """A results file cut off after any record, or holding one stage alone, makes a report."""
    stages = list(dict.fromkeys(r["stage"] for r in WHOLE))
    for i, stage in enumerate(stages):
        only = [r for r in WHOLE if r["stage"] == stage]
        text, page = make(tmp_path / f"only{i}", only)
        assert "## Provenance" in page
        assert ("500 us" in text) == (stage == "benchmark")
        assert ("24.0 [" in text) == (stage == "evaluate")
        assert re.search(r"GQA-8 .* -", text) or stage == "pretrain"
    for end in (1, len(WHOLE) // 3, len(WHOLE) // 2):
        text, page = make(tmp_path / f"first{end}", WHOLE[:end])
        assert re.search(r"MHA +16 +" + ("-" if end == 1 else ""), text)
    _, page = make(tmp_path / "one task", [r for r in WHOLE if r["task"] != "parameter_qa"])
    assert "average" not in page.split("## The paper")[0].replace("Average", "")
    assert "parameter_qa" not in page


def test_a_variant_without_one_task_has_no_average():
    records = [score(PARENT, "parameter_qa", 20.0), score(PARENT, "docstring_summary", 30.0)]
    summary = Summary([*records, score(variant(8), "parameter_qa", 20.0)])
    parent, grouped = summary.variants
    assert summary.average(parent).value == 25
    assert summary.average(parent).high - 25 == pytest.approx(1.5 / 2**0.5)
    assert summary.average(grouped) is None


def test_an_empty_results_file_is_the_users_to_fill(tmp_path):
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(UserError, match=r"results.jsonl: no results yet"):
        report.run(tmp_path / "results.jsonl", tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_the_last_number_of_a_seed_stands_and_seeds_widen_the_interval():
    scores = [99.0, 20.0, 24.0]
    settings = [variant(8, seed=seed) for seed in (0, 0, 1)]
    records = [score(s, "parameter_qa", v) for s, v in zip(settings, scores, strict=True)]
    summary = Summary(records)
    (row,) = summary.variants
    found = summary.get(row, "evaluate", "headline", "parameter_qa")
    assert (found.value, found.seeds, found.n) == (22, 2, 400)
    # Student's t for 95% and one degree of freedom is 12.706; the seeds' standard error is 2.
    assert found.high - 22 == pytest.approx((1.5**2 + (12.706 * 2) ** 2) ** 0.5, rel=1e-4)
    assert "none shown" in report._quality(
        Summary([*records, score(PARENT, "parameter_qa", 30.0)]), row, "parameter_qa"
    )


def test_margins_that_are_not_there_are_said_in_words(tmp_path):
    settings = variant(8)
    losses = {"test_loss": 2.5, "test_loss_other_input": 2.4, "test_loss_unigram": 2.0}
    answers = {"constant_answer": 23.0, "first_sentence": 9.0}
    records = [
        record(settings, "evaluate", m, v, task="parameter_qa")
        for m, v in (losses | answers).items()
    ]
    _, page = make(tmp_path, [*records, score(settings, "parameter_qa", 24.0)])
    assert "the input is not used" in page
    assert "hardly lower than the unigram model's" in page
    assert "not shown to be above that of the best constant answer" in page
    assert "above that of the first sentence" not in page
    assert "margin measured here is there" not in page
    assert "-0.100" in page


def test_sizes_head_counts_and_methods_get_their_own_rows(tmp_path):
    crossed = variant(4) | {"cross_num_kv_heads": 2, "encoder_num_kv_heads": 8}
    records = [
        score(settings, "parameter_qa", 20.0)
        for settings in (
            variant(1),
            variant(8, "none", None),
            variant(8, "first", 0.0),
            PARENT,
            variant(8, size="mini"),
            crossed,
        )
    ]
    text, _ = make(tmp_path, records)
    rows = text.split("\n\n")[0].splitlines()[2:]
    assert [re.split(r"  +", row)[:2] for row in rows] == [
        ["MHA, nano", "16"],
        ["GQA-8 first, alpha 0, nano", "8"],
        ["GQA-8 from scratch, nano", "8"],
        ["GQA-4 cross-2 encoder-8 mean, alpha 0.05, nano", "self 4, cross 2"],
        ["MQA mean, alpha 0.05, nano", "1"],
        ["GQA-8 mean, alpha 0.05, mini", "8"],
    ]
    assert max(map(len, text.splitlines())) <= 100


def test_the_pretraining_of_a_converted_run_is_its_parents():
    """However the run labels it: alpha, too, means nothing for a model that was not uptrained."""
    records = [
        record(variant(8), "pretrain", "validation_loss", 3.0),
        score(variant(16, "none", 0.05), "parameter_qa", 20.0),
    ]
    (parent,) = Summary(records).variants
    assert parent == parent.parent
    control = record(variant(16, "none", 0.05), "uptrain", "validation_loss", 2.9)
    assert [v.label for v in Summary([*records, control]).variants] == ["MHA", "MHA, alpha 0.05"]


def test_one_conversion_serves_every_alpha(tmp_path):
    """The conversion knows no alpha, and pretraining may name its text as the task."""
    records = [
        record(PARENT, "pretrain", "validation_loss", 3.0, task="docstrings"),
        record(variant(8, alpha=0.0), "convert", "validation_loss", 4.0),
    ]
    assert [v.label for v in Summary(records).variants] == ["MHA", "GQA-8 mean, alpha 0"]
    tuned = [record(variant(8, alpha=a), "uptrain", "validation_loss", 3.5) for a in (0.05, 0.1)]
    _, page = make(tmp_path, records + tuned)
    losses = page.split("## Conversion")[1]
    assert re.search(r"alpha 0.05 +\| 3.000 +\| 4.000 +\| 3.500", losses)
    assert re.search(r"alpha 0.1 +\| 3.000 +\| 4.000 +\| 3.500", losses)
    assert "alpha 0 " not in page.split("## Provenance")[0]


def test_several_commits_are_pointed_out(tmp_path):
    mixed = [*WHOLE[:-1], WHOLE[-1] | {"commit": "def5678"}]
    _, page = make(tmp_path, mixed)
    assert "several commits" in page
    assert "several devices" not in page


def test_figures_hold_every_variant_and_no_text_overlaps(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    sweep = [r for k in (1, 2, 4, 8) for r in job(variant(k), 20.0 + k, 0.02 + k / 1e3)]
    summary = Summary([*job(PARENT, 25.0, 0.04), *sweep])
    figures.quality_against_time(summary, tmp_path / "a.png")
    assert figures.pretraining_loss(summary, tmp_path / "b.png")
    labels = {variant.label for variant in summary.variants}
    assert _legend(drawn[0].axes[0]) == labels
    assert _legend(drawn[1].axes[0]) == labels - {"MHA"}
    for figure in drawn:
        figure.draw_without_rendering()
        boxes = [box for axes in figure.axes for box in _text_boxes(axes)]
        assert len(boxes) > 10
        first = figure.axes[0]
        assert not first.get_legend().get_window_extent().overlaps(first.bbox)
        assert all(figure.bbox.padded(1).containsx(x) for box in boxes for x in box.intervalx)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def _legend(axes):
    return {text.get_text() for text in axes.get_legend().get_texts()}


def _text_boxes(axes):
    ticks = [
        label
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for at, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
        if low <= at <= high
    ]
    legend = axes.get_legend()
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks]
    texts += legend.get_texts() if legend else []
    return [text.get_window_extent() for text in texts if text.get_text()]


def test_nothing_to_draw_leaves_no_loss_figure(tmp_path):
    _, page = make(tmp_path, job(PARENT, 25.0, 0.04))
    assert not (tmp_path / "report/pretraining_loss.png").exists()
    assert "pretraining_loss.png" not in page


def test_difference_needs_intervals_that_lie_apart():
    a, b, c = (
        Summary([score(PARENT, "parameter_qa", value)]).get(
            Variant("nano", 16, 16, 16, 16, "none", 0.0), "evaluate", "headline", "parameter_qa"
        )
        for value in (20.0, 22.9, 23.1)
    )
    assert not differ(a, b)
    assert differ(a, c)
    assert differ(c, a)
    assert not differ(a, c._replace(low=None, high=None))


def test_the_papers_averages_are_theirs_but_for_the_flagged_one():
    for model, (_, average, *_) in paper.TABLE1.items():
        off = abs(paper.recomputed_average(model) - average) > 0.06
        assert off == (model == "MQA-XXL")


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (tables.count, 11_135_332_352, "11.1B"),
        (tables.count, 999, "999"),
        (tables.size, 256 * 1024, "256 KiB"),
        (tables.size, 1.5 * 2**30, "1.50 GiB"),
        (tables.seconds, 0.00152, "1.52 ms"),
        (tables.seconds, 0.000152, "152 us"),
        (tables.seconds, 75.0, "75.0 s"),
    ],
)
def test_numbers_carry_their_unit(form, value, text):
    assert form(value) == text
