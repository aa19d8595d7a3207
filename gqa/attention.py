"""Grouped-query attention (Ainslie et al., 2023, section 2.2): N query heads share K KV heads.

Letters, here and in every einsum of the project:

    B batch      T query length   S key length   D model     F mlp      L layers   V vocabulary
    N query heads                 K KV heads     G = N / K   H head dim

K = N is multi-head attention and K = 1 is multi-query attention; the formula has no branch on it.
Query head n reads KV head n // G, so the heads of a group are neighbours. Keys are kept as
[B, K, H, S] and values as [B, K, S, H]: the products below then read both in memory order.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import variance_scaling


def grouped_query_attention(
    q: Array, k: Array, v: Array, bias: Array | None = None, dropout: Array | None = None
) -> Array:
    """Attend from q [B, T, N, H] to k and v [B, S, K, H]; returns [B, T, N, H].

    Logits are not divided by sqrt(H), as in T5 (the factor sits in the query initialiser).

    Args:
        bias: added to the logits; broadcastable to [B, N, T, S].
        dropout: multiplies the weights; broadcastable to [B, N, T, S].
    """
    biases = () if bias is None else (bias,)
    return attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), biases, dropout)


def attend(
    q: Array, k: Array, v: Array, biases: tuple[Array, ...] = (), dropout: Array | None = None
) -> Array:
    """`grouped_query_attention` on the cache's layout: k [B, K, H, S], v [B, K, S, H].

    Biases that broadcast along different axes stay small by coming one by one.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} KV heads: q {q.shape}, k {k.shape}")
    # The G queries of a group are more rows of one product; K and V are never repeated.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    logits = jnp.einsum("BKGTH,BKHS->BKGTS", q, k, preferred_element_type=jnp.float32)
    for bias in biases:
        logits += _split_heads(bias, K)
    weights = jax.nn.softmax(logits)
    if dropout is not None:
        weights *= _split_heads(dropout, K)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_blocks(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """`attend` for the few rows of a decoding step: keys lie in blocks, k [B, K, C, H, S / C].

    q [B, T, N, H], v [B, K, S, H], bias broadcastable to [B, N, T, S]; returns [B, T, N, H].
    """
    B, T, N, H = q.shape
    _, K, C, _, block = k.shape
    G = N // K
    q = q.astype(k.dtype).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    # All rows of a KV head meet each block of its keys in one product.
    rows = jnp.broadcast_to(q.reshape(B, K, 1, G * T, H), (B, K, C, G * T, H))
    logits = jnp.einsum("BKCMH,BKCHS->BKCMS", rows, k, preferred_element_type=jnp.float32)
    logits = logits.swapaxes(2, 3).reshape(B, K, G, T, C * block) + _split_heads(bias, K)
    weights = jax.nn.softmax(logits).reshape(B, K, G * T, C * block).astype(v.dtype)
    out = jnp.einsum("BKMS,BKSH->BKMH", weights, v)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _split_heads(x: Array, K: int) -> Array:
    """[B, N, T, S] -> [B, K, G, T, S], where a head axis of 1 stays broadcastable."""
    B, N, T, S = x.shape
    return x.reshape(B, K, N // K, T, S) if N > 1 else x[:, None]


class Attention(nn.Module):
    """The projections around `attend`; `kv` is apart so that its result can be cached.

    Parameters: query [D, N, H], key and value [D, K, H], out [N, H, D]; no biases.
    """

    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dropout_rate: float
    dtype: jnp.dtype

    def setup(self):
        D, N, K, H = self.d_model, self.num_heads, self.num_kv_heads, self.head_dim
        # T5 leaves the logits unscaled and draws the query kernel sqrt(H) times smaller instead.
        small = variance_scaling(1 / H, "fan_in", "normal", 0, (1, 2))
        self.query = self.param("query", small, (D, N, H))
        into = variance_scaling(1.0, "fan_in", "normal", 0, (1, 2))
        self.key = self.param("key", into, (D, K, H))
        self.value = self.param("value", into, (D, K, H))
        self.out = self.param("out", variance_scaling(1.0, "fan_in", "normal", (0, 1)), (N, H, D))

    def kv(self, y: Array) -> tuple[Array, Array]:
        """Keys [B, K, H, S] and values [B, K, S, H] of y [B, S, D]."""
        k = jnp.einsum("BSD,DKH->BKHS", y, self.key.astype(self.dtype))
        v = jnp.einsum("BSD,DKH->BKSH", y, self.value.astype(self.dtype))
        return k, v

    def __call__(
        self, x: Array, kv: tuple[Array, Array], biases: tuple[Array, ...], train: bool
    ) -> Array:
        """Attend from x [B, T, D] to `kv`, with biases broadcastable to [B, N, T, S]."""
        q = jnp.einsum("BTD,DNH->BTNH", x, self.query.astype(self.dtype))
        k, v = kv
        dropout = None
        if train and self.dropout_rate > 0:
            # One draw per key serves every query position, as in T5.
            keep = 1 - self.dropout_rate
            shape = (x.shape[0], self.num_heads, 1, k.shape[-1])
            dropout = jax.random.bernoulli(self.make_rng("dropout"), keep, shape) / keep
        out = attend(q, k, v, biases, dropout)
        return jnp.einsum("BTNH,NHD->BTD", out, self.out.astype(self.dtype))
