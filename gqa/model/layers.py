"""The parts of a T5 layer: attention with its projections, norm, MLP and position bias.

The formula of attention itself is in `attention.py`, whose letters are used here. How the parts
form a network is in `transformer.py`. Every module here is for training and for encoding; the
decoding step has its own projections and MLP, in the layouts of `gqa/inference/`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gqa.model import activations, fused_attention
from gqa.model.attention import AnyArray, Segments, make_mask
from gqa.model.cpu_attention import attention_with_custom_gradient
from gqa.model.linear import linear
from gqa.runtime.sharding import constrain, repeat_heads


class Attention(nn.Module):
    """Attention with its four projections.

    The formula runs in the backend's fused kernel, or in `attention_with_custom_gradient` if there
    is none. Both equal `grouped_query_attention`.

    Parameters: query [D, N, H], key and value [D, K, H], out [N, H, D]; no biases. Only key and
    value depend on the number of KV heads K, so only these two change shape in a conversion.
    """

    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    dropout_rate: float
    dtype: DTypeLike

    def setup(self) -> None:
        D, N, K, H = self.d_model, self.num_heads, self.num_kv_heads, self.head_dim

        # T5 leaves the logits unscaled and draws the query kernel sqrt(H) times smaller instead:
        # its variance is 1 / (D H) where that of keys and values is 1 / D. Axis 0 is the fan-in D,
        # axes 1 and 2 are the fan-out.
        query_init = variance_scaling(1 / H, "fan_in", "normal", 0, (1, 2))
        self.query = self.param("query", query_init, (D, N, H))

        init = variance_scaling(1.0, "fan_in", "normal", 0, (1, 2))
        self.key = self.param("key", init, (D, K, H))
        self.value = self.param("value", init, (D, K, H))

        # The output projection reads all heads, so its fan-in is N * H.
        self.out = self.param("out", variance_scaling(1.0, "fan_in", "normal", (0, 1)), (N, H, D))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        y: Float[Array, "B S D"],
        position_bias: Float[Array, "1 N T S"] | None,
        segments: Segments | None,
        train: bool,
    ) -> Float[Array, "B T D"]:
        """Attend from x to y. In self-attention, y is x.

        Args:
            position_bias: added to the logits; None in cross-attention, where T5 has no bias.
            segments: limits each query to its own example; None limits nothing.
            train: whether to drop attention weights, with the "dropout" key of the caller.
        """
        (B, T, D), S, N, H = x.shape, y.shape[1], self.num_heads, self.head_dim

        # Where the mesh has more devices along "model" than there are KV heads, `repeat_heads`
        # copies each KV head to several devices; otherwise it returns keys and values unchanged.
        q = constrain(self._heads(x, self.query), "batch", None, "heads", None)
        k, v = (repeat_heads(self._heads(y, kernel)) for kernel in (self.key, self.value))

        dropout = None
        if train and self.dropout_rate > 0:
            # One draw for each key serves all query positions, as in T5: the axis of T is 1. What
            # is kept is divided by its share, so that the expected sum of weights stays 1.
            keep = 1 - self.dropout_rate
            dropout = jax.random.bernoulli(self.make_rng("dropout"), keep, (B, N, 1, S)) / keep

        out = fused_attention.fused_attention(
            q,
            k,
            v,
            position_bias=position_bias,
            segments=segments,
            causal=self.causal,
            dropout=dropout,
            backend=fused_attention.backend(),
        )
        if out is None:
            # No kernel of this backend fits. Axes: k [B, K, H, S] and v [B, K, S, H].
            k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
            mask = make_mask(segments, self.causal, T, S)
            out = attention_with_custom_gradient(q, k, v, position_bias, mask, dropout)
        return linear(out.reshape(B, T, N * H), self.out.astype(self.dtype).reshape(N * H, D))

    def _heads(self, x: Array, kernel: Array) -> Array:
        """Project x [B, T, D] with a kernel [D, heads, H]; returns [B, T, heads, H]."""
        D, heads, H = kernel.shape
        out = linear(x, kernel.astype(self.dtype).reshape(D, heads * H))
        return out.reshape(*x.shape[:2], heads, H)


class RMSNorm(nn.Module):
    """Scale x [..., D] to unit mean square, in float32; no mean and no bias (T5)."""

    dtype: DTypeLike
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        scale = self.param("scale", ones, (x.shape[-1],))

        # The squares of bfloat16 values would lose too many digits in their mean.
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


class MLP(nn.Module):
    """The feed-forward part of a layer, applied to each position alone.

    T5 1.1 computes (gelu(x wi_0) * (x wi_1)) wo, T5 1.0 computes relu(x wi_0) wo; other functions
    are in `activations.py`. The parameters wi_0 and wi_1 are [D, F], wo is [F, D]. Hidden
    activations are dropped out before wo.
    """

    d_ff: int
    activation: str
    dropout: Callable[..., nn.Module]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], train: bool) -> Float[Array, "B T D"]:
        D, F = x.shape[-1], self.d_ff
        init = variance_scaling(1.0, "fan_in", "truncated_normal")

        def project(name: str, y: Array, shape: tuple[int, int]) -> Array:
            return linear(y, self.param(name, init, shape).astype(self.dtype))

        hidden = activations.function(self.activation)(project("wi_0", x, (D, F)))
        if activations.is_gated(self.activation):
            hidden *= project("wi_1", x, (D, F))
        hidden = constrain(hidden, "batch", None, "mlp")
        return project("wo", self.dropout()(hidden, deterministic=not train), (F, D))


class RelativePositionBias(nn.Module):
    """T5's learned bias for each query head and bucket of distances.

    The layers of a stack share one table [buckets, N], or in umT5 each layer has its own. There is
    a column for each query head, not for each KV head, so a conversion leaves the table as it is.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool

    def setup(self) -> None:
        init = variance_scaling(1.0, "fan_avg", "uniform")
        self.table = self.param("table", init, (self.num_buckets, self.num_heads))

    def __call__(self, T: int, S: int) -> Float[Array, "1 N {T} {S}"]:
        """Return the bias of queries 0..T-1 and keys 0..S-1.

        The bias depends on the distance alone, so only M = T + S values are looked up. They are
        laid out by a reshape, which is faster than a gather of T * S values. If a row of M values
        is repeated T times and cut into rows of M - 1, each row starts one value earlier in the
        cycle than the row above it, which is the value of one distance less.

        Example with T = S = 2: the row of values has the distances 0 1 -2 -1. Repeated twice and
        cut into rows of 3, it reads 0 1 -2 / -1 0 1; the first S = 2 columns are the distances of
        query 0 (0, 1) and of query 1 (-1, 0).
        """
        M = T + S
        distance = (jnp.arange(M) + T) % M - T  # 0 .. S-1, then -T .. -1
        values = self._lookup(distance)  # [N, M]
        rows = jnp.tile(values, (1, T))[:, : T * (M - 1)].reshape(-1, T, M - 1)
        return rows[None, :, :, :S]

    def row(self, index: Int[Array, ""] | int, S: int) -> Float[Array, "1 N 1 {S}"]:
        """Return the bias of the single query at position `index`."""
        return self._lookup(jnp.arange(S) - index)[None, :, None, :]

    def _lookup(self, distance: Array) -> Array:
        """Return the bias [N, M] of M distances."""
        bucket = relative_position_bucket(
            distance, self.bidirectional, self.num_buckets, self.max_distance
        )
        return self.table.astype(jnp.float32)[bucket].T


def relative_position_bucket(
    distance: Int[AnyArray, "*shape"], bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "*shape"]:
    """Return the bucket of each distance (key position - query position), by T5's rule.

    Half of a direction's buckets hold one distance each. The widths of the others grow
    logarithmically up to `max_distance`, computed in float32. Keys ahead of the query get buckets
    of their own if `bidirectional`; if not, they share bucket 0, since a mask hides them.

    Example with T5's 32 buckets and max_distance 128, not bidirectional: distances 0, -1 .. -15
    have the buckets 0 .. 15, distances -16 .. -18 share bucket 16, and all from -113 on have 31.
    """
    # The direction: keys ahead of the query have the upper half of the buckets.
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance > 0) * num_buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)

    # The size: small distances have exact buckets, larger ones logarithmic buckets.
    exact = num_buckets // 2
    eps = jnp.finfo(jnp.float32).eps  # keeps the unused logarithm of distance 0 finite
    ratio = jnp.log(distance.astype(jnp.float32) / exact + eps)
    ratio /= jnp.log(jnp.float32(max_distance / exact))
    far = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
    return bucket + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))
