"""Measure what attention reads: input covariances weighted by the network's attention weights.

calibration.py, which runs the batches, counts every token once. But an attention reads few of its
tokens, and reads them only as averages. With a_s the weights with which a query attends to the
tokens x_s, values matter through the average z = sum_s a_s x_s alone, and keys matter through the
spread sum_s a_s x_s x_s' - z z' around it. This file measures the mean of z z' and of this spread
(docs/conversion.md, eqs. 14 and 15). Letters are those of gqa/model/attention.py.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gqa.model.attention import Segments, attention_weights, make_mask


class AttendedCovariance(NamedTuple):
    """Hold what the query heads of one attention read, in float64.

    Attributes:
        values: [N, D, D], for each query head the mean of z z' over all queries.
        keys: [D, D], the mean of sum_s a_s x_s x_s' - z z' over all queries and heads. It is the
            Fisher metric of the softmax: half of v' keys v is the KL divergence between the
            attention weights before and after each logit of token x grows by a small v' x.
    """

    values: Float[np.ndarray, "N D D"]
    keys: Float[np.ndarray, "D D"]


class Reading(NamedTuple):
    """Hold what one batch gives an attention to read.

    Attributes:
        x: [B, T, D], from which queries are computed.
        y: [B, S, D], from which keys and values are computed.
        real: [B, T], false where a query is padding.
        bias: [1, N, T, S], T5's position bias, or None.
        segments: as in `gqa.model.layers.Attention`.
    """

    x: Any
    y: Any
    real: Bool[np.ndarray, "B T"]
    bias: Array | None
    segments: Segments | None


def attended_covariance(
    kernels: dict, readings: Iterable[Reading], causal: bool
) -> AttendedCovariance:
    """Return the `AttendedCovariance` of the attention with `kernels` over all `readings`.

    The host holds z of one batch, N numbers for each number of the batch's x, beside the result.
    """
    D, N, _ = kernels["query"].shape
    values, keys, count = np.zeros((N, D, D)), np.zeros((D, D)), 0
    for reading in readings:
        z, received = _read(kernels, reading, causal=causal)

        # On the host in float64, as in `calibration.second_moment`. One head at a time, so that
        # only one head of z is copied to float64.
        z = np.asarray(z)[reading.real]
        for n in range(N):
            head = np.asarray(z[:, n], np.float64)
            values[n] += head.T @ head
        count += len(z)

        # A token that receives the attention w adds w x x' to the sum over queries and heads.
        tokens = np.asarray(reading.y, np.float64).reshape(-1, D)
        keys += (tokens * np.asarray(received, np.float64).reshape(-1, 1)).T @ tokens

    values /= max(count, 1)
    return AttendedCovariance(values, keys / max(count * N, 1) - values.mean(0))


@partial(jax.jit, static_argnames="causal")
def _read(
    kernels: dict, reading: Reading, causal: bool
) -> tuple[Float[Array, "B T N D"], Float[Array, "B S"]]:
    """Return z of every query and head, and the attention each token receives from real queries."""
    x, y = (jnp.asarray(tokens, jnp.float32) for tokens in (reading.x, reading.y))
    (B, T, D), S = x.shape, y.shape[1]
    q = jnp.einsum("BTD,DNH->BTNH", x, kernels["query"])
    k = jnp.einsum("BSD,DKH->BSKH", y, kernels["key"])

    biases = [reading.bias, make_mask(reading.segments, causal, T, S)]
    bias = sum((bias for bias in biases if bias is not None), jnp.zeros((1, 1, 1, 1)))
    weights = attention_weights(q, k, bias)

    z = jnp.einsum("BKGTS,BSD->BTKGD", weights, y).reshape(B, T, -1, D)
    received = jnp.einsum("BKGTS,BT->BS", weights, jnp.asarray(reading.real, jnp.float32))
    return z, received
