"""The parts of a T5 layer: attention with its projections, norm, MLP and position bias.

The formula of attention itself is in `attention.py`, whose letters are used here. How the parts
form a network is in `transformer.py`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gqa.model import fused_attention
from gqa.model.attention import AnyArray, Segments, make_mask
from gqa.model.config import GATED_GELU
from gqa.model.cpu_attention import attention_with_custom_gradient
from gqa.model.linear import linear
from gqa.runtime.sharding import constrain, repeat_heads


class Attention(nn.Module):
    """Attention with its projections.

    It runs the backend's fused kernel, or `attention_with_custom_gradient` if there is none.

    Parameters: query [D, N, H], key and value [D, K, H], out [N, H, D]; no biases.
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

        # T5 leaves the logits unscaled and draws the query kernel sqrt(H) times smaller instead.
        query_init = variance_scaling(1 / H, "fan_in", "normal", 0, (1, 2))
        self.query = self.param("query", query_init, (D, N, H))

        init = variance_scaling(1.0, "fan_in", "normal", 0, (1, 2))
        self.key = self.param("key", init, (D, K, H))
        self.value = self.param("value", init, (D, K, H))
        self.out = self.param("out", variance_scaling(1.0, "fan_in", "normal", (0, 1)), (N, H, D))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        y: Float[Array, "B S D"],
        position_bias: Float[Array, "1 N T S"] | None,
        segments: Segments | None,
        train: bool,
    ) -> Float[Array, "B T D"]:
        """Attend from x to y. In self-attention, y is x."""
        (B, T, D), S, N, H = x.shape, y.shape[1], self.num_heads, self.head_dim
        q = constrain(self._heads(x, self.query), "batch", None, "heads", None)
        k, v = (repeat_heads(self._heads(y, kernel)) for kernel in (self.key, self.value))

        dropout = None
        if train and self.dropout_rate > 0:
            # One draw for each key serves all query positions, as in T5.
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
        if out is None:  # no kernel of this backend fits
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
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


class MLP(nn.Module):
    """T5 1.1: (gelu(x wi_0) * (x wi_1)) wo. T5 1.0: relu(x wi_0) wo. Kernels [D, F] and [F, D]."""

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

        hidden = project("wi_0", x, (D, F))
        if self.activation == GATED_GELU:
            hidden = jax.nn.gelu(hidden) * project("wi_1", x, (D, F))
        else:
            hidden = jax.nn.relu(hidden)
        hidden = constrain(hidden, "batch", None, "mlp")
        return project("wo", self.dropout()(hidden, deterministic=not train), (F, D))


class RelativePositionBias(nn.Module):
    """T5's learned bias for each query head and bucket of distances.

    The layers of a stack share one table [buckets, N].
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
        laid out by a reshape, which is faster than a gather of T * S values: if a row of M values
        is repeated T times and cut into rows of M - 1, each row starts one value later than the row
        above it, as the distances of the next query do.
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
    """
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance > 0) * num_buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)

    exact = num_buckets // 2
    eps = jnp.finfo(jnp.float32).eps  # keeps the unused logarithm of distance 0 finite
    ratio = jnp.log(distance.astype(jnp.float32) / exact + eps)
    ratio /= jnp.log(jnp.float32(max_distance / exact))
    far = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
    return bucket + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))
