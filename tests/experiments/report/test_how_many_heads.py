"""Which number of KV heads the report names, from intervals made to lie where a test wants them."""

import numpy as np
import pytest

from experiments.report import how_many_heads
from experiments.report.summary import Summary
from tests.support.made_results import (
    EXAMPLES,
    PARENT,
    TASKS,
    network,
    paired_score,
    record,
    score,
    timings,
    variant,
)

TIMES = [r for k in (16, 8, 4, 2, 1) for r in timings(k, 0.02 + k / 800)]


def results(differences, n=EXAMPLES, seeds=(0,)):
    """By number of KV heads: the difference to MHA of each task, and its standard error."""
    lines = list(TIMES)
    for seed in seeds:
        parent = PARENT | {"seed": seed}
        for task in TASKS:
            lines.append(paired_score(parent, task, 25.0, 0.0, n))
            for heads, (value, error) in differences.items():
                lines.append(paired_score(variant(heads, seed=seed), task, 25.0 + value, error, n))
    return lines


def text(lines, within=1.0):
    return " ".join(how_many_heads.plain(Summary(lines), within).split())


CLEAR = {8: (-0.2, 0.1), 4: (-0.4, 0.1), 2: (-2.0, 0.1), 1: (-5.0, 0.1)}


def test_the_fewest_that_is_near_enough_is_named_with_what_it_saves():
    found = text(results(CLEAR))
    assert "within 1 point of the score" in found
    assert "4 KV heads will do: the average score differs from MHA's by -0.40 points, 95%" in found
    assert "1.60x as fast as MHA per sample, 1.60x per token" in found
    assert "128 KiB for each sequence, 0.25x of MHA's, so that the same memory holds" in found
    assert "may do as well" not in found
    assert "With one seed, they do not include the chance in training" in found
    assert "With one seed" not in text(results(CLEAR, seeds=(1, 2, 3)))


@pytest.mark.parametrize(
    ("within", "heads"), [(0.36, "8 KV heads will"), (3, "2 KV heads will"), (9, "1 KV head will")]
)
def test_it_depends_on_what_is_near_enough(within, heads):
    found = text(results(CLEAR), within)
    assert heads in found
    assert f"within {within:g} points" in found


def test_an_error_rate_is_better_when_it_is_lower():
    """More KV heads have fewer errors here: every difference is that of CLEAR with its sign turned.

    The answer is the same as for a score of which more is better.
    """
    lines = results({heads: (-value, error) for heads, (value, error) in CLEAR.items()})
    errors = [
        r | {"unit": "phoneme_error_rate %"} if r["metric"] == "headline" else r for r in lines
    ]
    found = text(errors)
    assert "If the whole interval lies below 1, the number of KV heads is good enough" in found
    assert "4 KV heads will do: the average score differs from MHA's by +0.40 points, 95%" in found

    turned = {8: (3.0, 0.1), 1: (5.0, 0.1)}
    worse = [r | {"unit": "phoneme_error_rate %"} for r in results(turned)]
    assert "all are shown to be more than 1 point worse than MHA" in text([*worse])

    tie = {8: (1.001, 0.4), 1: (5.0, 0.4)}
    undecided = [r | {"unit": "phoneme_error_rate %"} for r in results(tie)]
    assert "For 8 KV heads, the difference of +1.00 is too near 1 for" in text(undecided)


def test_an_undecided_smaller_number_is_pointed_out():
    found = text(results(CLEAR | {2: (-1.1, 0.4), 1: (-0.9, 0.4)}))
    assert "4 KV heads will do" in found
    assert "2 KV heads may do as well, but these results cannot tell: interval [-1." in found
    assert "1 KV head may do as well, but these results cannot tell: interval [-1." in found
    above = text(results(CLEAR | {8: (-0.9, 0.4)}))
    assert "4 KV heads will do" in above
    assert "may do as well" not in above


def test_none_is_near_enough():
    found = text(results({8: (-3.0, 0.1), 1: (-5.0, 0.1)}))
    assert "No measured number of KV heads below MHA's 16" in found


def test_the_data_cannot_tell_and_how_much_would():
    """With as many examples as it asks for, and nothing else changed, it can tell."""
    undecided = {8: (-0.6, 0.4), 1: (-5.0, 0.4)}
    found = text(results(undecided))
    assert "These results cannot tell. No number of KV heads is shown" in found
    assert "8 KV heads, interval [-1." in found
    needed = int(found.split("(parameter_qa ")[1].split(",")[0])
    assert EXAMPLES < needed < 10 * EXAMPLES
    for n, told in ((0.9 * needed, False), (needed, True)):
        errors = {k: (v, e * (EXAMPLES / n) ** 0.5) for k, (v, e) in undecided.items()}
        assert ("8 KV heads will do" in text(results(errors, n=int(n)))) == told


def test_no_number_of_examples_tells_what_seeds_leave_open_or_a_tie():
    noisy = results({8: (-0.6, 0.1), 1: (-5.0, 0.1)}, seeds=(1,))
    for seed, value in ((2, -0.1), (3, -1.3)):
        noisy += [paired_score(PARENT | {"seed": seed}, task, 25.0, 0.0) for task in TASKS]
        for heads, shift in ((8, value), (1, value - 5)):
            settings = variant(heads, seed=seed)
            noisy += [paired_score(settings, task, 25.0 + shift, 0.1) for task in TASKS]
    found = text(noisy)
    assert "For 8 KV heads, more test examples alone would not decide" in found
    tie = text(results({8: (-1.001, 0.4), 1: (-5.0, 0.4)}))
    assert "For 8 KV heads, the difference of -1.00 is too near -1 for" in tie


def test_scores_without_intervals_tell_nothing():
    lines = [*TIMES]
    for settings, value in ((PARENT, 25.0), (variant(8), 25.0), (variant(1), 25.0)):
        lines += [score(settings, t, value) | {"low": None, "high": None} for t in TASKS]
    found = text(lines)
    assert "These results cannot tell" in found
    assert "8 KV heads, its difference has no interval" in found


def test_without_enough_there_is_no_section():
    lines = results(CLEAR)
    keep = {
        "MHA alone": [r for r in lines if r["variant"]["num_kv_heads"] == 16],
        "one other": [r for r in lines if r["variant"]["num_kv_heads"] >= 8],
        "no MHA": [r for r in lines if r["variant"]["num_kv_heads"] < 16],
        "no times": [r for r in lines if r["stage"] != "benchmark"],
        "no scores": network(PARENT, 25.0, 0.04)[:3] + TIMES,
        "other alphas": [
            r for r in lines if r["variant"]["num_kv_heads"] == 16 or r["stage"] == "benchmark"
        ]
        + [
            paired_score(variant(k, alpha=k / 100), task, 25.0, 0.1)
            for k in (8, 4, 1)
            for task in TASKS
        ],
    }
    for name, some in keep.items():
        assert how_many_heads.plain(Summary(some), 1.0) == "", name
        assert how_many_heads.markdown(Summary(some), 1.0) == "", name


def test_sizes_and_ways_are_answered_apart_and_the_page_says_the_same():
    other = [r | {"variant": r["variant"] | {"size": "mini"}} for r in results(CLEAR)]
    page = how_many_heads.markdown(Summary([*results(CLEAR), *other]), 1.0)
    assert page.count("4 KV heads will do") == 2
    assert "### nano, mean, alpha 0.05" in page
    assert "### mini, mean, alpha 0.05" in page
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in (row[0], row[2])] for row in rows[2:6]] == [
        ["1", "no"],
        ["2", "no"],
        ["4", "yes"],
        ["8", "yes"],
    ]
    assert max(map(len, how_many_heads.plain(Summary(other), 1.0).splitlines())) <= 100
    assert np.isfinite(Summary(other).against_parent(Summary(other).variants[1]).low)


def test_each_column_is_the_cost_its_header_names():
    """Of made times: half per sample, a quarter per token; KV heads decide the cache's size."""
    lines = [r for r in results(CLEAR) if r["stage"] != "benchmark"]
    for heads, sample, token in ((16, 8.0, 4.0), (8, 4.0, 1.0), (4, 2.0, 0.5)):
        costs = {"sample_seconds": sample, "token_seconds": token, "kv_cache_bytes": heads}
        shape = variant(heads, "none", 0.0)
        lines += [record(shape, "benchmark", metric, cost) for metric, cost in costs.items()]
    page = how_many_heads.markdown(Summary(lines), 1.0)
    table = [
        [c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line
    ]
    assert table[0][3:] == ["speed / sample", "speed / token", "KV cache"]
    assert {row[0]: row[3:] for row in table[2:]} == {
        "8": ["2.00x", "4.00x", "0.50x"],
        "4": ["4.00x", "8.00x", "0.25x"],
    }
    assert "4.00x as fast as MHA per sample, 8.00x per token" in page
