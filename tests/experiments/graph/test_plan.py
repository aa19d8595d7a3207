"""Stages are keyed by what determines them, and by nothing else."""

import json
from dataclasses import replace

import pytest

from configs import base, docstrings
from experiments.graph.plan import evaluate_checkpoint, make_setup, plan
from experiments.graph.stage import Stage, ancestors, merge
from experiments.stages.settings import SETTINGS, ConvertSettings, Setup, UptrainSettings
from experiments.stages.text import Text
from experiments.stages.typed_json import from_json, to_json
from tests.support import variants


class Prepared(Text):
    """A text that is known by name only."""

    def source(self, task):
        return f"source of {task}"

    def training_source(self, task):
        return f"training source of {task}"

    def metrics(self, task):
        return ["rougeL"]


class Vocabulary:
    """Known by its hash."""

    hash = "pieces"


VARIANT = variants.grouped(seed=1)
PREPARED = Prepared(Vocabulary(), None, {}, None)


def stages(prepared=PREPARED, kv_heads=8, reference=None, **overrides):
    config = docstrings.get_config("nano", kv_heads)
    config.update_from_flattened_dict(overrides)
    return plan(config, prepared, reference)


def keys(**settings):
    return {stage.label: stage.key for stage in stages(**settings)}


def test_every_stage_comes_after_what_it_builds_on():
    seen = set()
    for stage in stages():
        assert {parent.key for parent in stage.parents} <= seen
        seen.add(stage.key)
    assert len(seen) == 12


def test_variants_share_the_multi_head_parent():
    grouped, single = keys(), keys(kv_heads=1)
    assert len(grouped) == 12
    shared = {label for label in grouped if grouped[label] == single.get(label)}
    assert shared == {label for label in grouped if "16 KV heads" in label}
    assert len(shared) == 5


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"pretrain.steps": 9}, {"benchmark"}),
        ({"seed": 1}, {"benchmark"}),
        ({"uptrain.alpha": 0.5}, {"pretrain", "convert", "benchmark"}),
        ({"finetune.steps": 9}, {"pretrain", "convert", "uptrain", "benchmark"}),
        ({"evaluate.examples": 9}, {"pretrain", "convert", "uptrain", "finetune", "benchmark"}),
        ({"benchmark.batch_size": 9}, {"pretrain", "convert", "uptrain", "finetune", "evaluate"}),
        (
            {"checkpoint.keep_last": 9, "name": "other", "report.within": 3.0},
            {"pretrain", "convert", "uptrain", "finetune", "evaluate", "benchmark"},
        ),
    ],
)
def test_a_setting_changes_the_stages_it_determines(change, kept):
    def by_kind(planned):
        return {kind: {s.key for s in planned if s.kind == kind} for kind in kinds}

    kinds = {stage.kind for stage in stages()}
    before, after = by_kind(stages()), by_kind(stages(**change))
    assert {kind for kind in kinds if before[kind] & after[kind]} - {"finetune", "evaluate"} == (
        kept - {"finetune", "evaluate"}
    )
    assert {kind for kind in kinds if before[kind] == after[kind]} == kept


def test_a_text_changes_the_stages_that_read_it():
    class Other(Prepared):
        def training_source(self, task):
            return "other" if task == "parameter_qa" else super().training_source(task)

    class OtherTest(Prepared):
        def source(self, task):
            return "other" if task == "parameter_qa" else super().source(task)

    before, after = keys(), keys(prepared=Other(*PREPARED))
    changed = {label for label in before if before[label] != after[label]}
    assert changed
    assert all("parameter_qa" in label for label in changed)
    after = keys(prepared=OtherTest(*PREPARED))
    changed = {label for label in before if before[label] != after[label]}
    assert changed
    assert all("evaluate parameter_qa" in label for label in changed)

    # The text of pretraining is in the key of every network; the benchmark has none of its weights.
    class OtherPretraining(Prepared):
        def training_source(self, task):
            mine = task == docstrings.get_config("nano").pretrain.task
            return "other" if mine else super().training_source(task)

    after = keys(prepared=OtherPretraining(*PREPARED))
    changed = {label for label in before if before[label] != after[label]}
    assert any(label.startswith("pretrain") for label in changed)

    vocabulary = type("Finer", (), {"hash": "other pieces"})
    changed = keys(prepared=PREPARED._replace(tokenizer=vocabulary)).items() - before.items()
    assert len(changed) == 11  # all but the benchmark


def test_what_is_not_converted_is_uptrained_from_the_parent():
    kinds = {stage.kind for stage in stages(kv_heads=16, **{"uptrain.alpha": 0.0})}
    assert kinds == {"pretrain", "finetune", "evaluate", "benchmark"}
    (uptrained,) = [s for s in stages(kv_heads=16) if s.kind == "uptrain"]
    assert [parent.kind for parent in uptrained.parents] == ["pretrain"]
    assert uptrained.variant.method == "none"
    assert uptrained.variant.alpha == 0.05
    other = stages(kv_heads=16, **{"convert.method": "first"})
    assert uptrained.key in {stage.key for stage in other}  # a method that does nothing is none


def test_conversions_have_names_and_only_the_settings_that_matter():
    def converted(**settings):
        planned = stages(**{f"convert.{key}": value for key, value in settings.items()})
        return next(stage for stage in planned if stage.kind == "convert")

    assert converted().variant.method_label == "mean"
    assert converted().key == converted(space="weight", calibration_tokens=9).key
    assert converted(method="svd").variant.method_label == "svd-logit"
    assert converted(method="svd").key != converted(method="svd", calibration_tokens=9).key
    weights = converted(method="svd", space="weight")
    assert weights.key == converted(method="svd", space="weight", calibration_tokens=9).key
    pruned = converted(method="prune")
    assert pruned.key == converted(method="prune", space="weight", shrinkage=0.5).key
    assert pruned.key != converted(method="prune", calibration_tokens=9).key
    named = converted(grouping="act_cos", renorm=True)
    assert named.variant.method_label == "mean-act_cos-renorm"
    assert named.variant.calibration_tokens == 65_536


@pytest.mark.parametrize(
    ("where", "heads"),
    [("self_attention", (8, 16)), ("cross_attention", (16, 8)), ("both", (8, 8))],
)
def test_self_or_cross_attention_can_be_converted_alone(where, heads):
    (converted,) = [s for s in stages(**{"convert.where": where}) if s.kind == "convert"]
    own, cross = heads
    assert converted.variant.heads == {
        "encoder": 16,
        "self_attention": own,
        "cross_attention": cross,
    }
    numbers = dict(
        zip(("num_kv_heads_self_attention", "num_kv_heads_cross_attention"), heads, strict=True)
    )
    same = stages(**{f"convert.{key}": K for key, K in numbers.items()})
    assert converted.key in {stage.key for stage in same}


def test_times_depend_on_shapes_alone():
    def benchmark(**settings):
        return next(s for s in stages(**settings) if s.kind == "benchmark")

    changes = {"uptrain.alpha": 0.5, "convert.method": "first", "seed": 3}
    assert benchmark().key == benchmark(**changes).key != benchmark(kv_heads=1).key
    assert benchmark().parents == ()
    networks = benchmark().settings.networks
    assert [network.variant.num_kv_heads for network in networks] == [16, 8]
    alone = benchmark(kv_heads=16, **{"uptrain.alpha": 0.0})
    assert len(alone.settings.networks) == 1
    other = benchmark(kv_heads=16, reference=base.get_config("mini"))
    assert [network.variant.size for network in other.settings.networks] == ["mini", "nano"]


def test_merged_plans_have_each_stage_once():
    grouped, single = stages(), stages(kv_heads=1)
    merged = merge([grouped, single])
    assert len(merged) == len({stage.key for stage in merged}) == 12 + 12 - 5
    assert {stage.key for stage in merged} == {s.key for s in (*grouped, *single)}
    assert merged[:12] == grouped


def test_ancestors_go_back_to_the_parent():
    scored = next(s for s in stages() if s.kind == "evaluate" and "16 KV" not in s.label)
    kinds = [stage.kind for stage in ancestors(scored)]
    assert kinds == ["evaluate", "finetune", "uptrain", "convert", "pretrain"]


def test_a_checkpoint_of_anyones_can_be_scored(tmp_path):
    config = base.get_config("nano")
    stage = evaluate_checkpoint(config, tmp_path, VARIANT, "parameter_qa")
    assert stage.settings.checkpoint == str(tmp_path)
    assert not stage.parents


def test_what_a_stage_is_can_be_written_down():
    for stage in stages():
        settings, setup = json.loads(json.dumps([to_json(stage.settings), to_json(stage.setup)]))
        assert from_json(SETTINGS[stage.kind], settings, "settings") == stage.settings
        assert json.loads(json.dumps(to_json(from_json(Setup, setup, "setup")))) == setup
        assert setup["run"] == "gqa8-nano"
        assert settings["variant"]["num_heads"] == 16


def test_a_key_is_of_kind_settings_and_parents_and_not_of_the_setup():
    setup = make_setup(base.get_config("nano"))
    root = Stage("uptrain", UptrainSettings(VARIANT), (), setup)
    other = replace(root, settings=UptrainSettings(replace(VARIANT, alpha=0.2)))
    child = Stage("convert", ConvertSettings(VARIANT, "map", None), (root,), setup)
    different = [
        root,
        other,
        replace(root, kind="convert"),
        child,
        replace(child, parents=(other,)),
        replace(child, parents=(child,)),
    ]
    assert len({stage.key for stage in different}) == len(different)
    assert root.key == replace(root, setup=replace(setup, run="another")).key


def test_every_stage_that_draws_has_the_seed_of_the_config():
    found = stages(seed=7)
    drawing = [s for s in found if s.kind in ("pretrain", "convert", "finetune")]
    seeds = {s.variant.seed if s.kind == "convert" else s.settings.recipe.seed for s in drawing}
    assert seeds == {7}
    assert {s.variant.seed for s in found if s.kind != "benchmark"} == {7}


def test_uptraining_and_scores_are_told_all_that_determines_them():
    (plain,) = [s for s in stages() if s.kind == "uptrain"]
    (near,) = [s for s in stages(**{"uptrain.beta": 0.5}) if s.kind == "uptrain"]
    assert (plain.variant.beta, near.variant.beta) == (0.0, 0.5)
    assert near.variant.method_label == "mean-kl0.5"
    assert all(s.settings.metrics == ("rougeL",) for s in stages() if s.kind == "evaluate")
    sources = {s.settings.text for s in stages() if s.kind == "finetune"}
    assert sources == {f"training source of {t}" for t in ("parameter_qa", "docstring_summary")}


def test_every_stage_is_told_which_texts_its_key_promises():
    for stage in stages():
        if stage.kind == "benchmark":
            assert stage.texts == {}
            continue
        tuned_on = {stage.task} - {None, "docstrings"}
        expected = {f"{t}/training": f"training source of {t}" for t in ("docstrings", *tuned_on)}
        if stage.kind == "evaluate":
            expected |= {f"{stage.task}/test": f"source of {stage.task}"}
        assert stage.texts == expected


@pytest.mark.parametrize(
    "change",
    [
        {"pretrain.num_microbatches": 4},
        {"finetune.num_microbatches": 2},
        {"model.remat": "full"},
    ],
)
def test_what_trades_memory_for_time_is_no_part_of_a_key(change):
    assert keys(**change) == keys()


def courses(**settings):
    return {s.kind: s.course for s in stages(**settings) if "16 KV" not in s.label or not s.parents}


def test_stages_that_go_the_same_way_have_one_lineage():
    plain, other = courses(), courses(**{"pretrain.every": 7, "pretrain.validation_examples": 9})
    for kind in ("pretrain", "uptrain", "finetune"):
        assert plain[kind].lineage == other[kind].lineage
    assert (other["pretrain"].every, other["uptrain"].validation_examples) == (7, 9)
    longer = courses(**{"pretrain.steps": 3200})
    assert plain["pretrain"].lineage == longer["pretrain"].lineage
    assert plain["uptrain"].lineage != longer["uptrain"].lineage  # its parent is another network
    assert plain["uptrain"].lineage == courses(**{"uptrain.alpha": 0.5})["uptrain"].lineage
    assert plain["finetune"].lineage == courses(**{"finetune.steps": 7})["finetune"].lineage
    for change in ({"finetune.every": 7}, {"finetune.learning_rate": 0.5}, {"seed": 3}):
        assert plain["finetune"].lineage != courses(**change)["finetune"].lineage
    for change in ({"pretrain.warmup": 7}, {"pretrain.batch_size": 16}, {"seed": 3}):
        assert plain["pretrain"].lineage != courses(**change)["pretrain"].lineage
    assert {kind for kind, course in plain.items() if course is None} == {
        *("convert", "evaluate", "benchmark"),
    }
    assert courses(**{"convert.method": "fuse"})["uptrain"] is None


def test_results_name_the_heads_of_each_attention():
    (converted,) = [
        s for s in stages(**{"convert.where": "cross_attention"}) if s.kind == "convert"
    ]
    assert converted.variant.num_kv_heads == 16
    assert converted.variant.num_kv_heads_cross_attention == 8


def test_a_network_from_scratch_has_its_own_pretraining_and_as_many_steps():
    def of(kind, planned):
        return [stage for stage in planned if stage.kind == kind]

    converted, planned = stages(), stages(**{"convert.method": "none"})
    kinds = {stage.kind for stage in planned}
    assert kinds == {"pretrain", "uptrain", "finetune", "evaluate", "benchmark"}

    # Parent, text, vocabulary and recipe are those of the converted network; the heads are grouped.
    parent, own = of("pretrain", planned)
    assert parent.key == of("pretrain", converted)[0].key
    assert own.settings == replace(
        parent.settings,
        variant=own.variant,
        model=replace(
            parent.settings.model, num_kv_heads_self_attention=8, num_kv_heads_cross_attention=8
        ),
    )
    (uptrained,) = of("uptrain", planned)
    assert uptrained.parents == (own,)
    assert [s.variant.label for s in (own, uptrained)] == [
        *("GQA-8 from scratch", "GQA-8 from scratch, alpha 0.05"),
    ]
    assert uptrained.label == "uptrain (nano, 8 KV heads, from scratch, alpha 0.05, seed 0)"
    assert {s.parents[0].key for s in of("finetune", planned)} == {parent.key, uptrained.key}
    assert of("benchmark", planned)[0].key == of("benchmark", converted)[0].key

    # All alphas share the pretraining, and without an alpha it is all.
    other = stages(**{"convert.method": "none", "uptrain.alpha": 0.0})
    assert {own.key} == {s.key for s in of("pretrain", other)} - {parent.key}
    assert of("uptrain", other) == []


@pytest.mark.parametrize(
    "change",
    [
        {"convert.space": "weight"},
        {"convert.grouping": "act_cos", "convert.calibration_tokens": 9},
        {"convert.renorm": True, "convert.sequential": True, "convert.shrinkage": 0.5},
        {"convert.per_layer_budget": True, "convert.optimizer": "reset"},
        {"uptrain.beta": 1.0},
    ],
)
def test_settings_of_a_conversion_are_no_part_of_a_network_from_scratch(change):
    plain = keys(**{"convert.method": "none"})
    assert keys(**{"convert.method": "none"} | change) == plain
