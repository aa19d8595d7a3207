"""The position bias and its buckets, the norm and the two MLPs, against their definitions."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.model.attention import MASKED
from gqa.model.layers import MLP, RelativePositionBias, RMSNorm, relative_position_bucket

BUCKETS, MAX_DISTANCE, HEADS = 32, 128, 3


def bucket_of(distance, bidirectional):
    """T5's rule for one distance, in exact arithmetic."""
    buckets, first = BUCKETS, 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(MAX_DISTANCE / exact)
    return first + min(exact + math.floor(share * (buckets - exact) + 1e-9), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_follow_the_rule(bidirectional):
    distances = np.arange(-300, 301)
    buckets = relative_position_bucket(distances, bidirectional, BUCKETS, MAX_DISTANCE)
    expected = [bucket_of(int(distance), bidirectional) for distance in distances]
    np.testing.assert_array_equal(buckets, expected)
    assert set(expected) == set(range(BUCKETS)) - ({16} if bidirectional else set())


@pytest.fixture(scope="module", params=[True, False], ids=["bidirectional", "causal"])
def position_bias(request):
    """The module, its parameters, and the direct lookup table[bucket(s - t)] for any T and S."""
    module = RelativePositionBias(HEADS, BUCKETS, MAX_DISTANCE, bidirectional=request.param)
    table = jnp.arange(BUCKETS * HEADS, dtype=jnp.float32).reshape(BUCKETS, HEADS)

    def look_up(T, S):
        rows = [[bucket_of(s - t, request.param) for s in range(S)] for t in range(T)]
        return np.asarray(table)[np.array(rows)].transpose(2, 0, 1)[None]

    return module, {"params": {"table": table}}, look_up


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (6, 6), (150, 140)])
def test_position_bias_is_a_table_lookup(position_bias, T, S):
    module, params, look_up = position_bias
    np.testing.assert_array_equal(module.apply(params, T, S), look_up(T, S))


@pytest.mark.parametrize("index", [0, 4, 139])
def test_row_of_the_position_bias(position_bias, index):
    module, params, look_up = position_bias
    row = module.apply(params, jnp.int32(index), 140, method="row")
    np.testing.assert_array_equal(row, look_up(140, 140)[:, :, index : index + 1])


def test_a_row_masked_whole_has_equal_weights():
    logits = jnp.array([3.0, -2.0, 0.5, 1.0]) + MASKED
    np.testing.assert_array_equal(jax.nn.softmax(logits), np.full(4, 0.25))


def test_rms_norm():
    x = np.random.default_rng(0).normal(3.0, 5.0, size=(2, 4, 6)).astype(np.float32)
    scale = np.arange(1.0, 7.0, dtype=np.float32)
    y = RMSNorm(jnp.float32).apply({"params": {"scale": scale}}, jnp.asarray(x))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale[None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_rms_norm_computes_in_float32():
    x = jax.random.normal(jax.random.key(0), (8, 64), jnp.bfloat16)
    params = {"params": {"scale": jnp.linspace(0.5, 1.5, 64)}}
    y = RMSNorm(jnp.bfloat16).apply(params, x)
    exact = RMSNorm(jnp.float32).apply(params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def mlp(activation, rate=0.0):
    return MLP(12, activation, partial(nn.Dropout, rate, broadcast_dims=(-2,)), jnp.float32)


@pytest.mark.parametrize("activation", ["relu", "gated_gelu"])
def test_mlp(activation):
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    variables = mlp(activation).init(jax.random.key(0), jnp.asarray(x), False)
    p = {name: np.asarray(kernel) for name, kernel in variables["params"].items()}
    hidden = x @ p["wi_0"]
    if activation == "relu":
        assert "wi_1" not in p
        hidden = np.maximum(hidden, 0)
    else:
        tanh = np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))
        hidden = hidden * (1 + tanh) / 2 * (x @ p["wi_1"])
    out = mlp(activation).apply(variables, jnp.asarray(x), False)
    np.testing.assert_allclose(out, hidden @ p["wo"], rtol=1e-4, atol=1e-6)
