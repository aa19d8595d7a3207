"""A sweep config stands for every combination of its grids' lists."""

import dataclasses
import importlib
import re

import pytest

from configs import base
from configs.sweeps import grid
from experiments.graph import sweep
from experiments.graph.plan import parent_config, plan
from experiments.graph.stage import merge
from gqa.conversion import METHODS
from gqa.runtime.errors import UserError


def get(name, arg=""):
    return importlib.import_module(f"configs.sweeps.{name}").get_config(arg)


def points(config):
    return [
        (
            point.size,
            point.convert.num_kv_heads_self_attention,
            point.convert.method,
            point.uptrain.alpha,
            point.seed,
            point.finetune.tasks,
        )
        for point in sweep.expand(config)
    ]


TASKS = "pronounce_en,pronounce_de,pronounce_fr"


def test_a_config_without_a_sweep_stands_for_itself():
    config = base.get_config("nano")
    assert sweep.expand(config) == [config]


def compared(text, kv_heads=8, **settings):
    config = base.get_config("nano", kv_heads=kv_heads)
    config.update_from_flattened_dict({"compare": text} | settings)
    return config


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("mean@0,svd@0", {}, [("mean", "logit", 0.0), ("svd", "logit", 0.0)]),
        (" svd-weight@.1 , first", {}, [("svd", "weight", 0.1), ("first", "logit", 0.05)]),
        ("svd@0", {"convert.space": "activation"}, [("svd", "activation", 0.0)]),
        # The config itself, however it is named, and a comparison that is named twice.
        ("mean,mean@0.05,svd@0,svd-logit@0.0", {}, [("svd", "logit", 0.0)]),
        ("mean@0", {"uptrain.alpha": 0.0}, []),
        ("mean@0,svd@0", {"kv_heads": 16}, []),  # converts nothing
        ("none,none@0", {}, [("none", "logit", 0.05), ("none", "logit", 0.0)]),
        ("svd@0", {"convert.num_kv_heads_encoder": 8, "kv_heads": 16}, [("svd", "logit", 0.0)]),
    ],
)
def test_a_config_comes_with_its_comparisons(text, settings, expected):
    config = compared(text, **settings)
    itself, *others = sweep.expand(config)
    assert itself == config
    found = [(p.convert.method, p.convert.space, p.uptrain.alpha) for p in others]
    assert found == expected
    assert all(sweep.expand(point) == [point] for point in others)
    assert {point.name for point in others} <= {config.name}


def test_comparisons_share_stages_with_the_config_and_change_none_of_its_keys():
    plain = plan(compared(""), None)
    stages = merge(plan(point, None) for point in sweep.expand(compared("mean@0,svd@0")))
    assert [stage.key for stage in stages[: len(plain)]] == [stage.key for stage in plain]
    kinds = [stage.kind for stage in stages[len(plain) :]]
    # The mean before uptraining has its conversion already, and times depend on shapes alone.
    assert sorted(kinds) == ["convert", *["evaluate"] * 6, *["finetune"] * 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("median@0", "'median@0': convert.method='median'; use one of mean, first"),
        ("svd@0,mean-what", "'mean-what': method 'mean-what': 'what' says nothing; after the"),
        ("mean@2", "'mean@2': uptrain.alpha=2.0; use a fraction from 0 to 1"),
        ("mean@-1", "'mean@-1': uptrain.alpha=-1.0; use 0 or more"),
        ("mean@x", "'mean@x': 'x' is no alpha; use a fraction from 0 to 1, as in mean@0.05"),
        ("none-kl1", "'none-kl1': method 'none-kl1': 'kl1' says nothing, because nothing is"),
        ("fuse-renorm", "'fuse-renorm': convert.renorm=True does not go with 'fuse'"),
    ],
)
def test_a_comparison_that_could_not_run_is_named(text, message):
    for kv_heads in (8, 16):
        with pytest.raises(UserError, match=f"^config.compare: {re.escape(message)}"):
            sweep.expand(compared(text, kv_heads=kv_heads))


def test_a_mistake_in_the_config_is_not_blamed_on_a_comparison():
    with pytest.raises(UserError, match=r"^convert\.where='encoder'"):
        sweep.expand(compared("mean@0", **{"convert.where": "encoder"}))


def test_a_sweep_ignores_comparisons():
    config = get("groups")
    points = sweep.expand(config)
    config.compare = "svd@0"
    assert sweep.expand(config) == points


def test_a_grid_is_every_combination():
    config = grid.sweep("x", "nano", a={"kv_heads": (8, 1), "alphas": (0.0, 0.1), "seeds": (0, 7)})
    expected = [
        ("nano", K, "mean", alpha, seed, TASKS)
        for K in (8, 1)
        for alpha in (0.0, 0.1)
        for seed in (0, 7)
    ]
    assert points(config) == expected
    assert all("sweep" not in point for point in sweep.expand(config))
    assert {point.name for point in sweep.expand(config)} == {"x-nano"}


def test_groups_has_every_divisor():
    config = get("groups")
    methods = ["mean", "svd", "none"]  # converted, and trained from scratch
    assert [p[1:3] for p in points(config)][::3] == [(K, m) for K in (8, 4, 2, 1) for m in methods]
    assert [p[1] for p in points(get("groups", "base"))][::3] == [6, 4, 3, 2, 1]
    config.sweep.groups.kv_heads, config.sweep.groups.methods = (4,), "mean"
    config.sweep.groups.seeds = (0,)
    config.sweep.groups.tasks = "parameter_qa"
    assert points(config) == [("nano", 4, "mean", 0.05, 0, "parameter_qa")]


def test_alpha_has_the_papers_lines():
    config = get("alpha")
    config.sweep.alpha.seeds = (0,)
    found = points(config)
    assert len(found) == 15
    assert {p[1] for p in found} == {16, 8, 1}
    assert {p[3] for p in found} == {0.0, 0.01, 0.02, 0.05, 0.1}
    stages = merge(plan(point, None) for point in sweep.expand(config))
    assert sum(s.kind == "pretrain" for s in stages) == 1
    assert sum(s.kind == "convert" for s in stages) == 2  # MHA stays as it is
    assert sum(s.kind == "uptrain" for s in stages) == 12  # none of no steps


def test_conversion_has_every_method_of_the_paper():
    found = points(get("conversion"))
    scored = [p for p in found if p[5]]
    for method in ("mean", "first", "random"):
        assert {p[4] for p in scored if p[1:4] == (1, method, 0.05)} == {0, 1, 2}
    ours = {p[2] for p in found}
    assert ours == {*METHODS}
    curve = {p[3] for p in found if p[1:3] == (4, "svd")}
    assert curve == {0, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1}


def test_table1_has_two_sizes():
    found = [p[:4] for p in points(get("table1", "xxl"))]
    assert found == [
        ("xxl", 8, "svd", 0.0),
        ("xxl", 1, "svd", 0.0),
        *[("xxl", K, method, 0.05) for K in (8, 1) for method in ("mean", "svd", "none")],
        ("large", 16, "mean", 0.0),
    ]
    with pytest.raises(UserError, match="size='small' has no smaller one; use one of nano, mini"):
        get("table1", "small")


def test_another_size_has_its_own_recipe_and_what_the_user_changed():
    config = get("table1", "mini")
    config.finetune.steps = 7
    config.model.remat = "full"
    large, *_, small = sweep.expand(config)
    assert (large.size, small.size) == ("mini", "nano")
    assert large.name == small.name == config.name != base.get_config("nano").name
    assert large.finetune.steps == small.finetune.steps == 7
    assert large.model.remat == small.model.remat == "full"
    assert small.pretrain.steps == base.get_config("nano").pretrain.steps != large.pretrain.steps
    expected = dataclasses.replace(parent_config(base.get_config("nano")), remat="full")
    assert parent_config(small) == expected


def test_sizes_that_train_in_minutes_have_three_seeds():
    for size, seeds in (("nano", {0, 1, 2}), ("mini", {0}), ("xxl", {0})):
        assert {p[4] for p in points(get("alpha", size))} == seeds


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("methods", "", "sweep.alpha.methods is empty"),
        ("seeds", (), r"sweep.alpha.seeds=\(\); use numbers such as 0,1"),
        ("seeds", (0.5,), r"sweep.alpha.seeds=\(0.5,\)"),
        ("kv_heads", ("x",), r"sweep.alpha.kv_heads=\('x',\)"),
        ("kv_heads", (True,), r"sweep.alpha.kv_heads=\(True,\)"),
        ("alphas", (None,), r"sweep.alpha.alphas=\(None,\); use numbers such as 0.05,0.1"),
        ("sizes", "nano,medium", "size='medium'; use one of"),
    ],
)
def test_what_cannot_vary_is_refused(key, value, message):
    config = get("alpha")
    config.sweep.alpha[key] = value
    with pytest.raises(UserError, match=message):
        sweep.expand(config)


def test_nothing_is_trained_from_scratch_beside_a_trained_network():
    """A sweep leaves such points out, unless they are all that a grid asks for."""
    config = get("groups")
    config.init.t5x = "checkpoint"
    assert {p[2] for p in points(config)} == {"mean", "svd"}
    config.sweep.groups.methods = "none"
    assert {p[2] for p in points(config)} == {"none"}
    with pytest.raises(
        UserError, match=r"^config.compare: 'none': convert.method='none' trains a n"
    ):
        sweep.expand(compared("none", **{"init.t5x": "checkpoint"}))


def test_attentions_are_converted_as_the_grid_says():
    config = grid.sweep(
        "x", "mini", a={"kv_heads": (8, 0), "where": "self_attention,cross_attention"}
    )
    found = [
        (
            p.convert.where,
            p.convert.num_kv_heads_self_attention,
            p.convert.num_kv_heads_cross_attention,
        )
        for p in sweep.expand(config)
    ]
    assert sorted(found) == [
        ("cross_attention", 8, 8),
        ("cross_attention", 16, 16),
        ("self_attention", 8, 8),
        ("self_attention", 16, 16),
    ]
