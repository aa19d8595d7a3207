"""Which rows results make, what each shows, and that timings keep one clock."""

import pytest

from experiments.report.summary import Summary, variant_of
from experiments.stages.variant import Variant
from tests.support.made_results import PARENT, WHOLE, network, record, score, timings, variant


def network_of(num_kv_heads, cross_attention=None, encoder=16, method="mean", alpha=0.05):
    """The variant of a row, with these KV heads."""
    heads = {"num_kv_heads_cross_attention": cross_attention or num_kv_heads}
    heads |= {"num_kv_heads_encoder": encoder}
    return Variant(**variant(num_kv_heads, method, alpha) | heads)


def token(summary, settings):
    row = variant_of(record(settings, "benchmark", "token_seconds", 0.0))
    assert row in summary.variants
    return summary.get(row, "benchmark", "token_seconds")


def scored(*several):
    return [score(settings, "parameter_qa", 20.0) for settings in several]


def beside(seconds, size):
    return {"parent_value": seconds / 40, "parent_size": size}


def timed(kv_heads, seconds, size="nano", **more):
    return [r for r in timings(kv_heads, seconds, size, **more) if r["metric"] == "token_seconds"]


def test_timings_compare_within_their_own_run():
    """The parent timed again at half the speed, beside another variant, changes no ratio."""
    lines = [*timed(16, 0.04), *timed(8, 0.03, parent_value=0.04 / 40)]
    lines += [*timed(16, 0.08), *timed(1, 0.02, parent_value=0.08 / 40)]
    summary = Summary([*lines, *scored(PARENT, variant(8), variant(1))])
    parent, grouped, single = (token(summary, s) for s in (PARENT, variant(8), variant(1)))
    assert parent.value == pytest.approx(0.08 / 40)
    assert grouped.value == pytest.approx(0.06 / 40)
    assert (grouped.low, grouped.high) == pytest.approx((0.054 / 40, 0.072 / 40))
    assert single.value == pytest.approx(0.02 / 40)


def test_a_reference_may_be_of_another_size_and_have_a_reference_itself():
    """mini's grouped network took 1.5 of mini's MHA, which took 3 of nano's, last seen at 0.1."""
    mini = {"size": "mini"}
    lines = [*timed(16, 0.04), *timed(16, 0.12, **mini, **beside(0.04, "nano"))]
    lines += timed(8, 0.9, **mini, **beside(0.6, "mini"))
    lines += timed(16, 0.1)
    rows = scored(PARENT, variant(8, **mini), variant(16, "none", 0.0, **mini))
    summary = Summary([*lines, *rows])
    assert token(summary, PARENT).value == pytest.approx(0.1 / 40)
    assert token(summary, variant(16, "none", 0.0, **mini)).value == pytest.approx(0.3 / 40)
    assert token(summary, variant(8, **mini)).value == pytest.approx(0.45 / 40)


def test_references_in_a_circle_or_lost_leave_a_timing_as_it_is():
    lines = timed(16, 0.1, "nano", **beside(0.3, "mini"))
    lines += timed(16, 0.3, "mini", **beside(0.1, "nano"))
    lines += timed(8, 0.2, "base", **beside(0.4, "base"))
    rows = scored(PARENT, variant(8, size="base"))
    summary = Summary([*lines, *rows])
    assert token(summary, PARENT).value == pytest.approx(0.1 / 40)
    assert token(summary, variant(8, size="base")).value == pytest.approx(0.2 / 40)


def test_every_variant_shows_its_networks_timing_and_a_timing_makes_no_row():
    several = [variant(8), variant(8, alpha=0.1), variant(8, "first"), variant(8, seed=3)]
    control = record(variant(16, "none", 0.05), "uptrain", "validation_loss", 2.9)
    lines = [*timings(16, 0.04), *timings(8, 0.03), *timings(4, 0.02), *timings(8, 0.5, "mini")]
    summary = Summary([*scored(PARENT, *several), control, *lines])
    assert [v.label for v in summary.variants] == [
        "MHA",
        "MHA, alpha 0.05",
        "GQA-8 first, alpha 0.05",
        "GQA-8 mean, alpha 0.05",
        "GQA-8 mean, alpha 0.1",
    ]
    found = [summary.get(v, "benchmark", "sample_seconds").value for v in summary.variants]
    assert found == [0.04, 0.04, 0.03, 0.03, 0.03]
    assert Summary(lines).variants == []


def test_a_variant_without_one_task_has_no_average():
    records = [*scored(PARENT), score(PARENT, "docstring_summary", 30.0)]
    summary = Summary([*records, *scored(variant(8))])
    parent, grouped = summary.variants
    assert summary.average(parent).value == 25
    assert summary.average(grouped) is None
    assert summary.against_parent(grouped) is None
    assert summary.against_parent(grouped, "parameter_qa").value == 0
    assert summary.against_parent(parent, "parameter_qa") is None


def test_the_last_number_of_a_seed_stands_and_seeds_widen_the_interval():
    values, settings = [99.0, 20.0, 24.0], [variant(8, seed=seed) for seed in (0, 0, 1)]
    records = [score(s, "parameter_qa", v) for s, v in zip(settings, values, strict=True)]
    summary = Summary(records)
    (row,) = summary.variants
    found = summary.headline(row, "parameter_qa")
    assert (found.value, found.seeds, found.n) == (22, 2, 400)
    # Student's t for 95% and one degree of freedom is 12.706; the seeds' standard error is 2.
    assert found.high - 22 == pytest.approx((1.5**2 + (12.706 * 2) ** 2) ** 0.5, rel=1e-4)


def test_one_conversion_serves_every_alpha():
    """And an uptrained MHA began as the parent, without any conversion."""
    records = [
        record(PARENT, "pretrain", "validation_loss", 3.0, task="docstrings"),
        record(variant(8, alpha=0.0), "convert", "validation_loss", 4.0),
    ]
    assert [v.label for v in Summary(records).variants] == ["MHA", "GQA-8 mean, alpha 0"]
    tuned = [variant(8), variant(8, alpha=0.1), variant(16, "none", 0.1)]
    summary = Summary(
        [*records, *(record(v, "uptrain", "validation_loss", 3.0 + v["alpha"]) for v in tuned)]
    )
    losses = {
        v.label: [e.value if e else None for e in summary.losses(v)] for v in summary.variants
    }
    assert losses == {
        "MHA": [3.0, None, None],
        "MHA, alpha 0.1": [3.0, None, 3.1],
        "GQA-8 mean, alpha 0.05": [3.0, 4.0, 3.05],
        "GQA-8 mean, alpha 0.1": [3.0, 4.0, 3.1],
    }


def test_names_say_how_a_network_was_reached():
    crossed = network_of(4, 2, 8)
    assert crossed.label == "GQA-4 cross-2 encoder-8 mean, alpha 0.05"
    assert crossed.network == "GQA-4 cross-2 encoder-8"
    assert not crossed.groups_decoder_evenly
    assert network_of(8, method="none", alpha=0.0).label == "GQA-8 from scratch"
    assert all(v.groups_decoder_evenly for v in Summary(WHOLE).variants)
    sizes = Summary([*WHOLE, *network(variant(1, size="mini"), 20.0, 0.1)])
    assert sizes.title(sizes.variants[0]) == "MHA, nano"


def test_the_examples_shown_are_those_of_the_first_seed():
    def shown(settings, text, task="parameter_qa"):
        own = record(settings, "evaluate", "prediction", 1.0, task=task)
        return [own | {"example": i, "prediction": f"{text} {i}"} for i in range(2)]

    several = [variant(8, seed=seed) for seed in (3, 1, 2)]
    lines = [line for s in several for line in shown(s, f"seed {s['seed']}")]
    lines += shown(variant(8, seed=0), "another task", "docstring_summary")
    summary = Summary([*lines, *scored(*several)])
    (found,) = summary.variants
    texts = [r["prediction"] for r in summary.predictions(found, "parameter_qa")]
    assert texts == ["seed 1 0", "seed 1 1"]
    assert summary.predictions(found.parent, "parameter_qa") == []


def test_a_network_from_scratch_begins_at_its_own_loss():
    """Also one that is trained further: neither was converted from the multi-head network."""
    scratch, further = variant(8, "none", 0.0), variant(8, "none", 0.1)
    loss = "validation_loss"
    summary = Summary(
        [
            record(PARENT, "pretrain", loss, 3.0),
            record(scratch, "pretrain", loss, 3.3),
            record(further, "uptrain", loss, 3.2),
            record(variant(8, alpha=0.0), "convert", loss, 4.0),
            record(variant(8), "uptrain", loss, 3.1),
        ]
    )
    losses = {
        v.label: [e and e.value for e in (*summary.losses(v), summary.loss(v))]
        for v in summary.variants
    }
    assert losses == {
        "MHA": [3.0, None, None, 3.0],
        "GQA-8 from scratch": [3.3, None, None, 3.3],
        "GQA-8 from scratch, alpha 0.1": [3.3, None, 3.2, 3.2],
        "GQA-8 mean, alpha 0.05": [3.0, 4.0, 3.1, 3.1],
    }


def test_an_encoder_that_was_converted_does_not_group_the_decoder_alone():
    assert network_of(4).groups_decoder_evenly
    assert not network_of(4, encoder=4).groups_decoder_evenly
    assert not network_of(4, 2).groups_decoder_evenly


def test_a_curve_is_in_the_order_of_its_steps():
    points = [(200, 3.0), (100, 4.0), (300, 2.5)]
    lines = [record(PARENT, "pretrain", "learning_curve", x, step=step) for step, x in points]
    summary = Summary([*lines, *scored(PARENT)])
    (found,) = summary.variants
    curve = [(step, e.value) for step, e in summary.curve(found, "pretrain")]
    assert curve == [(100, 4.0), (200, 3.0), (300, 2.5)]
