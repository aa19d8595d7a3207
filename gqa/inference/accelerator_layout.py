"""Weights and caches for accelerators and several devices: every axis that a mesh may split apart.

    keys     [B, K, H, S]        weights  as they are trained, one array each
    values   [B, K, S, H]

cuDNN, which does cross-attention on GPUs, has both as [B, S, K, H]. Where `gqa.sharding` keeps a KV
head on each device, K is the number of devices along "model".
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from gqa.model.attention import Segments
from gqa.model.config import Config
from gqa.model.fused_attention import fused_attention
from gqa.model.layers import GATED_GELU
from gqa.runtime.sharding import Layout, by_rows, constrain

KV = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Apart:
    """How a network of `config` is laid out under `layout`; the methods are pure functions.

    With `fused`, cross-attention is cuDNN's.
    """

    config: Config
    layout: Layout
    fused: bool = False

    def prepare_layer(self, layer: dict) -> dict:
        """One decoder layer's kernels under one name each, KV heads repeated as they are kept."""
        kernels = dict(layer["mlp"])
        for name in ("self", "cross"):
            own = layer[f"{name}_attention"]
            more = self._kept(own["key"].shape[1]) // own["key"].shape[1]
            own = own | {kind: jnp.repeat(own[kind], more, axis=1) for kind in ("key", "value")}
            kernels |= {f"{name}_{kind}": kernel for kind, kernel in own.items()}
        return kernels

    def _kept(self, K: int) -> int:
        """The KV heads that are kept of K."""
        return K if by_rows(K, self.layout) else max(K, self.layout.model)

    def prepare_logits(self, kernel: Array) -> Array:
        """[D, V] as it is."""
        return kernel

    def fill(self, length: int, rows: int) -> int:
        """Positions that keys are filled up with: none."""
        del length, rows
        return 0

    def memory(self, layer: dict, encoded: Array, rows: int) -> KV:
        """Keys and values of encoded [B, S, D]."""
        del rows
        K = self.config.num_kv_heads_cross_attention
        encoded = self._place(encoded, K)  # every device has all rows: each projects its own
        if self.fused:
            kernels = layer["cross_key"], layer["cross_value"]
            kv = (jnp.einsum("BSD,DKH->BSKH", encoded, kernel) for kernel in kernels)
            return tuple(self._place(x, K, None, "kv_heads") for x in kv)
        k = jnp.einsum("BSD,DKH->BKHS", encoded, layer["cross_key"])
        v = jnp.einsum("BSD,DKH->BKSH", encoded, layer["cross_value"])
        return tuple(self._place(x, K, "kv_heads") for x in (k, v))

    def cache(self, rows: int, length: int, dtype: str) -> KV:
        """Zeros for `length` positions of so many rows of the batch."""
        K, H = self._kept(self.config.num_kv_heads_self_attention), self.config.head_dim
        return jnp.zeros((rows, K, H, length), dtype), jnp.zeros((rows, K, length, H), dtype)

    def rows(self, cache: KV) -> int:
        """Rows of the batch that a cache is of."""
        return len(cache[0])

    def room(self, cache: KV) -> int:
        """Positions that a cache holds."""
        return cache[1].shape[2]

    def grown(self, old: Array, new: Array) -> Array:
        """`new`, zeros with room for more positions, with what is in `old`."""
        return jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)

    def own_heads(self, layer: dict, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values [B, R, heads, H] of x [B, R, D]."""
        K = self.config.num_kv_heads_self_attention
        k, v = (
            self._place(_heads(x, layer[f"self_{kind}"]), K, None, "kv_heads")
            for kind in ("key", "value")
        )
        return self._queries(_query(x, layer["self_query"]), K), k, v

    def cross_heads(self, layer: dict, x: Array) -> Array:
        """Queries [B, R, N, H] of x [B, R, D]."""
        return self._queries(
            _query(x, layer["cross_query"]), self.config.num_kv_heads_cross_attention
        )

    def out(self, kernel: Array, x: Array) -> Array:
        """[B, R, N, H] -> [B, R, D]."""
        x = constrain(x, "batch", None, "heads", None)
        return constrain(jnp.einsum("BRNH,NHD->BRD", x, kernel), "batch", None, None)

    def put(self, cache: KV, k: Array, v: Array, index: Array) -> KV:
        """The cache with keys and values [B, R, K, H] at position `index`."""
        k, v = (x.reshape(-1, *x.shape[2:]).astype(cache[0].dtype) for x in (k, v))
        return (
            jax.lax.dynamic_update_slice(cache[0], k[..., None], (0, 0, 0, index)),
            jax.lax.dynamic_update_slice(cache[1], v[:, :, None], (0, 0, index, 0)),
        )

    def attend_own(self, q: Array, kv: KV, bias: Array) -> Array:
        """q [B, R, N, H] to the cache of B * R rows, bias [1, N, 1, S]: [B, R, N, H]."""
        B, R, N, H = q.shape
        out = _attend(q.reshape(B * R, 1, N, H), *kv, bias).reshape(q.shape)
        return self._queries(out, self.config.num_kv_heads_self_attention)

    def attend_cross(self, q: Array, kv: KV, mask: Array) -> Array:
        """q [B, R, N, H] to keys and values of B inputs, mask [B, 1, 1, S]: [B, R, N, H]."""
        out = _attend_fused(q, *kv, mask) if self.fused else _attend(q, *kv, mask)
        return self._queries(out, self.config.num_kv_heads_cross_attention)

    def mlp(self, layer: dict, x: Array) -> Array:
        """[B, R, D] -> [B, R, D]."""
        hidden = x @ layer["wi_0"]
        if self.config.activation == GATED_GELU:
            hidden = jax.nn.gelu(hidden) * (x @ layer["wi_1"])
        else:
            hidden = jax.nn.relu(hidden)
        return constrain(hidden @ layer["wo"], "batch", None, None)

    def logits(self, x: Array, kernel: Array) -> Array:
        """[B, R, D] -> [B, R, V]."""
        return x @ kernel

    def _queries(self, q: Array, K: int) -> Array:
        """Queries [B, R, N, H], or what attention gives them, where the cache of K heads is."""
        return self._place(q, K, None, "heads")

    def _place(self, x: Array, K: int, *axes: str | None) -> Array:
        """x by its rows, where the cache of K heads is split so, else by `axes` behind "batch"."""
        if by_rows(K, self.layout):
            return constrain(x, "rows", *[None] * (x.ndim - 1))
        return constrain(x, "batch", *axes, *[None] * (x.ndim - 1 - len(axes)))


def _heads(x: Array, kernel: Array) -> Array:
    """x [B, R, D] times [D, heads, H]: [B, R, heads, H]."""
    return jnp.einsum("BRD,DNH->BRNH", x, kernel)


def _query(x: Array, kernel: Array) -> Array:
    """`_heads`, each on its kernel's device: XLA would rather gather the kernel than send these."""
    return constrain(_heads(x, kernel), "batch", None, "heads", None)


def _attend(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """q [B, T, N, H] to k [B, K, H, S] and v [B, K, S, H]: [B, T, N, H].

    The bias is [B, 1, 1, S], or for T = 1 [1, N, 1, S].
    """
    (B, T, N, H), K = q.shape, k.shape[1]
    # All query rows of a KV head are the rows M of one product.
    q = q.astype(k.dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    rows = q.reshape(B, K, -1, H)
    logits = jnp.einsum("BKMH,BKHS->BKMS", rows, k, preferred_element_type=jnp.float32)
    if bias.shape[1] > 1:
        bias = bias.reshape(1, K, N // K, -1)
    weights = jax.nn.softmax(logits + bias).astype(v.dtype)
    out = jnp.einsum("BKMS,BKSH->BKMH", weights, v)
    return out.reshape(q.shape).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_fused(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B, T, N, H] to k and v [B, S, K, H], mask [B, 1, 1, S]: [B, T, N, H]; no logits in HBM."""
    real = (mask[:, 0, 0] == 0).astype(jnp.int32)
    segments = Segments(jnp.ones(q.shape[:2], jnp.int32), real, packed=False)
    return fused_attention(
        q.astype(k.dtype),
        k,
        v,
        position_bias=None,
        segments=segments,
        causal=False,
        backend="cudnn",
    )
