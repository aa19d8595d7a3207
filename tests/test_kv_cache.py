"""The cache's size is that of the arrays that decoding allocates."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import gqa
from gqa import model
from gqa.inference import Inference


@pytest.mark.parametrize(("decoder", "cross"), [(4, 4), (2, 4), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_size_is_that_of_the_arrays(tiny, decoder, cross, dtype):
    heads = {"num_kv_heads_decoder": decoder, "num_kv_heads_cross": cross}
    config = dataclasses.replace(tiny, **heads, dtype=dtype)

    # On CPUs both are filled up to whole blocks.
    net = Inference(config, cache_dtype=dtype, backend="tpu")

    def arrays():
        weights = net.prepare(model.init_params(config, 0))
        memory = net.prefill(weights, jnp.ones((3, 11), jnp.int32))
        return memory.kv, net.init_cache(3, 1, 5)

    leaves = jax.tree.leaves(jax.eval_shape(arrays))
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert gqa.kv_cache_bytes(config, 3, 11, 5) == expected


def test_a_stated_dtype_overrides_the_config(tiny):
    assert gqa.kv_cache_bytes(tiny, 1, 8, 8, "bfloat16") * 2 == gqa.kv_cache_bytes(tiny, 1, 8, 8)


def test_t5_xxl_at_the_papers_lengths_needs_a_gib_a_sequence():
    heads = dict.fromkeys(
        ("num_kv_heads_encoder", "num_kv_heads_decoder", "num_kv_heads_cross"), 64
    )
    xxl = model.Config(32128, 4096, 10240, 64, 64, 24, 24, **heads, dtype="bfloat16")
    assert gqa.kv_cache_bytes(xxl, 1, 2048, 512) == 960 * 2**20
    grouped = dataclasses.replace(xxl, num_kv_heads_decoder=8, num_kv_heads_cross=8)
    assert gqa.kv_cache_bytes(grouped, 1, 2048, 512) == 120 * 2**20
