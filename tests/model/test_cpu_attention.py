"""Test that attention in the layouts of XLA:CPU equals the definition, to train and to decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.model.attention import grouped_query_attention
from gqa.model.cpu_attention import attention_with_custom_gradient, blocked_attention
from tests.support.random_arrays import B, H, N, S, T, random_bias, random_qkv


@pytest.mark.parametrize("mask_rows", [1, T])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_custom_gradient_has_the_values_and_gradients_of_the_definition(K, mask_rows):
    q, k, v = random_qkv(K)
    bias, keep = random_bias(1, N, T, S), jnp.abs(random_bias(B, N, 1, S))
    mask = jnp.where(random_bias(B, 1, mask_rows, S) > 1, -1e10, 0.0)
    weights = random_bias(B, T, N, H)

    def trained(q, k, v, bias):
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        return (attention_with_custom_gradient(q, k, v, bias, mask, keep) * weights).sum()

    def definition(q, k, v, bias):
        return (grouped_query_attention(q, k, v, bias + mask, keep) * weights).sum()

    values, expected = (
        jax.value_and_grad(f, (0, 1, 2, 3))(q, k, v, bias) for f in (trained, definition)
    )
    for one, other in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("C", [1, 4])
@pytest.mark.parametrize("bias_shape", [(B, 1, 1, 8), (1, N, T, 8), (B, N, T, 8)])
def test_blocks_have_the_values_of_the_definition(K, C, bias_shape):
    q, k, v = random_qkv(K, S=8)
    bias = random_bias(*bias_shape)
    expected = grouped_query_attention(q, k, v, bias)
    k, v = k.transpose(0, 2, 3, 1).reshape(B * K, H, 8), v.swapaxes(1, 2).reshape(B * K, 8, H)
    if C > 1:
        k, v = k.reshape(B * K, H, C, -1).swapaxes(1, 2), v.reshape(B * K, C, -1, H)
    out = blocked_attention(q, k, v, bias)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
