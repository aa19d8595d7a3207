"""Test KV heads that differ by layer: the same function, and the layers that get more heads."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from experiments.stages import benchmark
from experiments.stages.settings import BenchmarkSettings, TimedNetwork
from gqa import kv_cache
from gqa.conversion import calibration, convert, layer_budget, per_layer_kv_heads
from gqa.conversion.optimizer_state import convert_optimizer_state
from gqa.interop import huggingface
from gqa.model.config import Config
from gqa.model.transformer import Transformer, count_params, each_layer, init_params
from gqa.runtime.errors import UserError
from gqa.training import optimizer, training_step
from tests.conversion.test_closed_form import covariances_of
from tests.support import variants

HEADS = {"self_attention": (4, 2, 2), "cross_attention": (1, 4, 4)}
METHODS = ("mean", "first", "random", "medoid", "prune", "svd", "procrustes")


@pytest.fixture
def deep(tiny) -> Config:
    return dataclasses.replace(tiny, num_decoder_layers=3)


@pytest.fixture
def mixed(deep) -> Config:
    return dataclasses.replace(
        deep,
        num_kv_heads_self_attention=HEADS["self_attention"],
        num_kv_heads_cross_attention=HEADS["cross_attention"],
    )


def input_covariances(config):
    """Those of two layers, the second twice."""
    actual = covariances_of(config)
    return [*actual, *(m._replace(layer=2) for m in actual if m.layer and m.attention != "encoder")]


def repeated(params, config):
    """Parameters of the multi-head network that is the same function."""
    layers = [
        layer
        | {
            attention: layer[attention]
            | {
                side: np.repeat(layer[attention][side], config.num_heads // K, axis=1)
                for side in ("key", "value")
                for K in [layer[attention][side].shape[1]]
            }
            for attention in ("self_attention", "cross_attention")
        }
        for layer in each_layer(params["decoder"])
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *layers)
    return params | {"decoder": params["decoder"] | {"layers": stacked}}


def test_a_config_says_where_layers_are_alike(deep, mixed):
    assert mixed.layer_groups == {0: 1, 1: 2}
    assert deep.layer_groups == {0: 3}
    assert mixed.kv_heads("cross_attention") == (1, 4, 4)
    assert mixed.at_layer(2) == dataclasses.replace(deep, num_kv_heads_self_attention=2)
    assert Config(**json.loads(json.dumps(mixed.__dict__))) == mixed
    assert (
        dataclasses.replace(
            mixed, num_kv_heads_self_attention=(2, 2, 2)
        ).num_kv_heads_self_attention
        == 2
    )
    for heads, message in {
        (4, 2): "has 2 numbers for 3 decoder layers",
        (4, 3, 1): "num_kv_heads_self_attention=3 does not divide num_heads=4",
    }.items():
        with pytest.raises(UserError, match=message):
            dataclasses.replace(mixed, num_kv_heads_self_attention=heads)
    with pytest.raises(UserError, match="num_kv_heads_encoder"):
        dataclasses.replace(mixed, num_kv_heads_encoder=(4, 2))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_network_is_the_multi_head_one_with_repeated_heads(
    deep, mixed, random_params, batch, remat
):
    params = random_params(mixed)
    mixed = dataclasses.replace(mixed, remat=remat)
    actual = Transformer(mixed).apply({"params": params}, batch)
    expected = Transformer(deep).apply({"params": repeated(params, mixed)}, batch)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_each_layer_is_converted_as_if_all_had_its_number(deep, random_params, method):
    params = random_params(deep)
    new, config, _ = convert(
        params, deep, HEADS, method, 3, input_covariances=input_covariances(deep), renorm=True
    )
    assert (config.num_kv_heads_self_attention, config.num_kv_heads_cross_attention) == tuple(
        HEADS.values()
    )
    expected = {
        K: list(
            each_layer(
                convert(
                    params,
                    deep,
                    K,
                    method,
                    3,
                    input_covariances=input_covariances(deep),
                    renorm=True,
                ).params["decoder"]
            )
        )
        for K in (1, 2, 4)
    }
    for i, layer in enumerate(each_layer(new["decoder"])):
        for attention in ("self_attention", "cross_attention"):
            K = HEADS[attention][i]
            if method == "random" and i and K < 4:  # drawn anew for each run
                assert layer[attention]["key"].shape == (16, K, 8)
                continue
            for side, kernel in layer[attention].items():
                np.testing.assert_allclose(
                    kernel, expected[K][i][attention][side], atol=1e-6, err_msg=f"{i} {side}"
                )


def test_the_optimizers_state_follows(deep, random_params):
    params = random_params(deep)
    grads = jax.tree.map(np.sign, params)
    _, state = optimizer.adafactor().update(grads, optimizer.adafactor().init(params), params)
    conversion = convert(params, deep, HEADS)
    mapped = convert_optimizer_state(state, params, conversion, "map")
    fresh = optimizer.adafactor().init(conversion.params)
    assert jax.tree.map(np.shape, mapped) == jax.tree.map(np.shape, fresh)
    two_heads = convert(params, deep, 2)
    expected = convert_optimizer_state(state, params, two_heads, "map")["decoder"]["layers"]
    actual = mapped["decoder"]["layers"]["1"]["self_attention"]["key"][0].v
    np.testing.assert_array_equal(actual, expected["self_attention"]["key"][0].v[1:])


def test_moments_of_a_mixed_network_are_those_of_the_repeated_one(
    deep, mixed, random_params, batch
):
    params = random_params(mixed)
    one = list(calibration.input_covariances(params, mixed, [batch]))
    other = list(calibration.input_covariances(repeated(params, mixed), deep, [batch]))
    for a, b in zip(one, other, strict=True):
        assert (a.attention, a.layer) == (b.attention, b.layer)
        np.testing.assert_allclose(a.keys, b.keys, rtol=1e-4, atol=1e-4)


def test_sizes_are_sums_over_layers(mixed):
    # 2 of keys and values, 3 sequences, heads of 8, 4 bytes
    assert kv_cache.kv_cache_bytes(mixed, 3, 10, 5) == 2 * 3 * 8 * 4 * (8 * 5 + 9 * 10)
    assert count_params(mixed) == count_params(
        dataclasses.replace(mixed, num_kv_heads_self_attention=4, num_kv_heads_cross_attention=4)
    ) - 2 * 16 * 8 * (2 + 2 + 3)


def test_hugging_face_keeps_the_numbers(mixed, deep, random_params, tmp_path):
    params = random_params(mixed)
    huggingface.save(params, mixed, tmp_path / "grouped")
    loaded, config = huggingface.load(tmp_path / "grouped")
    assert config == dataclasses.replace(mixed, dropout_rate=config.dropout_rate)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    huggingface.save(params, mixed, tmp_path / "expanded", expand=True)
    wide, config = huggingface.load(tmp_path / "expanded")
    assert config == dataclasses.replace(deep, dropout_rate=config.dropout_rate)
    jax.tree.map(np.testing.assert_array_equal, wide, repeated(params, mixed))


@pytest.mark.parametrize("settings", [{"grouping": "strided"}, {"method": "fuse"}])
def test_what_takes_one_number_says_so(deep, random_params, settings):
    with pytest.raises(
        UserError, match=r"^(grouping|method)=.* does not go with KV heads by layer"
    ):
        convert(random_params(deep), deep, HEADS, **settings)


def test_a_mixed_network_is_not_converted_again(mixed, random_params):
    with pytest.raises(UserError, match="layers of this network differ in KV heads already"):
        convert(random_params(mixed), mixed, 1)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_heads_lose_less_in_the_same_cache(seed):
    rng = np.random.default_rng(seed)
    items = [
        ("self_attention", 0),
        ("self_attention", 1),
        ("cross_attention", 0),
        ("cross_attention", 1),
    ]
    lost = {
        item: dict(zip((1, 2, 4), np.sort(rng.random(3))[::-1] * (1, 1, 0), strict=True))
        for item in items
    }
    heads, lengths = (
        {"self_attention": 2, "cross_attention": 2},
        {"self_attention": 3, "cross_attention": 5},
    )

    def cost(choice):
        return sum(lengths[name] * K for (name, _), K in zip(items, choice, strict=True))

    def loss(choice):
        return sum(lost[item][K] for item, K in zip(items, choice, strict=True))

    actual = layer_budget.allocate(lost, heads, lengths)
    chosen = (*actual["self_attention"], *actual["cross_attention"])
    fitting = [c for c in itertools.product((1, 2, 4), repeat=4) if cost(c) <= cost((2,) * 4)]
    assert cost(chosen) <= cost((2,) * 4)
    assert loss(chosen) == pytest.approx(min(map(loss, fitting)))


def test_heads_that_are_alike_give_theirs_to_others(deep, random_params):
    """The first layer's heads are one head: it is left one, and the others share what it saves."""
    params = random_params(deep)
    for attention in ("self_attention", "cross_attention"):
        kernels = dict(params["decoder"]["layers"][attention])
        for side in ("key", "value"):
            kernel = np.array(kernels[side])
            kernel[0] = kernel[0, :, :1]
            kernels[side] = kernel
        layers = params["decoder"]["layers"] | {attention: kernels}
        params = params | {"decoder": params["decoder"] | {"layers": layers}}
    actual = per_layer_kv_heads(
        params,
        deep,
        2,
        {"self_attention": 4, "cross_attention": 4},
        input_covariances=input_covariances(deep),
    )
    assert actual["self_attention"][0] == actual["cross_attention"][0] == 1
    heads = [*actual["self_attention"], *actual["cross_attention"]]
    assert sum(heads) <= 12
    assert max(heads) == 4


@pytest.mark.parametrize("profile", [False, True])
def test_it_is_timed_as_its_checkpoint_has_it(mixed, monkeypatch, capsys, tmp_path, profile):
    """The stage takes the KV heads from the checkpoint that it builds on."""
    monkeypatch.setattr(benchmark, "open_parent", lambda path: {"here": mixed_parent}[path])
    mixed_parent = type("Parent", (), {"config": mixed})
    variant = variants.grouped(num_heads=4, num_kv_heads=2, method="svd", per_layer_budget=True)
    settings = BenchmarkSettings(variant, (TimedNetwork(variant, None),), 2, 8, 3, repetitions=2)
    setup = type("Setup", (), {"profile_benchmark": profile})
    job = type("Job", (), {"setup": setup, "events": tmp_path / "tensorboard" / "timed"})
    outcome = benchmark.run("timed", settings, None, ["here"], job)
    values = {entry["metric"]: entry["value"] for entry in outcome.records}
    assert values["kv_cache_bytes"] == kv_cache.kv_cache_bytes(mixed, 1, 8, 3)
    assert values["num_params"] == count_params(mixed)
    assert "4/2/2 KV heads" in capsys.readouterr().out
    assert len(list((tmp_path / "tensorboard" / "timed").rglob("*.xplane.pb"))) == profile


def test_a_training_step_runs(mixed, batch):
    state = training_step.init(mixed, 0)
    step = training_step.make_step(training_step.make_loss(mixed, 0.0), optimizer.constant(0.1), 0)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    assert jax.tree.map(np.shape, state.params) == jax.tree.map(np.shape, init_params(mixed, 0))


@pytest.mark.parametrize(
    ("self_attention", "cross_attention", "groups"),
    [
        ((4, 4), (4, 1), {0: 1, 1: 1}),
        ((4, 2), (4, 4), {0: 1, 1: 1}),
        ((2, 2), (1, 1), {0: 2}),
        (4, 4, {0: 2}),
    ],
)
def test_layers_are_one_group_if_both_of_their_attentions_are_alike(
    tiny, self_attention, cross_attention, groups
):
    config = dataclasses.replace(
        tiny,
        num_kv_heads_self_attention=self_attention,
        num_kv_heads_cross_attention=cross_attention,
    )
    assert config.layer_groups == groups
