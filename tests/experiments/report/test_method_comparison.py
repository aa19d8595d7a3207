"""Ways of converting beside each other: seed by seed, against the parent and against the mean."""

import pytest

from experiments.report import conversion_section, method_comparison
from experiments.report.summary import Summary, variant_of
from experiments.stages.variant import TRAINED_AS_IT_IS, Variant
from tests.support.made_results import record, variant

ALPHAS = (0.0025, 0.01, 0.05)
# By method: loss at alpha 0 and at ALPHAS; each seed adds its own number to all of them.
LOSSES = {
    "mean": (5.0, 4.9, 4.7, 4.5),
    "svd-logit": (4.6, 4.48, 4.45, 4.41),
    "random": (6.0, 5.9, 5.7, 5.4),
}


def losses(seed, method, values, alphas=ALPHAS, kv_heads=4):
    own = 0.3 * seed
    converted = variant(kv_heads, method, 0.0, seed)
    lines = [record(converted, "convert", "validation_loss", values[0] + own)]
    for alpha, value in zip(alphas, values[1:], strict=True):
        # What seeds do to the difference between methods is small beside what they do to both.
        noise = 0.001 * seed * (method == "svd-logit")
        line = record(variant(kv_heads, method, alpha, seed), "uptrain", "validation_loss", value)
        lines.append(line | {"value": value + own + noise})
    return lines


def parent(seed):
    own = variant(16, "none", 0.0, seed)
    lines = [record(own, "pretrain", "validation_loss", 4.4 + 0.3 * seed)]
    later = variant(16, "none", 0.05, seed)
    return [*lines, record(later, "uptrain", "validation_loss", 4.35 + 0.3 * seed)]


def summary(seeds=(0, 1, 2), methods=LOSSES):
    records = [r for s in seeds for r in parent(s)]
    records += [r for s in seeds for m, x in methods.items() for r in losses(s, m, x)]
    return Summary(records)


def method(name):
    return variant_of(record(variant(4, name), "uptrain", "validation_loss", 0.0)).conversion


def shape_of(found):
    (shape,) = method_comparison.shapes(found)
    return shape


def test_networks_and_methods_are_found_in_the_papers_order():
    found = summary()
    assert shape_of(found).num_kv_heads == 4
    methods = method_comparison.methods(found, shape_of(found))
    assert [each.method_label for each in methods] == ["mean", "random", "svd-logit"]
    assert method_comparison.shapes(summary(methods={"mean": LOSSES["mean"]})) == []


def test_a_curve_begins_at_the_conversion():
    found = summary(seeds=(0,))
    points = method_comparison.curve(found, shape_of(found), method("mean"))
    assert {alpha: e.value for alpha, e in points.items()} == {
        0: 5.0,
        **dict(zip(ALPHAS, LOSSES["mean"][1:], strict=True)),
    }
    longer = method_comparison.curve(found, shape_of(found).parent, TRAINED_AS_IT_IS)
    assert {alpha: e.value for alpha, e in longer.items()} == {0: 4.4, 0.05: 4.35}


def test_damage_is_paired_by_seed():
    """Losses of the seeds lie 0.3 apart, damages not at all."""
    found = summary()
    damage = method_comparison.damage(found, shape_of(found).made_by(method("svd-logit"), 0.0))
    assert damage.value == pytest.approx(0.2)
    assert damage.high - damage.low < 1e-9
    assert found.loss(shape_of(found).parent).high > 4.9


def test_what_is_saved_lies_between_the_measured_alphas():
    found = summary(seeds=(0,))
    shape = shape_of(found)
    # From 4.6 at 0 to 4.48 at 0.0025: 4.5 is five sixths of the way.
    saved = method_comparison.saved(found, shape, method("svd-logit"))
    assert saved.alpha.value == pytest.approx(0.0025 * 5 / 6)
    assert method_comparison.saved(found, shape, method("mean")).alpha.value == pytest.approx(0.05)
    lost = method_comparison.saved(found, shape, method("random"))
    assert (lost.alpha, lost.missed, lost.seeds) == (None, 1, 1)


def test_better_means_beyond_the_interval():
    found = summary()
    alpha, by = method_comparison.soonest(found, shape_of(found), method("svd-logit"))
    assert alpha == 0.0025
    assert by.high < 0
    assert by.value == pytest.approx(-0.02 + 0.001)
    assert method_comparison.soonest(found, shape_of(found), method("random")) is None
    one_seed = summary(seeds=(0,))  # nothing is beyond an interval that is not there
    assert method_comparison.soonest(one_seed, shape_of(one_seed), method("svd-logit")) is None


def test_the_section_says_all_of_it():
    found = summary()
    text = conversion_section.section(found)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    converted, along = [row for row in rows if row[:2] == ["svd-logit", "4.900 ±0.745"]]
    assert converted[2] == "0.200 ±0.000"
    assert len(along) == 2 + len(ALPHAS)
    saved = {row[1]: row[2:] for row in rows if row[:1] == ["GQA-4"]}
    assert saved["svd-logit"] == ["0.0021 ±0.0000", "0.0025", "-0.019 ±0.002"]
    assert saved["random"] == ["not in 3 of 3 seeds", "-", "-"]
    assert conversion_section.section(summary(methods={"mean": LOSSES["mean"]})) == ""


def test_nothing_is_saved_if_one_seed_never_gets_there():
    never = (4.6, 4.58, 4.55, 4.51)
    records = [r for s in (0, 1) for r in (*parent(s), *losses(s, "mean", LOSSES["mean"]))]
    records += losses(0, "svd-logit", LOSSES["svd-logit"]) + losses(1, "svd-logit", never)
    found = Summary(records)
    saved = method_comparison.saved(found, shape_of(found), method("svd-logit"))
    assert (saved.alpha, saved.missed, saved.seeds) == (None, 1, 2)


def test_of_many_methods_the_papers_and_the_best_of_each_other_kind_are_told():
    names = {"mean": 4, "first": 3, "random": 5, "svd-logit": 1, "svd-weight": 2, "fuse": 4}
    names |= {"mean-renorm": 2.5, "largest": 2}
    losses = {Variant(**variant(8, name)).conversion: loss for name, loss in names.items()}

    def told(most):
        return [c.method_label for c in method_comparison.telling(losses, most)]

    assert len(told(8)) == 8
    assert told(5) == ["mean", "first", "random", "largest", "svd-logit"]
