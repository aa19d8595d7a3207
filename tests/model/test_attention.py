"""Test that grouped-query attention equals the paper's section 2.2, for any number of KV heads."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.model.attention import grouped_query_attention
from gqa.model.layers import Attention
from tests.support.random_arrays import B, H, N, S, T, random_bias, random_qkv


def one_head_at_a_time(q, k, v, bias, keep):
    """Attend as section 2.2 says, query head n reading KV head n // G: loops, numpy, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    bias, keep = (np.broadcast_to(x, (B, N, T, S)) for x in (bias, keep))
    group = N // k.shape[2]
    for b in range(B):
        for n in range(N):
            logits = q[b, :, n] @ k[b, :, n // group].T + bias[b, n]
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[b, :, n] = (weights * keep[b, n]) @ v[b, :, n // group]
    return out


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("bias_shape", [(1, 1, 1, 1), (1, N, T, S), (B, 1, 1, S), (B, N, T, S)])
def test_equals_a_loop_over_heads(K, bias_shape):
    q, k, v = random_qkv(K)
    bias, keep = random_bias(*bias_shape), random_bias(B, N, 1, S)
    out = grouped_query_attention(q, k, v, bias, keep)
    np.testing.assert_allclose(out, one_head_at_a_time(q, k, v, bias, keep), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("K", [1, 2])
def test_equals_multi_head_attention_where_the_heads_of_a_group_are_the_same(K):
    q, k, v = random_qkv(K)
    bias = random_bias(1, N, T, S)
    repeated = (np.repeat(x, N // K, axis=2) for x in (k, v))
    out = grouped_query_attention(q, k, v, bias)
    expected = grouped_query_attention(q, *repeated, bias)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_agrees_with_jax(K):
    q, k, v = random_qkv(K)
    bias = random_bias(B, N, T, S)
    theirs = jax.nn.dot_product_attention(q, k, v, bias, scale=1.0)
    out = grouped_query_attention(q, k, v, bias)
    np.testing.assert_allclose(out, theirs, rtol=1e-5, atol=1e-6)


def largest_array(f, *args):
    """Elements of the largest array in the compiled program of f."""
    program = jax.jit(f).lower(*args).compile().as_text()
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program)
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


def test_keys_and_values_are_never_repeated():
    heads, length = 8, 64
    q, k, v = random_qkv(2, N=heads, T=1, S=length)
    assert q.size < k.size  # the logits, B * N * S, are smaller still
    assert largest_array(grouped_query_attention, q, k, v) == k.size

    def repeating(q, k, v):
        k, v = (jnp.repeat(x, heads // 2, axis=2) for x in (k, v))
        return grouped_query_attention(q, k, v)

    assert largest_array(repeating, q, k, v) >= B * length * heads * H > k.size


def test_heads_that_do_not_divide_are_refused():
    q, k, v = random_qkv(3)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 KV heads"):
        grouped_query_attention(q, k, v)


def attention_module(**settings):
    sizes = {"d_model": 16, "num_heads": N, "num_kv_heads": 2, "head_dim": H, "causal": False}
    return Attention(**{**sizes, "dropout_rate": 0.5, "dtype": jnp.float32, **settings})


def attend_to_itself(module, x, train):
    return module(x, x, None, None, train)


def test_dropout_noise_is_shared_by_query_positions_alone():
    module = attention_module()
    x = jnp.broadcast_to(random_bias(1, 1, 16), (2, 6, 16))  # all positions are equal
    params = module.init(jax.random.key(0), x, False, method=attend_to_itself)
    rngs = {"dropout": jax.random.key(1)}
    out = module.apply(params, x, True, method=attend_to_itself, rngs=rngs)
    np.testing.assert_allclose(out, jnp.broadcast_to(out[:, :1], out.shape), rtol=1e-5, atol=1e-6)
    assert not np.allclose(out[0], out[1])
    clean = module.apply(params, x, False, method=attend_to_itself)
    # Each head keeps other keys, so the sum over heads is no multiple of the sum without dropout.
    ratio = out[0, 0] / clean[0, 0]
    assert np.ptp(ratio) > 0.1


def test_dropout_keeps_a_share_and_scales_it_up_to_the_same_mean():
    """With one key a head gives its value times its draw, so that draws can be solved for."""
    rate, rows = 0.2, 400
    module = attention_module(dropout_rate=rate, num_kv_heads=N)
    x = jnp.broadcast_to(random_bias(1, 1, 16), (rows, 1, 16))
    params = module.init(jax.random.key(0), x[:1], False, method=attend_to_itself)
    out = module.apply(
        params, x, True, method=attend_to_itself, rngs={"dropout": jax.random.key(1)}
    )
    kernels = params["params"]
    value = np.einsum("D,DNH->NH", x[0, 0], kernels["value"])
    parts = np.einsum("NH,NHD->ND", value, kernels["out"])
    draws = np.linalg.lstsq(parts.T, np.asarray(out[:, 0]).T, rcond=None)[0]
    near = np.where(draws > 0.5, 1 / (1 - rate), 0.0)
    np.testing.assert_allclose(draws, near, atol=1e-3)
    assert abs((draws > 0.5).mean() - (1 - rate)) < 0.05
    kept = near > 0
    # The heads of an example draw independently, and so do examples.
    assert (kept.any(axis=0) & ~kept.all(axis=0)).any()
    assert (kept.any(axis=1) & ~kept.all(axis=1)).all()


def test_initial_scales_are_t5s():
    D = 256
    module = attention_module(d_model=D, num_heads=16, num_kv_heads=8, head_dim=32)
    x = jnp.zeros((1, 1, D))
    params = module.init(jax.random.key(0), x, False, method=attend_to_itself)["params"]
    variances = {"query": 1 / (D * 32), "key": 1 / D, "value": 1 / D, "out": 1 / (16 * 32)}
    for name, variance in variances.items():
        np.testing.assert_allclose(params[name].var(), variance, rtol=0.05, err_msg=name)
