"""Sizes are those of the arrays that decoding allocates and reads."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import gqa
from gqa import kv_cache
from gqa.inference import generator
from gqa.inference.step import Inference
from gqa.model import transformer
from gqa.model.activations import RELU
from gqa.model.config import Config


def grouped(config, decoder, cross, **more):
    heads = {"num_kv_heads_self_attention": decoder, "num_kv_heads_cross_attention": cross}
    return dataclasses.replace(config, **heads, **more)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("decoder", "cross"), [(4, 4), (2, 4), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_size_is_that_of_the_arrays(tiny, decoder, cross, dtype):
    config = grouped(tiny, decoder, cross)
    net = Inference(config, cache_dtype=dtype)

    def arrays():
        weights = net.prepare(transformer.init_params(config, 0))
        # Lengths of whole blocks, which are not filled up.
        return net.prefill(weights, jnp.ones((3, 64), jnp.int32)).kv, net.init_cache(3, 1, 128)

    assert gqa.kv_cache_bytes(config, 3, 64, 128, dtype) == nbytes(jax.eval_shape(arrays))


@pytest.mark.parametrize("decoder", [4, 1])
@pytest.mark.parametrize("form", [{}, {"activation": RELU, "tied_logits": True}])
def test_a_step_reads_its_arrays_once(tiny, monkeypatch, decoder, form):
    """The weights are those on which its logits depend; the self-attention cache grows."""
    monkeypatch.setattr(generator, "SHORTEST", 2)
    net = Inference(grouped(tiny, decoder, 2, **form), backend="tpu", cache_dtype="float32")
    B, S, T = 3, 11, 6
    step = kv_cache.step(net, B, S, T)
    assert step.cross_cache == 2 * 2 * B * 2 * S * tiny.head_dim * 4
    by_token = [nbytes(net.init_cache(B, 1, room)) for room in (2, 2, 4, 4, 6, 6)]
    assert step.self_cache == sum(by_token) / T
    read = _read(net, B, S)
    del read["decoder/position_bias/table"]  # a look-up of a few numbers
    looked_up = 0
    if not net.config.tied_logits:  # else it also makes the logits
        assert read.pop("embedding").shape == (32, 16)
        looked_up = B * 16 * 4
    assert step.weights == nbytes(read) + looked_up
    assert step.flops == 2 * B * sum(x.size for x in read.values() if len(x.shape) > 1)


def _read(net, B, S):
    """The weights that a step's program has any use for, by name."""
    weights = jax.eval_shape(lambda: net.prepare(transformer.init_params(net.config, 0)))
    memory = jax.eval_shape(net.prefill, weights, jax.ShapeDtypeStruct((B, S), jnp.int32))
    tokens, index = jax.ShapeDtypeStruct((B, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    cache = jax.eval_shape(lambda: net.init_cache(B, 1, 6))
    program = jax.make_jaxpr(net.step)(weights, tokens, index, cache, memory).jaxpr
    used = {id(x) for equation in program.eqns for x in equation.invars}
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    named = zip(leaves, program.invars[: len(leaves)], strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for (path, leaf), var in named
        if id(var) in used
    }


def test_a_stated_dtype_overrides_the_config(tiny):
    assert gqa.kv_cache_bytes(tiny, 1, 8, 8, "bfloat16") * 2 == gqa.kv_cache_bytes(tiny, 1, 8, 8)


def test_t5_xxl_at_the_papers_lengths_needs_a_gib_a_sequence():
    heads = dict.fromkeys(
        ("num_kv_heads_encoder", "num_kv_heads_self_attention", "num_kv_heads_cross_attention"), 64
    )
    xxl = Config(32128, 4096, 10240, 64, 64, 24, 24, **heads, dtype="bfloat16")
    assert gqa.kv_cache_bytes(xxl, 1, 2048, 512) == 960 * 2**20
    grouped = dataclasses.replace(
        xxl, num_kv_heads_self_attention=8, num_kv_heads_cross_attention=8
    )
    assert gqa.kv_cache_bytes(grouped, 1, 2048, 512) == 120 * 2**20
