"""The report from a results file like the ones runs write, from a whole one to nearly nothing."""

import re
from types import SimpleNamespace

import pytest

from experiments.report import paper, report, tables
from experiments.report.summary import Summary
from experiments.stages import evaluate
from gqa.data.examples import Example
from gqa.evaluation import metrics, results
from gqa.runtime.errors import UserError
from tests.support.made_results import (
    KEY,
    PARENT,
    WHOLE,
    curve,
    network,
    record,
    score,
    timings,
    variant,
)


def make(tmp_path, records):
    results.append(tmp_path / "results.jsonl", records)
    text = report.run(tmp_path / "results.jsonl", tmp_path / "report", {KEY})
    return text, (tmp_path / "report/report.md").read_text()


def printed(text):
    """The text without its last part: paths and commands may be as long as they are."""
    return text.split("\nreport: ")[0]


def test_whole_job(tmp_path):
    text, page = make(tmp_path, WHOLE)
    assert max(map(len, printed(text).splitlines())) <= 100
    for cell in ("MHA", "GQA-8 mean, alpha 0.05", "MQA mean, alpha 0.05", "512 KiB"):
        assert cell in text
        assert cell in page
    assert "1.52M" in page
    assert "256 KiB (0.50x, -50%)" in page
    assert "500 us (0.50x, -50%)" in page
    assert "24.0 [22.5, 25.5] (none shown)" in page
    assert "15.0 [13.5, 16.5] (-10.0, -40%)" in page
    assert "parameter_qa 400, docstring_summary 400" in page
    assert "+1.000" in page
    assert "+2.500" in page
    assert "published: T5-XXL on TPUv4" in page
    assert re.search(r"MQA-XXL +\| 0.24 +\| 46.6 \(\\\*\)", page)
    assert "timed at batch 8, 256 input and 40 target tokens" in page
    assert "several" not in page.split("## Provenance")[1]
    assert "No measured number of KV heads below" not in text
    assert "8 KV heads, interval [-2.5" in text
    names = re.findall(r"\]\((.*?)\.png\)", page)
    assert names == ["quality_time", "groups", "pretraining_loss"]
    files = {path.name for path in (tmp_path / "report").iterdir()}
    drawn = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert files == {"report.md", "report.html", *drawn}
    whole = (tmp_path / "report/report.html").read_text()
    assert whole.count("data:image/svg+xml;base64,") == len(names)
    assert whole.count("<table>") == page.count("\n| --")


def test_paired_intervals_decide_what_is_shown(tmp_path):
    """The scores' intervals overlap; the difference of the same examples does not hold 0."""
    records = [
        *network(PARENT, 25.0, 0.04, error=0.0),
        *network(variant(8), 24.0, 0.03, error=0.3),
        *network(variant(4), 24.9, 0.03, error=0.3),
    ]
    text, page = make(tmp_path, records)
    assert "24.0 [22.5, 25.5] (-1.0, -4%)" in page
    assert "24.9 [23.4, 26.4] (none shown)" in page
    assert "4 KV heads will do" in text
    differences = page.split("### Difference to MHA")[1].split("Brackets hold")[0]
    assert re.search(r"GQA-8 .*\| -1.00 \[-1.59, -0.41\] +\|", differences)
    assert "(u)" not in differences
    assert "the interval of the difference contains 0" in page
    cut = [{k: v for k, v in r.items() if k != "replicates"} for r in records]
    _, page = make(tmp_path / "unpaired", cut)
    assert "24.0 [22.5, 25.5] (none shown)" in page
    assert re.search(r"GQA-8 .*\| -1.00 \[-3.12, \+1.12\] \(u\)", page)


def test_predictions_stand_beside_their_references_as_they_are(tmp_path):
    def predicted(settings, example, text):
        texts = {"inputs": "in " * 200, "targets": ["a *b*", "other"], "prediction": text}
        more = {"task": "parameter_qa", "example": example} | texts
        return record(settings, "evaluate", "prediction", len(text), **more)

    GQA = variant(8)
    records = [
        predicted(v, i, f"{v['num_kv_heads']} <x>\n{i}") for v in (PARENT, GQA) for i in (0, 1)
    ]
    _, page = make(tmp_path, [*WHOLE, *records, predicted(PARENT | {"seed": 1}, 0, "seed 1")])
    shown = page.split("## Predictions")[1].split("\n## ")[0]
    assert shown.count("input: ") == 2
    assert all(len(line) < 260 for line in shown.splitlines())
    assert r"- reference: a \*b\*" in shown
    assert r"- MHA: 16 \<x\> 1" in shown
    assert r"- GQA-8 mean, alpha 0.05: 8 \<x\> 0" in shown
    assert "seed 1" not in shown
    assert "&lt;x&gt; 1" in (tmp_path / "report/report.html").read_text()


def test_within_decides_the_answer(tmp_path):
    records = [
        *network(PARENT, 25.0, 0.04, error=0.0),
        *network(variant(8), 24.8, 0.03, error=0.1),
        *network(variant(1), 22.0, 0.03, error=0.1),
    ]
    results.append(tmp_path / "results.jsonl", records)
    for within, heads in ((1.0, "8 KV heads will do"), (5.0, "1 KV head will do")):
        text = report.run(tmp_path / "results.jsonl", tmp_path, {KEY}, within)
        assert heads in text
        assert heads in (tmp_path / "report.md").read_text()
        assert heads in (tmp_path / "report.html").read_text()


def job_of(examples, options=None, normalize=lambda text: text):
    """As much of a job as the scores of a stage need."""
    text = SimpleNamespace(
        options=options or {},
        examples=lambda task, split: examples,
        tokenizer=SimpleNamespace(normalize=normalize),
    )
    return SimpleNamespace(text=text)


def test_the_headline_alone_keeps_its_replicates():
    """As the scores of a job's evaluation are recorded, in the unit of the score."""
    examples = [Example("The shape. More.", (f"the shape {i % 3}",)) for i in range(12)]
    job = job_of(examples)
    predictions = ["the shape 1"] * 12
    records = {
        r["metric"]: r
        for r in evaluate._scores("docstring_summary", job, examples, predictions, examples)
    }
    assert [name for name, r in records.items() if "replicates" in r] == ["headline"]
    headline = records["headline"]
    assert len(headline["replicates"]) == metrics.REPLICATES
    assert min(headline["replicates"]) < headline["value"] < max(headline["replicates"])


def test_the_first_sentence_is_the_sources_without_what_was_put_before_it():
    options = {"metrics": ("exact_match",), "source": "s", "target": "t", "prefix": "shorten. "}
    options |= dict.fromkeys(("train", "validation", "test"), "")
    examples = [Example(f"shorten. The shape {i}. More.", (f"The shape {i}.",)) for i in range(3)]
    job = job_of(examples, {"files": options})
    records = evaluate._scores("files", job, examples, ["no"] * 3, examples)
    assert [r["value"] for r in records if r["metric"] == "first_sentence"] == [100]


def test_references_are_normalized_as_predictions_are(capsys):
    """A network whose vocabulary has no fullwidth question mark cannot write one."""
    options = {"metrics": ("exact_match", "bleu")}
    examples = [Example("Greet.", ("你好吗？",)), Example("Ask.", ("谁在那里？",))]
    job = job_of(examples, {"files": options}, normalize=lambda text: text.replace("？", "?"))
    records = evaluate._scores("files", job, examples, ["你好吗?", "谁在那里?"], examples)
    values = {r["metric"]: r["value"] for r in records}
    assert values["exact_match"] == 100
    assert "task files: bleu: each character is a word" in capsys.readouterr().out


def test_a_task_may_have_a_baseline_of_its_own():
    examples = [Example("English: on", ("o n",)), Example("English: no", ("n o",))]
    records = evaluate._scores("pronounce_en", job_of(examples), examples, ["o n"] * 2, examples)
    values = {r["metric"]: r["value"] for r in records}
    assert values["letter_by_letter"] == 100
    assert values["word_accuracy"] == 50
    assert values["phoneme_error_rate"] == 50
    assert "first_sentence" not in values


def test_missing_pieces_are_dashes(tmp_path):
    """A results file cut off after any record, or holding one stage alone, makes a report."""
    stages = list(dict.fromkeys(r["stage"] for r in WHOLE))
    for i, stage in enumerate(stages):
        only = [r for r in WHOLE if r["stage"] == stage]
        text, page = make(tmp_path / f"only{i}", only)
        assert "## Provenance" in page
        assert "500 us" not in page
        assert ("24.0 [" in page) == (stage == "evaluate")
        assert re.search(r"GQA-8 .* -", text) or stage in ("pretrain", "benchmark")
    timed = [r for r in WHOLE if r["stage"] in ("uptrain", "benchmark")]
    assert "500 us" in make(tmp_path / "timed", timed)[1]
    for end in (1, len(WHOLE) // 3, len(WHOLE) // 2):
        text, page = make(tmp_path / f"first{end}", WHOLE[:end])
        assert re.search(r"MHA +16 +" + ("-" if end == 1 else ""), text)
    _, page = make(tmp_path / "one task", [r for r in WHOLE if r["task"] != "parameter_qa"])
    assert "average" not in page.split("## The paper")[0].replace("Average", "")
    assert "parameter_qa" not in page


def test_an_empty_results_file_is_the_users_to_fill(tmp_path):
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(UserError, match=r"results.jsonl: no results of this command yet"):
        report.run(tmp_path / "results.jsonl", tmp_path, {KEY})
    assert not (tmp_path / "report.md").exists()


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


def test_a_loss_that_was_not_measured_has_no_margin(tmp_path):
    """A test set of one example has no other example's input."""
    settings = variant(8)
    losses = {"test_loss": 2.5, "test_loss_unigram": 4.0}
    records = [record(settings, "evaluate", m, v, task="parameter_qa") for m, v in losses.items()]
    _, page = make(tmp_path, [*records, score(settings, "parameter_qa", 24.0)])
    (row,) = (line for line in page.splitlines() if "2.500" in line and "4.000" in line)
    assert [cell.strip() for cell in row.strip("| ").split("|")][-5:] == [
        "2.500",
        tables.DASH,
        tables.DASH,
        "4.000",
        "+1.500",
    ]
    assert "the input is not used" not in page


def test_sizes_head_counts_and_methods_get_their_own_rows(tmp_path):
    crossed = variant(4) | {"num_kv_heads_cross_attention": 2, "num_kv_heads_encoder": 8}
    records = [
        score(settings, "parameter_qa", 20.0)
        for settings in (
            variant(1),
            variant(8, "none", 0.0),
            variant(8, "first", 0.0),
            PARENT,
            variant(8, size="mini"),
            crossed,
        )
    ]
    text, page = make(tmp_path, records)
    rows = page.split("## Variants")[1].split("\n\n")[1].splitlines()[2:]
    assert [re.split(r" +\| ", row.removeprefix("| "))[:2] for row in rows] == [
        ["MHA, nano", "16"],
        ["GQA-8 first, alpha 0, nano", "8"],
        ["GQA-8 from scratch, nano", "8"],
        ["GQA-4 cross-2 encoder-8 mean, alpha 0.05, nano", "self 4, cross 2"],
        ["MQA mean, alpha 0.05, nano", "1"],
        ["GQA-8 mean, alpha 0.05, mini", "8"],
    ]
    assert max(map(len, printed(text).splitlines())) <= 100


def test_provenance_names_networks_that_were_timed(tmp_path):
    _, page = make(tmp_path, [*WHOLE, *timings(4, 0.02)])
    rows = page.split("## Provenance")[1]
    assert re.search(r"run-8 +\| GQA-8 mean, alpha [^|]*; GQA-8 +\| convert, .*benchmark ", rows)
    assert re.search(r"run-4 +\| GQA-4 +\| benchmark ", rows)
    assert re.search(r"run-16 +\| MHA +\| pretrain, .*benchmark ", rows)
    assert "from scratch" not in rows


def test_a_runs_name_breaks_no_table(tmp_path):
    named = [r | {"run": "a|b <script>"} for r in WHOLE]
    _, page = make(tmp_path, named)
    assert r"a\|b \<script\>" in page
    whole = (tmp_path / "report/report.html").read_text()
    assert "<td>a|b &lt;script&gt;</td>" in whole


def test_several_commits_are_pointed_out(tmp_path):
    mixed = [*WHOLE[:-1], WHOLE[-1] | {"commit": "def5678"}]
    _, page = make(tmp_path, mixed)
    assert "several commits" in page
    assert "several devices" not in page


def test_nothing_to_draw_leaves_no_loss_figure(tmp_path):
    _, page = make(tmp_path, network(PARENT, 25.0, 0.04))
    assert not (tmp_path / "report/pretraining_loss.png").exists()
    assert "pretraining_loss.png" not in page


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


def with_key(records, key, time):
    return [r | {"stage_key": key, "time": time} for r in records]


def predicted(text):
    texts = {"inputs": "in", "targets": ["out"], "prediction": text}
    more = {"task": "parameter_qa", "example": 0} | texts
    return record(PARENT, "evaluate", "prediction", len(text), **more)


def test_a_report_is_made_of_the_stages_of_its_command(tmp_path):
    """A, then B in the same workdir, then A again, of which every stage is done: A's numbers."""
    first, second = (
        [
            *network(PARENT, quality, 0.04, error=0.0),
            *network(variant(8), quality - 10.0, 0.03, error=0.1),
            *curve(PARENT, "pretrain", losses),
            predicted(text),
        ]
        for quality, losses, text in (
            (60.0, (5.0, 4.5, 4.0), "from A"),
            (30.0, (2.0, 1.0), "from B"),
        )
    )
    written = [*with_key(first, "a", "2025-01-01"), *with_key(second, "b", "2025-01-02")]
    results.append(tmp_path / "results.jsonl", written)
    pages = []
    for keys in ({"a"}, {"b"}, {"a"}):
        report.run(tmp_path / "results.jsonl", tmp_path, keys)
        pages.append((tmp_path / "report.md").read_text())
        assert (tmp_path / "learning_curves.svg").exists()
    a, b, again = pages
    assert "60.0 [58.5, 61.5]" in a
    assert "-10.0" in a
    assert "from A" in a
    assert "30.0 [28.5" not in a
    assert "from B" not in a
    assert "30.0 [28.5, 31.5]" in b
    assert "from A" not in b
    assert again == a
    kept = results.of_stages(results.read(tmp_path / "results.jsonl"), {"a"})
    (points,) = [Summary(kept).curve(v, "pretrain") for v in Summary(kept).variants[:1]]
    assert [(step, e.value) for step, e in points] == [(100, 5.0), (200, 4.5), (300, 4.0)]


def test_of_a_stage_that_was_done_again_the_last_outcome_counts(tmp_path):
    """With fewer points and examples than before, nothing of the first outcome stays."""
    before = [*curve(PARENT, "pretrain", (5.0, 4.5, 4.0)), predicted("outdated")]
    after = [*curve(PARENT, "pretrain", (3.0, 2.5)), score(PARENT, "parameter_qa", 20.0)]
    written = [*with_key(before, "a", "2025-01-01"), *with_key(after, "a", "2025-01-02")]
    results.append(tmp_path / "results.jsonl", written)
    assert (
        results.of_stages(results.read(tmp_path / "results.jsonl"), {"a"}) == written[len(before) :]
    )
    report.run(tmp_path / "results.jsonl", tmp_path, {"a"})
    assert "outdated" not in (tmp_path / "report.md").read_text()


def test_results_of_others_and_of_old_versions_are_left_out_and_said(tmp_path, capsys):
    old = [{k: v for k, v in r.items() if k != "stage_key"} for r in network(PARENT, 20.0, 0.1)]
    results.append(tmp_path / "results.jsonl", [*old, *WHOLE])
    with pytest.raises(UserError, match="no results of this command yet, only of commands with"):
        report.run(tmp_path / "results.jsonl", tmp_path, {"absent"})
    assert f"{len(old)} records of an older version" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("size", 7, "variant.size is 7"),
        ("num_heads", 0, "number of heads below 1"),
        ("num_kv_heads", "8", "variant.num_kv_heads is '8'"),
        ("alpha", -1.0, "variant.alpha is -1.0"),
        ("method", None, "variant.method is None"),
        ("colour", "red", "variant.colour is unknown"),
    ],
)
def test_a_variant_that_is_none_is_refused_by_its_line(tmp_path, field, value, said):
    line = record(PARENT | {field: value}, "evaluate", "headline", 1.0, task="t")
    results.append(tmp_path / "results.jsonl", [record(PARENT, "pretrain", "steps", 1), line])
    with pytest.raises(UserError, match=re.escape("results.jsonl:2: ") + ".*" + re.escape(said)):
        report.run(tmp_path / "results.jsonl", tmp_path, {KEY})
