"""The layout of weights and caches for accelerators, and for several devices of any kind.

    keys     [B, K, H, S]
    values   [B, K, S, H]
    weights  one array for each parameter, in the shapes of training

No two axes that a mesh may split are merged into one. Where cuDNN computes cross-attention (GPUs),
keys and values are both [B, S, K, H]. Where a KV head is replicated over several devices
(`kv_heads="replicate"` of `gqa.runtime.sharding`), the cache holds as many KV heads as there are
devices along the mesh axis "model".

`layout.py` documents the methods. `cpu_layout.py` is the other implementation.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqa.inference.layout import KeysValues
from gqa.model import activations
from gqa.model.attention import Segments
from gqa.model.config import Config
from gqa.model.fused_attention import fused_attention
from gqa.runtime.mesh import Layout, by_rows
from gqa.runtime.sharding import constrain


@dataclasses.dataclass(frozen=True)
class AcceleratorLayout:
    """A `DecoderLayout` that a mesh can split.

    `sharding` says how the mesh splits it. With `fused`, cuDNN computes cross-attention.
    """

    config: Config
    sharding: Layout
    fused: bool = False

    def prepare_layer(self, params: dict) -> dict:
        # Where a KV head is replicated, its kernels are: the cache then has a head for each device.
        weights = dict(params["mlp"])
        for name in ("self", "cross"):
            kernels = params[f"{name}_attention"]
            K = kernels["key"].shape[1]
            copies = self._num_cached_heads(K) // K
            repeated = {kind: jnp.repeat(kernels[kind], copies, 1) for kind in ("key", "value")}
            weights |= {f"{name}_{kind}": kernel for kind, kernel in (kernels | repeated).items()}
        return weights

    def _num_cached_heads(self, K: int) -> int:
        """Return how many KV heads the cache of K KV heads holds, copies included."""
        return K if by_rows(K, self.sharding) else max(K, self.sharding.model)

    def prepare_logits(self, kernel: Float[Array, "D V"]) -> Array:
        return kernel

    def padding(self, length: int, num_query_rows: int) -> int:
        del length, num_query_rows
        return 0

    def cross_attention_cache(
        self, weights: dict, encoded: Float[Array, "B S D"], num_query_rows: int
    ) -> KeysValues:
        del num_query_rows
        K = self.config.layer_kv_heads("cross_attention")
        key, value = weights["cross_key"], weights["cross_value"]

        # Every device gets all rows of `encoded` that its part of the cache needs, and projects
        # these rows itself.
        encoded = self._place(encoded, K)
        if self.fused:
            k, v = (jnp.einsum("BSD,DKH->BSKH", encoded, kernel) for kernel in (key, value))
            return self._place(k, K, None, "kv_heads"), self._place(v, K, None, "kv_heads")
        k = jnp.einsum("BSD,DKH->BKHS", encoded, key)
        v = jnp.einsum("BSD,DKH->BKSH", encoded, value)
        return self._place(k, K, "kv_heads"), self._place(v, K, "kv_heads")

    def empty_cache(self, num_rows: int, length: int, dtype: str) -> KeysValues:
        K = self._num_cached_heads(self.config.layer_kv_heads("self_attention"))
        H = self.config.head_dim
        return (
            jnp.zeros((num_rows, K, H, length), dtype),
            jnp.zeros((num_rows, K, length, H), dtype),
        )

    def num_rows(self, cache: KeysValues) -> int:
        return len(cache[0])

    def capacity(self, cache: KeysValues) -> int:
        return cache[1].shape[2]

    def grow(self, old: Array, empty: Array) -> Array:
        return jax.lax.dynamic_update_slice(empty, old, (0,) * old.ndim)

    def update_cache(
        self,
        cache: KeysValues,
        k: Float[Array, "B R K H"],
        v: Float[Array, "B R K H"],
        index: Int[Array, ""] | int,
    ) -> KeysValues:
        # The beams of all examples are rows of the cache: [B, R, K, H] -> [B * R, K, H].
        k, v = (x.reshape(-1, *x.shape[2:]).astype(cache[0].dtype) for x in (k, v))
        return (
            jax.lax.dynamic_update_slice(cache[0], k[..., None], (0, 0, 0, index)),
            jax.lax.dynamic_update_slice(cache[1], v[:, :, None], (0, 0, index, 0)),
        )

    def self_attention_heads(
        self, weights: dict, x: Float[Array, "B R D"]
    ) -> tuple[Float[Array, "B R N H"], Float[Array, "B R K H"], Float[Array, "B R K H"]]:
        # A new key and value go to the devices that hold their part of the cache. The cache, which
        # is larger, stays where it is.
        K = self.config.layer_kv_heads("self_attention")
        k, v = (
            self._place(_project(x, weights[f"self_{kind}"]), K, None, "kv_heads")
            for kind in ("key", "value")
        )
        return self._place_queries(_project_queries(x, weights["self_query"]), K), k, v

    def cross_attention_queries(
        self, weights: dict, x: Float[Array, "B R D"]
    ) -> Float[Array, "B R N H"]:
        q = _project_queries(x, weights["cross_query"])
        return self._place_queries(q, self.config.layer_kv_heads("cross_attention"))

    def self_attention(
        self, q: Float[Array, "B R N H"], cache: KeysValues, bias: Float[Array, "1 N 1 S"]
    ) -> Float[Array, "B R N H"]:
        # Beams have caches of their own here, so each beam is a row of the batch with one query.
        B, R, N, H = q.shape
        out = _attend(q.reshape(B * R, 1, N, H), *cache, bias).reshape(q.shape)
        return self._place_queries(out, self.config.layer_kv_heads("self_attention"))

    def cross_attention(
        self, q: Float[Array, "B R N H"], cache: KeysValues, mask: Float[Array, "B 1 1 S"]
    ) -> Float[Array, "B R N H"]:
        # Beams share the keys of their example, so they are R queries of one row of the batch.
        out = _attend_fused(q, *cache, mask) if self.fused else _attend(q, *cache, mask)
        return self._place_queries(out, self.config.layer_kv_heads("cross_attention"))

    def project_out(self, kernel: Array, x: Float[Array, "B R N H"]) -> Float[Array, "B R D"]:
        # Each device projects the heads that it holds. The second constraint makes XLA add up the
        # devices' parts here.
        x = constrain(x, "batch", None, "heads", None)
        return constrain(jnp.einsum("BRNH,NHD->BRD", x, kernel), "batch", None, None)

    def mlp(self, weights: dict, x: Float[Array, "B R D"]) -> Float[Array, "B R D"]:
        hidden = activations.function(self.config.activation)(x @ weights["wi_0"])
        if self.config.is_gated:
            hidden *= x @ weights["wi_1"]

        # Each device holds some of the F hidden units, so the devices' products are added up.
        return constrain(hidden @ weights["wo"], "batch", None, None)

    def logits(self, x: Float[Array, "B R D"], kernel: Array) -> Float[Array, "B R V"]:
        return x @ kernel

    def _place_queries(self, q: Array, K: int) -> Array:
        """Split queries, or outputs of attention, [B, R, N, H] as the cache of K heads is split."""
        return self._place(q, K, None, "heads")

    def _place(self, x: Array, K: int, *axes: str | None) -> Array:
        """Split x over the mesh as the cache of K KV heads is split.

        If the mesh splits this cache by its rows alone, x is split by its first axis; otherwise x
        is split by "batch" along its first axis, and by `axes` along the axes behind it.
        """
        if by_rows(K, self.sharding):
            return constrain(x, "rows", *[None] * (x.ndim - 1))
        return constrain(x, "batch", *axes, *[None] * (x.ndim - 1 - len(axes)))


def _project(x: Array, kernel: Array) -> Array:
    """Multiply x [B, R, D] by kernel [D, heads, H]; returns [B, R, heads, H]."""
    return jnp.einsum("BRD,DNH->BRNH", x, kernel)


def _project_queries(x: Array, kernel: Array) -> Array:
    """`_project` where each head's product runs on the device that holds the head's kernel.

    Without the constraint XLA would rather gather the kernel than send the queries, which are
    smaller.
    """
    return constrain(_project(x, kernel), "batch", None, "heads", None)


def _attend(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """Attend from q [B, T, N, H] to k [B, K, H, S] and v [B, K, S, H]; returns [B, T, N, H].

    The bias is [B, 1, 1, S] or, if T = 1, [1, N, 1, S].
    """
    (B, T, N, H), K = q.shape, k.shape[1]

    # All query rows of a KV head are the rows M of one product. The queries take the cache's dtype,
    # because a cast of the cache would copy it; sums are in float32.
    q = q.astype(k.dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    rows = q.reshape(B, K, -1, H)
    logits = jnp.einsum("BKMH,BKHS->BKMS", rows, k, preferred_element_type=jnp.float32)

    # The position bias differs by head, and query heads are rows here. A mask is equal for all
    # rows.
    if bias.shape[1] > 1:
        bias = bias.reshape(1, K, N // K, -1)

    weights = jax.nn.softmax(logits + bias).astype(v.dtype)
    out = jnp.einsum("BKMS,BKSH->BKMH", weights, v)
    return out.reshape(q.shape).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_fused(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attend with cuDNN, which writes no logits to memory; returns [B, T, N, H].

    q is [B, T, N, H], k and v are [B, S, K, H] and the mask is [B, 1, 1, S].
    """
    # The kernel takes segments instead of a mask: padding is of segment 0, which no query has.
    real = (mask[:, 0, 0] == 0).astype(jnp.int32)
    segments = Segments(jnp.ones(q.shape[:2], jnp.int32), real, packed=False)
    out = fused_attention(
        q.astype(k.dtype),
        k,
        v,
        position_bias=None,
        segments=segments,
        causal=False,
        backend="cudnn",
    )
    assert out is not None, "Inference.fused is true only where cuDNN has a kernel"
    return out
