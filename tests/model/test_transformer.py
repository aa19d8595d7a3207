"""Test the whole network: what each output may depend on, parameter counts, and dropout."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.model.config import Config
from gqa.model.layers import Attention
from gqa.model.transformer import Transformer, count_params, shift_right
from gqa.runtime.errors import ConfigError

KV_HEADS = ("num_kv_heads_encoder", "num_kv_heads_self_attention", "num_kv_heads_cross_attention")


def replace(config, encoder=4, decoder=4, cross=4, **settings):
    heads = dict(zip(KV_HEADS, (encoder, decoder, cross), strict=True))
    return dataclasses.replace(config, **heads, **settings)


@functools.cache
def init(config):
    """Random parameters: drawing them here takes no compilation, and the norms are not all ones."""
    rng = np.random.default_rng(0)
    tokens = jnp.zeros((1, 1), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens}
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), batch)["params"]
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, config, batch):
    return Transformer(config).apply({"params": params}, batch)


# T5 1.1: d_model, d_ff, num_heads, layers a stack.
SMALL, BASE, LARGE = (512, 1024, 6, 8), (768, 2048, 12, 12), (1024, 2816, 16, 24)
XL, XXL = (2048, 5120, 32, 24), (4096, 10240, 64, 24)


@pytest.mark.parametrize(
    ("size", "num_kv_heads", "count"),
    [
        (SMALL, 6, 76_961_152),
        (BASE, 12, 247_577_856),
        (LARGE, 16, 783_150_080),
        (XL, 32, 2_849_757_184),
        (XXL, 64, 11_135_332_352),
        (XXL, 8, 9_726_046_208),
        (XXL, 1, 9_549_885_440),
    ],
)
def test_parameter_counts_are_those_of_t5(size, num_kv_heads, count):
    d_model, d_ff, num_heads, layers = size
    config = Config(
        vocab_size=32128,
        d_model=d_model,
        d_ff=d_ff,
        num_heads=num_heads,
        head_dim=64,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        num_kv_heads_encoder=num_heads,
        num_kv_heads_self_attention=num_kv_heads,
        num_kv_heads_cross_attention=num_kv_heads,
    )
    assert count_params(config) == count


@pytest.mark.parametrize("name", KV_HEADS)
@pytest.mark.parametrize("value", [0, 3, 8])
def test_a_wrong_head_count_is_refused(tiny, name, value):
    with pytest.raises(
        ConfigError, match=rf"^{name}={value} does not divide num_heads=4; use one of 1, 2, 4$"
    ):
        dataclasses.replace(tiny, **{name: value})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"activation": "swish"},
            "activation='swish'; use one of gelu, .*, tanh, or one of these behind 'gated_'",
        ),
        ({"dtype": "float16"}, "dtype='float16'; use one of float32, bfloat16"),
        ({"remat": "some"}, "remat='some'; use one of none, minimal, full"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0; use a value in"),
        ({"dropout_rate": float("nan")}, "dropout_rate=nan; use a value in"),
        ({"dropout_rate": "0"}, "dropout_rate='0'; use a number"),
        ({"d_model": "16"}, "d_model='16'; use a whole number"),
        ({"d_ff": 16.0}, "d_ff=16.0; use a whole number"),
        ({"vocab_size": True}, "vocab_size=True; use a whole number"),
        ({"head_dim": 0}, "head_dim=0; use a whole number, 1 or more"),
        ({"num_heads": -4}, "num_heads=-4; use a whole number, 1 or more"),
        ({"num_encoder_layers": 2**31}, "num_encoder_layers=2147483648; use a whole number from 1"),
        ({"num_decoder_layers": None}, "num_decoder_layers=None; use a whole number"),
        ({"num_kv_heads_cross_attention": "4"}, "num_kv_heads_cross_attention='4' does not divide"),
        ({"num_kv_heads_cross_attention": 4.0}, "num_kv_heads_cross_attention=4.0 does not divide"),
        ({"tied_logits": 1}, "tied_logits=1; use true or false"),
        ({"activation": ["relu"]}, "activation=.'relu'.; use a name"),
        ({"num_buckets": 3}, "num_buckets=3; use 4 or more"),
        ({"max_distance": 16}, "max_distance=16; use more than half"),
    ],
)
def test_a_wrong_setting_is_refused(tiny, setting, message):
    with pytest.raises(ConfigError, match=rf"^{message}"):
        dataclasses.replace(tiny, **setting)


def test_grouped_model_equals_the_multi_head_model_with_repeated_heads(tiny, batch):
    grouped = replace(tiny, encoder=2, decoder=1, cross=2)
    params = init(grouped)
    shapes = {path[-3:]: leaf.shape for path, leaf in _flatten(params)}
    L, D, H = 2, tiny.d_model, tiny.head_dim
    assert shapes["layers", "attention", "key"] == (L, D, 2, H)
    assert shapes["layers", "self_attention", "value"] == (L, D, 1, H)
    assert shapes["layers", "cross_attention", "key"] == (L, D, 2, H)

    def repeat(path, kernel):
        if path[-1].key not in ("key", "value"):
            return kernel
        return jnp.repeat(kernel, tiny.num_heads // kernel.shape[2], axis=2)

    repeated = jax.tree_util.tree_map_with_path(repeat, params)
    expected = logits_of(params, grouped, batch)
    np.testing.assert_allclose(logits_of(repeated, tiny, batch), expected, rtol=1e-4, atol=1e-5)


def _flatten(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(tuple(key.key for key in path), leaf) for path, leaf in leaves]


def embedding_gradients(config, batch):
    """Size of d logits[:, t] / d embedded token, [T, B, S] for inputs and [T, B, T] for targets."""
    params = init(config)
    sizes = {batch[name].shape: name for name in ("inputs", "targets")}
    weights = np.random.default_rng(1).normal(size=(1, 1, config.vocab_size))

    def per_position(noise):
        def add_noise(embed, args, kwargs, context):
            embedded = embed(*args, **kwargs)
            if context.method_name != "embed":
                return embedded
            return embedded + noise[sizes[embedded.shape[:2]]]

        with nn.intercept_methods(add_noise):
            logits = Transformer(config).apply({"params": params}, batch)
        return (logits * weights).sum((0, 2))

    noise = {name: jnp.zeros((*shape, config.d_model)) for shape, name in sizes.items()}
    gradients = jax.jit(jax.jacrev(per_position))(noise)
    return {name: np.abs(gradient).sum(-1) for name, gradient in gradients.items()}


def test_gradients_show_causality_and_padding(tiny, batch):
    gradients = embedding_gradients(replace(tiny, encoder=2, decoder=2, cross=1), batch)
    T = batch["targets"].shape[1]
    seen = np.broadcast_to(np.tri(T, dtype=bool)[:, None], (T, 2, T))
    np.testing.assert_array_equal(gradients["targets"] != 0, seen)
    is_token = np.broadcast_to(batch["inputs"] > 0, (T, *batch["inputs"].shape))
    np.testing.assert_array_equal(gradients["inputs"] != 0, is_token)


def test_the_amount_of_padding_does_not_matter(tiny, batch):
    T = batch["targets"].shape[1]
    padded = {
        "inputs": np.pad(batch["inputs"], ((0, 0), (0, 6))),
        "targets": np.pad(batch["targets"], ((0, 0), (0, 3))),
    }
    logits = logits_of(init(tiny), tiny, padded)[:, :T]
    expected = logits_of(init(tiny), tiny, batch)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_packed_row_has_the_logits_of_its_examples(tiny, batch):
    lengths = {"inputs": (9, 6), "targets": (7, 4)}
    packed = {}
    for name, (first, second) in lengths.items():
        tokens = [batch[name][0, :first], batch[name][1, :second], np.zeros(2, np.int32)]
        packed[name] = np.concatenate(tokens)[None]
        packed[f"{name}_segments"] = np.repeat([1, 2, 0], (first, second, 2))[None]
    packed["targets_positions"] = np.concatenate([np.arange(7), np.arange(4), [0, 0]])[None]
    logits = logits_of(init(tiny), tiny, packed)[0]
    expected = logits_of(init(tiny), tiny, batch)
    np.testing.assert_allclose(logits[:7], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[7:11], expected[1, :4], rtol=1e-4, atol=1e-5)
    assert np.isfinite(logits).all()


def test_decoder_inputs_start_each_example_with_zero():
    targets = jnp.array([[5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(shift_right(targets, 0), [[0, 5, 6, 7, 8]])
    positions = jnp.array([[0, 1, 2, 0, 1]])
    np.testing.assert_array_equal(shift_right(targets, 0, positions), [[0, 5, 6, 0, 8]])


def test_remat_keeps_less_and_changes_no_gradient(tiny, batch):
    params = init(tiny)
    gradients, kept = {}, {}
    for policy in ("none", "minimal", "full"):
        config = dataclasses.replace(tiny, remat=policy)

        def loss(params, config=config):
            return jnp.square(logits_of(params, config, batch)).mean()

        gradients[policy] = jax.jit(jax.grad(loss))(params)
        backward = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        kept[policy] = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert kept["none"] > kept["minimal"] > kept["full"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    for policy in ("minimal", "full"):
        jax.tree.map(close, gradients[policy], gradients["none"])


def test_bfloat16_is_for_activations_alone(tiny, batch):
    half = dataclasses.replace(tiny, dtype="bfloat16")
    params = init(tiny)
    shapes = jax.eval_shape(Transformer(half).init, jax.random.key(0), batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    logits, exact = (np.asarray(logits_of(params, config, batch)) for config in (half, tiny))
    assert logits.dtype == np.float32
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05


def record_dropout(config, params, batch):
    """The zeros of every nn.Dropout and, of every Attention given one fixed input, its output.

    Lists by module path, in the order of the layers.
    """
    zeros, outputs = {}, {}
    B, S, D = 2, 5, config.d_model
    x, y = (jax.random.normal(jax.random.key(n), (B, n, D)) for n in (1, S))

    def record(call, args, kwargs, context):
        log = None
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            read = args[:2]
            args, log = (x, y, None, None, True), outputs
        elif isinstance(context.module, nn.Dropout):
            log = zeros
        out = call(*args, **kwargs)
        if log is None:
            return out

        # A pure callback whose result is used runs once for each layer. Flax also traces the layer
        # once to look for values that no layer changes; a callback with an effect would disturb it.
        layers = log.setdefault(context.module.path, [])
        out = jax.pure_callback(functools.partial(keep, layers), out, out)
        if log is zeros:
            return out

        # Ones for every output, which depend on what the attention would have read: otherwise XLA
        # would leave out the whole encoder.
        return 0 * out + 1 + 0 * sum(map(jnp.sum, read))

    def keep(layers, value):
        layers.append(np.array(value))
        return value

    with nn.intercept_methods(record):
        rngs = {"dropout": jax.random.key(3)}
        network = Transformer(config)
        logits = jax.jit(lambda: network.apply({"params": params}, batch, True, rngs=rngs))()
        jax.block_until_ready(logits)
    zeros = {path: [layer == 0 for layer in layers] for path, layers in zeros.items()}
    return zeros, outputs


def test_dropout_draws_anew_in_each_layer_and_is_shared_by_positions(tiny, batch):
    config = dataclasses.replace(tiny, dropout_rate=0.5)
    params = init(tiny)
    for stack in ("encoder", "decoder"):
        same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), params[stack]["layers"])
        params = params | {stack: params[stack] | {"layers": same}}
    zeros, outputs = record_dropout(config, params, batch)

    # Two residual branches a layer in the encoder and three in the decoder, two layers each, an
    # MLP each, and the embeddings and the end of each stack.
    assert sum(len(masks) for masks in zeros.values()) == (2 + 3) * 2 + 2 * 2 + 4
    for path, masks in zeros.items():
        for mask in masks:
            shared = (mask == mask[:, :1]).all()
            assert shared == (path != ("encoder", "Dropout_1")), path
    rows = [mask[:, 0] for mask in itertools.chain(*zeros.values())]
    for one, other in itertools.combinations(rows, 2):
        assert one.shape != other.shape or (one != other).any()

    assert sorted(len(layers) for layers in outputs.values()) == [2, 2, 2]
    for path, (first, second) in outputs.items():
        assert not np.allclose(first, second), path


def test_without_training_dropout_is_off(tiny, batch):
    config = dataclasses.replace(tiny, dropout_rate=0.5)
    params = init(tiny)
    expected = logits_of(params, tiny, batch)
    np.testing.assert_array_equal(logits_of(params, config, batch), expected)

    @jax.jit
    def train(key):
        return Transformer(config).apply({"params": params}, batch, True, rngs={"dropout": key})

    one, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    assert not np.allclose(one, expected)
