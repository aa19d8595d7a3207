"""The first sentence is right for every outcome, and its table fits a terminal."""

import pytest

from experiments.report import headline, learning_section, tables
from experiments.report.summary import Summary
from tests.support.made_results import PARENT, paired_score, record, timings, variant

SVD = variant(8, "svd-logit", 0.0)
TASK = "parameter_qa"


def scored(settings, value, error=0.1):
    return paired_score(settings, TASK, value, error)


def timed(heads, seconds, spread):
    """Timings whose quartiles of the time per sample lie this far from the median."""
    records = timings(heads, seconds)
    for r in records:
        if r["metric"] == "sample_seconds":
            r |= {"low": seconds * (1 - spread), "high": seconds * (1 + spread)}
    return records


def say(*records, within=1.0):
    flat = [r for some in records for r in (some if isinstance(some, list) else [some])]
    return headline.sentence(Summary(flat), within)


PARENT_SCORE = scored(PARENT, 25.0, 0.0)
TIMES = [*timed(16, 0.04, 0.02), *timed(8, 0.03, 0.02)]
LOSSES = [record(PARENT, "pretrain", "validation_loss", 3.0)]


@pytest.mark.parametrize(
    ("records", "said", "unsaid"),
    [
        # A difference inside the interval, and one outside it, on either side.
        (
            [PARENT_SCORE, scored(SVD, 24.9)],
            "(svd-logit, not uptrained) the network scores",
            "best",
        ),
        ([PARENT_SCORE, scored(SVD, 24.9)], "to +0.1: no difference shown)", "seeds"),
        ([PARENT_SCORE, scored(SVD, 24.0)], "1.0 points below the multi-head parent", "no diff"),
        ([PARENT_SCORE, scored(SVD, 26.0)], "1.0 points above the multi-head parent", "below"),
        ([PARENT_SCORE, scored(SVD, 25.01)], "less than 0.1 points from", "above"),
        ([PARENT_SCORE, scored(SVD, 24.0)], "All is from one seed", "means over"),
        # Without timings; with them: faster, slower, and neither.
        ([PARENT_SCORE, scored(SVD, 24.0)], "; its time was not measured.", "of the KV cache"),
        (
            [PARENT_SCORE, scored(SVD, 24.0), *TIMES],
            "generates a sample in 0.75 of the time (quartiles 0.72 to 0.78) with 0.50 of the KV",
            "slower",
        ),
        (
            [PARENT_SCORE, scored(SVD, 24.0), *timed(16, 0.04, 0.02), *timed(8, 0.05, 0.02)],
            "is slower: a sample takes 1.25 times as long (quartiles 1.20 to 1.30) with 0.50",
            "generates",
        ),
        (
            [PARENT_SCORE, scored(SVD, 24.0), *timed(16, 0.04, 0.2), *timed(8, 0.042, 0.2)],
            "a sample in 1.05 of the time (quartiles 0.70 to 1.57: no difference shown)",
            "slower",
        ),
        # Without scores, without the parent's, without any network with fewer KV heads.
        (
            [*LOSSES, record(SVD, "convert", "validation_loss", 3.2)],
            "has a validation loss of 3.200 nats per token, 0.200 above the multi-head parent's",
            "scores",
        ),
        ([scored(SVD, 24.0)], "; its parent was not scored", "points"),
        ([PARENT_SCORE], "hold no network with fewer KV heads", "With"),
        ([record(SVD, "uptrain", "steps", 3)], "the network was not scored; its time was", "nats"),
        # Networks without a conversion, and those whose attentions differ.
        ([PARENT_SCORE, scored(variant(8, "none", 0.0), 24.0)], "(trained from scratch)", "svd"),
        (
            [PARENT_SCORE, scored(SVD | {"num_kv_heads_cross_attention": 16}, 24.0)],
            "As GQA-8 cross-16 with 16 query heads",
            "With 8",
        ),
    ],
)
def test_the_sentence_is_right_for_every_outcome(records, said, unsaid):
    sentence = say(records)
    assert said in sentence
    assert unsaid not in sentence


def test_the_best_of_several_is_named_as_such_beside_the_papers_method():
    mean = scored(variant(8), 24.0)
    sentence = say(PARENT_SCORE, scored(variant(8, alpha=0.0), 20.0), mean, scored(SVD, 24.9))
    assert "With 8 of 16 KV heads (svd-logit, not uptrained, the best of 3 such" in sentence
    assert "The paper's method (mean, uptrained with alpha 0.05) scores 24.0" in sentence
    assert "20.0" not in sentence
    sentence = say(PARENT_SCORE, mean, scored(SVD, 23.0))
    assert "(mean, uptrained with alpha 0.05, the best of 2" in sentence
    assert "The paper's method" not in sentence


@pytest.mark.parametrize(("within", "heads"), [(1.0, 4), (3.0, 1), (0.7, 8), (0.1, 8)])
def test_of_several_numbers_of_heads_the_fewest_that_are_near_enough_are_named(within, heads):
    """Where none is near enough, the best score is named."""
    scores = {8: 24.8, 4: 24.4, 1: 23.0}
    records = [scored(variant(k), value) for k, value in scores.items()]
    assert f"With {heads} of 16 KV heads" in say(PARENT_SCORE, *records, within=within)


def test_several_seeds_are_said():
    records = [
        scored(settings | {"seed": seed}, value)
        for settings, value in ((PARENT, 25.0), (SVD, 24.5))
        for seed in (0, 1, 2)
    ]
    assert "These are means over 3 seeds." in say(records)


def test_words_are_said_and_error_rates_are_better_when_lower():
    def in_unit(unit, other):
        records = [scored(SVD, 20.0), scored(variant(8), other), PARENT_SCORE]
        return say([r | {"unit": unit} for r in records])

    assert "says 30.0% of the words right, 5.0 points above" in in_unit("word_accuracy %", 30.0)
    found = in_unit("phoneme_error_rate %", 22.0)
    assert "scores 20.0 (phoneme_error_rate, lower is better), 5.0 points below" in found


def default_job():
    """One parent and three variants with 8 KV heads, on three tasks."""
    variants = [(PARENT, 80.0), (variant(8, alpha=0.0), 60.0), (variant(8), 77.0), (SVD, 79.7)]
    records = []
    for settings, value in variants:
        for task in ("pronounce_en", "pronounce_de", "pronounce_fr"):
            own = scored(settings, value)
            records.append(own | {"task": task, "unit": "word_accuracy %"})
            low = record(settings, "evaluate", "letter_by_letter", 3.6, task=task)
            records += [low, record(settings, "evaluate", "constant_answer", 0.0, task=task)]
    return [*records, *TIMES]


def test_the_default_jobs_table_is_one_block_of_100_characters():
    header, rows = headline.table(Summary(default_job()), 1.0)
    assert len(header) <= 7
    assert rows[3][:4] == ["GQA-8 svd-logit, alpha 0", "8", "256 KiB (0.50x)", "30.0 ms (0.75x)"]
    assert [row[4] for row in rows] == ["80.0", "60.0", "77.0", "79.7"]
    assert rows[0][0] == "MHA"
    lines = tables.plain(header, rows).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 100


def test_a_large_sweep_shows_the_telling_variants_alone():
    methods = ("mean", "first", "random", "svd-logit", "svd-weight", "svd-activation")
    records = [PARENT_SCORE, *TIMES]
    for heads in (8, 4):
        for i, method in enumerate(methods):
            for alpha in (0.0, 0.05):
                records.append(scored(variant(heads, method, alpha), 20.0 + i + alpha))
    summary = Summary(records)
    _, rows = headline.table(summary, 1.0)
    assert {row[0] for row in rows} == {
        "MHA",
        *(f"GQA-{k} {how}, alpha 0.05" for k in (8, 4) for how in ("mean", "svd-activation")),
    }
    assert "20 more variants are in the report." in headline.note(summary, 1.0)


def test_without_scores_the_table_shows_losses():
    records = [*LOSSES, record(SVD, "convert", "validation_loss", 3.2)]
    header, rows = headline.table(Summary(records), 1.0)
    assert header[-2:] == ["loss", "above MHA's"]
    assert [row[-2:] for row in rows] == [["3.000", "-"], ["3.200", "+0.200"]]

    # Straight after conversion, also where the paper's method was uptrained later.
    records.append(record(variant(8), "convert", "validation_loss", 4.0))
    records.append(record(variant(8), "uptrain", "validation_loss", 3.1))
    found = headline.sentence(Summary(records), 1.0)
    assert found.startswith("With 8 of 16 KV heads (svd-logit, not uptrained) the network has a")
    assert "The paper's method (mean, not uptrained) has a validation loss of 4.000" in found


def test_baselines_are_said_and_what_is_not_above_them():
    found = learning_section.answers_without_a_network(Summary(default_job()))
    assert found == (
        "Baselines without a network: best constant answer 0.0, letter by letter 3.6 "
        "(averages over 3 tasks)."
    )
    low = [PARENT_SCORE, scored(SVD, 12.0)]
    low += [record(v, "evaluate", "constant_answer", 11.0, task=TASK) for v in (PARENT, SVD)]
    found = learning_section.answers_without_a_network(Summary(low))
    name = "GQA-8 svd-logit, alpha 0"
    assert (
        found == f"{TASK}: not shown to be above the baselines (best constant answer 11.0): {name}."
    )
