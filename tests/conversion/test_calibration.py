"""Covariances are those of the inputs of the network's attentions, without padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.conversion import grouping
from gqa.conversion.calibration import ATTENTIONS, input_covariances
from gqa.model.attention import Segments
from gqa.model.transformer import Decoder, Encoder, Transformer, shift_right

ALL = ("encoder", "self_attention", "cross_attention")


@pytest.fixture
def params(tiny, random_params):
    return random_params(tiny)


@pytest.fixture
def packed():
    """One row of two examples and some padding."""
    inputs = np.array([[5, 6, 7, 1, 9, 8, 1, 0]], np.int32)
    targets = np.array([[3, 4, 1, 12, 1, 0]], np.int32)
    return {
        "inputs": inputs,
        "targets": targets,
        "inputs_segments": np.array([[1, 1, 1, 1, 2, 2, 2, 0]], np.int32),
        "targets_segments": np.array([[1, 1, 1, 2, 2, 0]], np.int32),
        "targets_positions": np.array([[0, 1, 2, 0, 1, 0]], np.int32),
    }


def unpack(packed):
    """The same two examples, a row each."""
    inputs, targets = np.zeros((2, 8), np.int32), np.zeros((2, 6), np.int32)
    inputs[0, :4], inputs[1, :3] = packed["inputs"][0, :4], packed["inputs"][0, 4:7]
    targets[0, :3], targets[1, :2] = packed["targets"][0, :3], packed["targets"][0, 3:5]
    return {"inputs": inputs, "targets": targets}


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one[:2] + one[4:6] == other[:2] + other[4:6]
        np.testing.assert_allclose(one.keys, other.keys, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.queries, other.queries, rtol=1e-4, atol=1e-5)
        assert (one.attended is None) == (other.attended is None)
        for x, y in zip(one.attended or (), other.attended or (), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_they_come_layer_by_layer_in_the_networks_order(tiny, params, batch):
    actual = list(input_covariances(params, tiny, [batch], ALL))
    assert [m[:2] for m in actual] == [
        *(("encoder", 0), ("encoder", 1)),
        *(
            ("self_attention", 0),
            ("cross_attention", 0),
            ("self_attention", 1),
            ("cross_attention", 1),
        ),
    ]
    assert [(m.num_keys, m.num_queries) for m in actual[:4]] == [
        *((15, 15), (15, 15)),
        *((11, 11), (15, 11)),
    ]
    assert {m.keys.dtype for m in actual} == {np.dtype(np.float64)}
    assert_same(input_covariances(params, tiny, [batch]), actual[2:])


def test_they_do_not_depend_on_the_order_of_heads(tiny, params, batch):
    rng = np.random.default_rng(0)
    L, N = tiny.num_decoder_layers, tiny.num_heads
    shared_order = np.tile(rng.permutation(N), (L, 1))  # the layers share a bias
    orders = {
        "self_attention": shared_order,
        "cross_attention": np.stack([rng.permutation(N) for _ in range(L)]),
    }
    permuted_params = grouping.permute_heads(params, orders)
    assert_same(
        input_covariances(permuted_params, tiny, [batch], ALL),
        input_covariances(params, tiny, [batch], ALL),
    )


def cut(params, config, name, layer):
    """A stack that ends with what attention `name` of `layer` reads: that norm is its last one."""
    stack, attention = ATTENTIONS[name]
    layers = jax.tree.map(lambda x: x[: layer + 1], params[stack]["layers"])
    outs = {"encoder": ["attention"], "decoder": ["self_attention", "cross_attention"]}[stack]
    for skipped in outs[outs.index(attention) :]:
        out = layers[skipped]["out"]
        layers = layers | {skipped: layers[skipped] | {"out": out.at[layer].set(0)}}
    layers = layers | {"mlp": layers["mlp"] | {"wo": layers["mlp"]["wo"].at[layer].set(0)}}
    norm = {"scale": layers[f"{attention}_norm"]["scale"][layer]}
    config = dataclasses.replace(config, **{f"num_{stack}_layers": layer + 1})
    return {"params": params[stack] | {"layers": layers, "norm": norm}}, config


def mean(x, real):
    x = np.asarray(x, np.float64)[real]
    return x.T @ x / len(x)


@pytest.mark.parametrize(("layer", "length"), [(0, 7), (1, 7), (1, 40)])
def test_they_are_of_what_the_attentions_read(tiny, params, batch, layer, length):
    """With 40 positions distances leave the exact buckets, where the stacks' rules differ."""
    if length > 7:
        rng = np.random.default_rng(1)
        batch = {name: rng.integers(1, 32, (2, length), dtype=np.int32) for name in batch}
        batch["inputs"][1, length // 2 :] = batch["targets"][0, length - 3 :] = 0
    actual = {m[:2]: m for m in input_covariances(params, tiny, [batch], ALL)}
    source, target = (batch["inputs"] > 0).astype(np.int32), batch["targets"] > 0
    embed = params["embedding"]
    previous = shift_right(jnp.asarray(batch["targets"]), 0)
    segments = Segments(source, source, False)
    encoded = Encoder(tiny).apply(
        {"params": params["encoder"]}, embed[batch["inputs"]], segments, False
    )
    expected = mean(encoded, source > 0)
    np.testing.assert_allclose(
        actual["cross_attention", layer].keys, expected, rtol=1e-4, atol=1e-5
    )

    variables, config = cut(params, tiny, "encoder", layer)
    x = Encoder(config).apply(variables, embed[batch["inputs"]], segments, False)
    expected = mean(x, source > 0)
    np.testing.assert_allclose(actual["encoder", layer].keys, expected, rtol=1e-4, atol=1e-5)
    cross = Segments(np.ones_like(batch["targets"]), source, False)
    for name in ("self_attention", "cross_attention"):
        variables, config = cut(params, tiny, name, layer)
        x = Decoder(config).apply(variables, embed[previous], encoded, None, cross, False)
        expected, covariance = mean(x, target), actual[name, layer]
        np.testing.assert_allclose(covariance.queries, expected, rtol=1e-4, atol=1e-5)
        assert (covariance.keys is covariance.queries) == (name == "self_attention")


def test_packed_rows_give_what_their_examples_give(tiny, params, packed):
    assert_same(
        input_covariances(params, tiny, [packed], ALL, attended=True),
        list(input_covariances(params, tiny, [unpack(packed)], ALL, attended=True)),
    )


def test_batches_add_up(tiny, params, batch):
    halves = [{name: rows[i : i + 1] for name, rows in batch.items()} for i in (0, 1)]
    assert_same(
        input_covariances(params, tiny, halves, attended=True),
        list(input_covariances(params, tiny, [batch], attended=True)),
    )


def test_what_is_sent_back_is_what_the_batches_go_on_through(tiny, params, batch):
    """Each covariance is that of the network with the layers before it converted, at full width."""
    walk = input_covariances(params, tiny, [batch], ALL)
    converted, sent = params, None
    for index in range(6):
        covariance = walk.send(sent)
        expected = list(input_covariances(converted, tiny, [batch], ALL))[index]
        assert_same([covariance], [expected])
        stack, attention = ATTENTIONS[covariance.attention]
        kernels = converted[stack]["layers"][attention]
        sent = {side: kernel[covariance.layer] for side, kernel in kernels.items()}
        sent |= {side: sent[side][:, ::2] for side in ("key", "value")}  # 2 heads of 4
        wide = {side: sent[side][:, np.array([0, 0, 1, 1])] for side in ("key", "value")}
        new = {
            side: kernel.at[covariance.layer].set((sent | wide)[side])
            for side, kernel in kernels.items()
        }
        layers = converted[stack]["layers"] | {attention: new}
        converted = converted | {stack: converted[stack] | {"layers": layers}}
    with pytest.raises(StopIteration):
        walk.send(sent)


def test_padding_alone_gives_zeros(tiny, params, batch):
    nothing = {name: np.zeros_like(rows) for name, rows in batch.items()}
    for covariance in input_covariances(params, tiny, [nothing]):
        assert covariance.num_keys == covariance.num_queries == 0
        assert not covariance.keys.any()
        assert not covariance.queries.any()


def with_a_bias_each(params, config):
    """The same network, in which each layer has its own copy of the stack's table."""
    for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", 2)):
        parts = dict(params[stack])
        table = jnp.repeat(parts.pop("position_bias")["table"][None], layers, axis=0)
        parts["layers"] = parts["layers"] | {"position_bias": {"table": table}}
        params = params | {stack: parts}
    return params, dataclasses.replace(config, position_bias_per_layer=True)


def test_a_copy_of_the_bias_in_each_layer_changes_nothing(tiny, params, batch):
    own, config = with_a_bias_each(params, tiny)
    outputs = [
        jax.jit(Transformer(c).apply)({"params": p}, batch)
        for p, c in ((params, tiny), (own, config))
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    covariances = [
        list(input_covariances(p, c, [batch], ALL, attended=True))
        for p, c in ((params, tiny), (own, config))
    ]
    assert_same(*covariances)


def test_layers_with_a_bias_each_may_order_their_heads_apart(tiny, params, batch):
    own, config = with_a_bias_each(params, tiny)
    order = np.array([[0, 1, 2, 3], [1, 0, 2, 3]])
    new = grouping.permute_heads(own, {"encoder": order, "self_attention": order})
    run = jax.jit(Transformer(config).apply)
    outputs = [run({"params": p}, batch) for p in (own, new)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)
