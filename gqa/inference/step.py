"""The network as it generates: one token per step, over cached keys and values.

    net = Inference(config)
    weights = net.prepare(params)                                       once per checkpoint
    memory = net.prefill(weights, inputs)                               once per batch
    cache = net.init_cache(batch_size, num_beams, length)
    logits, cache = net.step(weights, tokens, index, cache, memory)     once per token

A step multiplies a few rows by every weight of the decoder and reads every cached key and value. It
is as fast as memory if it reads each of these bytes once and moves no other large array. How
weights and caches must lie for this differs by backend: `layout.py` is the interface,
`cpu_layout.py` and `accelerator_layout.py` implement it.

The R beams of an example are R query rows over the same keys in cross-attention, whose cache is
never repeated for them, and R rows of the batch in self-attention. Layers run one by one, because a
scan would copy each layer's cache.

The order of a layer's parts is `gqa.model.transformer.decoder_layer`, which training calls as well.
The search over tokens is in `decoding.py`, whole texts are in `generator.py`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gqa.inference.accelerator_layout import AcceleratorLayout
from gqa.inference.cpu_layout import CpuLayout
from gqa.inference.layout import DecoderLayout, KeysValues
from gqa.model import fused_attention
from gqa.model.attention import Segments, as_bias
from gqa.model.config import Config
from gqa.model.layers import RelativePositionBias, RMSNorm
from gqa.model.transformer import Encoder, decoder_layer, each_layer
from gqa.runtime.mesh import WHOLE, Layout
from gqa.runtime.sharding import constrain

# Token ids may be NumPy arrays where they are not traced.
Tokens = Array | np.ndarray

NORMS = ("self_attention_norm", "cross_attention_norm", "mlp_norm")

# Attention logits of an encoder layer that a CPU computes at once. More of them no longer fit the
# CPU's caches, and would be written to and read from main memory many times.
CPU_LOGITS = 2**24


class Memory(NamedTuple):
    """The part of the KV cache that belongs to the inputs: cross-attention reads it at every step.

    kv: the keys and values of cross-attention, a pair for each decoder layer.
    mask: the bias [B, 1, 1, S] that hides padding.
    """

    kv: list[KeysValues]
    mask: Array


@dataclasses.dataclass(frozen=True)
class Inference:
    """A network of `config` as it generates on one backend. All methods are pure functions.

    cache_dtype: by default float32 on CPUs, where products of bfloat16 cost more time than reading
        half the bytes saves, and bfloat16 on accelerators.
    backend: by default JAX's own, or "cudnn" on a GPU whose cuDNN has fused attention.
    layout: how a mesh splits the arrays. On several devices, give what
        `gqa.runtime.mesh.resolve_layout` returns, and call the methods under `jax.set_mesh(mesh)`.
    """

    config: Config
    cache_dtype: str = ""
    backend: str = ""
    layout: Layout = WHOLE

    def __post_init__(self) -> None:
        backend = self.backend or fused_attention.backend() or jax.default_backend()
        default = "float32" if backend == "cpu" else "bfloat16"
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "cache_dtype", self.cache_dtype or default)

    @functools.cached_property
    def decoder_layouts(self) -> list[DecoderLayout]:
        """How the weights and caches of each decoder layer lie in memory."""
        configs = [self.config.at_layer(i) for i in range(self.config.num_decoder_layers)]
        if self.backend == "cpu" and self.layout.model == 1:
            return [CpuLayout(config) for config in configs]
        return [AcceleratorLayout(config, self.layout, self.fused) for config in configs]

    @property
    def fused(self) -> bool:
        """Whether cuDNN computes cross-attention, whose keys and values are then [B, S, K, H]."""
        if self.backend != "cudnn":
            return False
        heads = self.config.num_heads, self.config.head_dim
        q = jax.ShapeDtypeStruct((1, 1, *heads), self.cache_dtype)
        chosen = fused_attention.select(
            q, q, position_bias=False, packed=False, dropout=False, backend=self.backend
        )
        return chosen.kernel is not None

    @property
    def _kept(self) -> tuple[str, ...]:
        """The parts of a layer that every layout leaves as they are."""
        return (*NORMS, "position_bias") if self.config.position_bias_per_layer else NORMS

    @property
    def _first_layout(self) -> DecoderLayout:
        """The first layer's layout, for methods whose result is equal for every layer."""
        return self.decoder_layouts[0]

    def prepare(self, params: dict) -> dict:
        """Return the parameters as `step` reads them.

        The decoder's layers are no longer stacked, and each is in the activations' dtype and in
        its layout.
        """
        decoder, dtype = params["decoder"], self.config.dtype
        layers = [jax.tree.map(lambda x: x.astype(dtype), layer) for layer in each_layer(decoder)]
        layers = [
            layout.prepare_layer(layer) | {name: layer[name] for name in self._kept}
            for layout, layer in zip(self.decoder_layouts, layers, strict=True)
        ]
        weights = params | {"decoder": decoder | {"layers": layers}}
        if not self.config.tied_logits:
            weights["logits"] = self._first_layout.prepare_logits(params["logits"])
        return weights

    def prefill(self, weights: dict, inputs: Int[Tokens, "B S"], num_beams: int = 1) -> Memory:
        """Encode padded inputs and project them to the keys and values of each layer."""
        with jax.named_scope("encoder"):
            encoded = self._encode(weights, inputs)

        # Pad the inputs up to whole blocks of the layout. In cross-attention the G query heads of
        # all beams read a KV head in one product, so this product has num_beams * G rows.
        num_query_rows = [
            num_beams * self.config.num_heads // K for K in self.config.kv_heads("cross_attention")
        ]
        fill = self._padding(inputs.shape[1], num_query_rows)
        encoded = jnp.pad(encoded, ((0, 0), (0, fill), (0, 0)))
        real = jnp.pad(inputs != self.config.pad_token_id, ((0, 0), (0, fill)))
        mask = as_bias(real)[:, None, None, :]

        layers = zip(
            self.decoder_layouts, weights["decoder"]["layers"], num_query_rows, strict=True
        )
        with jax.named_scope("cross_attention_cache"):
            kv = [layout.cross_attention_cache(layer, encoded, M) for layout, layer, M in layers]
        return Memory(jax.tree.map(lambda x: x.astype(self.cache_dtype), kv), mask)

    def _padding(self, length: int, num_query_rows: list[int]) -> int:
        """Return the positions of padding behind `length` keys that suit every layer's layout.

        `num_query_rows` has, for each layer, the number of query rows that read a KV head in one
        product.
        """
        pairs = zip(self.decoder_layouts, num_query_rows, strict=True)
        return max(layout.padding(length, M) for layout, M in pairs)

    def _encode(self, weights: dict, inputs: Tokens) -> Array:
        """Return the encoder's output [B, S, D].

        A CPU encodes the batch in parts of equal size, as large as `CPU_LOGITS` allows.
        """
        c, (B, S) = self.config, inputs.shape

        def encode(inputs: Tokens) -> Array:
            x = constrain(weights["embedding"][inputs].astype(c.dtype), "batch", None, None)
            real = (inputs != c.pad_token_id).astype(jnp.int32)
            segments = Segments(real, real, packed=False)
            encoded: Any = Encoder(c).apply({"params": weights["encoder"]}, x, segments, False)
            # Without this constraint, a cache that is split by its rows would make XLA split the
            # encoder's x by rows in every layer.
            return constrain(encoded, "batch", None, None)

        # The number of examples whose logits [N, S, S] fit, rounded down to a divisor of B.
        fit = CPU_LOGITS // (c.num_heads * S * S) if self.backend == "cpu" else B
        rows = next(n for n in range(min(max(fit, 1), B), 0, -1) if B % n == 0)
        if rows == B:
            return encode(inputs)
        return jax.lax.map(encode, inputs.reshape(-1, rows, S)).reshape(B, S, c.d_model)

    def init_cache(self, batch_size: int, num_beams: int, length: int) -> list[KeysValues]:
        """Return zero keys and values of self-attention for B * R texts, a pair for each layer.

        The capacity is `length` positions or, in a layout of blocks, up to one block more.
        """
        rows, c = batch_size * num_beams, self.config
        length += self._padding(length, [c.num_heads // K for K in c.kv_heads("self_attention")])
        return [
            layout.empty_cache(rows, length, self.cache_dtype) for layout in self.decoder_layouts
        ]

    def capacity(self, cache: list[KeysValues]) -> int:
        """Return the number of positions that a self-attention cache can hold."""
        return self._first_layout.capacity(cache[0])

    def grow(self, cache: list[KeysValues], length: int) -> list[KeysValues]:
        """Return the cache with a capacity of `length` positions."""
        empty = self.init_cache(self._first_layout.num_rows(cache[0]), 1, length)
        return jax.tree.map(self._first_layout.grow, cache, empty)

    def step(
        self,
        weights: dict,
        tokens: Int[Tokens, "B R"],
        index: Int[Array, ""] | int,
        cache: list[KeysValues],
        memory: Memory,
    ) -> tuple[Float[Array, "B R V"], list[KeysValues]]:
        """Run the decoder on one token of each text.

        Args:
            tokens: the tokens at position `index`; tokens[b, r] belongs to row b * R + r of the
                cache.
            cache: keys and values of the positions before `index`.

        Returns:
            The logits of the next tokens, and the cache with position `index` in it.
        """
        c, decoder = self.config, weights["decoder"]
        length = self.capacity(cache)

        # All layers share one position bias, or each has its own.
        shared_bias = None
        if not c.position_bias_per_layer:
            shared_bias = self._bias(decoder["position_bias"], index, length)

        x = constrain(weights["embedding"][tokens].astype(c.dtype), "batch", None, None)
        new_cache = []
        layers = zip(self.decoder_layouts, decoder["layers"], cache, memory.kv, strict=True)
        with jax.named_scope("decoder"):
            for layout, layer, self_kv, cross_kv in layers:
                bias = shared_bias
                if bias is None:
                    bias = self._bias(layer["position_bias"], index, length)
                x, self_kv = self._decoder_layer(
                    layout, layer, x, index, bias, self_kv, cross_kv, memory.mask
                )
                new_cache.append(self_kv)
            x = self._norm(decoder["norm"], x).astype(jnp.float32)

        with jax.named_scope("logits"):
            if not c.tied_logits:
                return self._first_layout.logits(x, weights["logits"]), new_cache
            x *= c.d_model**-0.5
            # V comes first in the product, as in the embedding [V, D], so that XLA reads the rows
            # of the embedding in memory order.
            logits = jnp.einsum("VD,BRD->VBR", weights["embedding"], x).transpose(1, 2, 0)
            return logits, new_cache

    def _bias(self, table: dict, index: Array | int, length: int) -> Array:
        """Return the bias [1, N, 1, length] of self-attention for the query at position `index`.

        It holds relative positions, and a mask over positions after `index`.
        """
        with jax.named_scope("position_bias"):
            c = self.config
            module = RelativePositionBias(c.num_heads, c.num_buckets, c.max_distance, False)
            bias: Any = module.apply({"params": table}, index, length, method="row")
            return bias + as_bias(jnp.arange(length) <= index)[None, None, None]

    def _decoder_layer(
        self,
        layout: DecoderLayout,
        layer: dict,
        x: Array,
        index: Array | int,
        bias: Array,
        self_kv: KeysValues,
        cross_kv: KeysValues,
        mask: Array,
    ) -> tuple[Array, KeysValues]:
        """Run one layer on x [B, R, D]; returns the new x and the new self-attention cache."""
        dtype = self.config.dtype

        # `decoder_layer` knows no cache. Self-attention hands its new cache out by `nonlocal`.

        def self_attention(h: Array) -> Array:
            nonlocal self_kv
            with jax.named_scope("self_attention"):
                q, k, v = layout.self_attention_heads(layer, h)
                with jax.named_scope("update_cache"):
                    self_kv = layout.update_cache(self_kv, k, v, index)
                out = layout.self_attention(q, self_kv, bias).astype(dtype)
                return layout.project_out(layer["self_out"], out)

        def cross_attention(h: Array) -> Array:
            with jax.named_scope("cross_attention"):
                q = layout.cross_attention_queries(layer, h)
                out = layout.cross_attention(q, cross_kv, mask).astype(dtype)
                return layout.project_out(layer["cross_out"], out)

        def mlp(h: Array) -> Array:
            with jax.named_scope("mlp"):
                return layout.mlp(layer, h)

        first, second, third = (functools.partial(self._norm, layer[name]) for name in NORMS)
        x = decoder_layer(x, (first, second, third), self_attention, cross_attention, mlp)
        return x, self_kv

    def _norm(self, params: dict, x: Array) -> Array:
        """Apply the norm with parameters `params` to x [B, R, D]."""
        with jax.named_scope("norm"):
            normed: Any = RMSNorm(jnp.dtype(self.config.dtype)).apply({"params": params}, x)
            return normed
