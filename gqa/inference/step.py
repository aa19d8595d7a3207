"""The network as it generates: one token a step, over keys and values that are kept.

    net = Inference(config)
    weights = net.prepare(params)                                       once a checkpoint
    memory = net.prefill(weights, inputs)                               once a batch
    cache = net.init_cache(batch_size, num_beams, length)
    logits, cache = net.step(weights, tokens, index, cache, memory)     once a token

A step multiplies a few rows by every weight of the decoder and reads every key and value. To move
each of those bytes once, and nothing else of size, is all there is to its speed; hence two layouts
of both: `joined` for one CPU, `apart` for all else.

Beams R are more query rows of the same keys in cross-attention, which is never repeated for them,
and more batch rows in self-attention. Layers run one by one: a scan would copy each one's cache.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gqa.inference.accelerator_layout import Apart
from gqa.inference.cpu_layout import KV, Joined
from gqa.model import fused_attention
from gqa.model.attention import Segments, as_bias
from gqa.model.config import Config
from gqa.model.layers import RelativePositionBias, RMSNorm
from gqa.model.transformer import Encoder, each_layer
from gqa.runtime.sharding import WHOLE, Layout, constrain

__all__ = ["KV", "Inference", "Memory"]

NORMS = ("self_attention_norm", "cross_attention_norm", "mlp_norm")

# Attention logits of a layer that are computed at once; more would go through memory many times.
CPU_LOGITS = 2**24


class Memory(NamedTuple):
    """What decoding reads of the inputs: keys and values a layer, and the bias that hides padding.

    The bias is [B, 1, 1, S].
    """

    kv: list[KV]
    mask: Array


@dataclasses.dataclass(frozen=True)
class Inference:
    """How a network of `config` generates on a backend; the methods are pure functions.

    `cache_dtype` defaults to float32 on CPUs, where bfloat16 products cost more than its bytes
    save, and to bfloat16 on accelerators; `backend` to JAX's own, or "cudnn" for a GPU that has it.
    On several devices, give the `layout` of `gqa.sharding.choose`, and run under the mesh of
    `jax.set_mesh`.
    """

    config: Config
    cache_dtype: str = ""
    backend: str = ""
    layout: Layout = WHOLE

    def __post_init__(self):
        backend = self.backend or fused_attention.backend() or jax.default_backend()
        default = "float32" if backend == "cpu" else "bfloat16"
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "cache_dtype", self.cache_dtype or default)

    @functools.cached_property
    def forms(self) -> list[Joined] | list[Apart]:
        """How weights and caches are laid out, layer by layer."""
        configs = [self.config.at_layer(i) for i in range(self.config.num_decoder_layers)]
        if self.backend == "cpu" and self.layout.model == 1:
            return [Joined(config) for config in configs]
        return [Apart(config, self.layout, self.fused) for config in configs]

    @property
    def fused(self) -> bool:
        """Whether cross-attention is cuDNN's, whose keys and values are [B, S, K, H]."""
        if self.backend != "cudnn":
            return False
        heads = self.config.num_heads, self.config.head_dim
        q = jax.ShapeDtypeStruct((1, 1, *heads), self.cache_dtype)
        chosen = fused_attention.select(
            q, q, position_bias=False, packed=False, dropout=False, backend=self.backend
        )
        return chosen.kernel is not None

    @property
    def form(self) -> Joined | Apart:
        """That of the first layer, for what does not depend on KV heads."""
        return self.forms[0]

    def prepare(self, params: dict) -> dict:
        """The parameters with the decoder's layers apart, in the activations' dtype and layout."""
        decoder, dtype = params["decoder"], self.config.dtype
        layers = [jax.tree.map(lambda x: x.astype(dtype), layer) for layer in each_layer(decoder)]
        layers = [
            form.prepare_layer(layer) | {name: layer[name] for name in NORMS}
            for form, layer in zip(self.forms, layers, strict=True)
        ]
        weights = params | {"decoder": decoder | {"layers": layers}}
        if not self.config.tied_logits:
            weights["logits"] = self.form.prepare_logits(params["logits"])
        return weights

    def prefill(self, weights: dict, inputs: Array, num_beams: int = 1) -> Memory:
        """Encode inputs [B, S], 0 being padding, and take each layer's keys and values of it."""
        encoded = self._encode(weights, inputs)
        rows = [
            num_beams * self.config.num_heads // K for K in self.config.kv_heads("cross_attention")
        ]
        fill = self._fill(inputs.shape[1], rows)  # as more padding
        encoded = jnp.pad(encoded, ((0, 0), (0, fill), (0, 0)))
        mask = as_bias(jnp.pad(inputs, ((0, 0), (0, fill))) > 0)[:, None, None, :]
        layers = zip(self.forms, weights["decoder"]["layers"], rows, strict=True)
        kv = [form.memory(layer, encoded, M) for form, layer, M in layers]
        return Memory(jax.tree.map(lambda x: x.astype(self.cache_dtype), kv), mask)

    def _fill(self, length: int, rows: list[int]) -> int:
        """Positions to fill keys up with, for so many query rows a KV head of each layer."""
        return max(form.fill(length, M) for form, M in zip(self.forms, rows, strict=True))

    def _encode(self, weights: dict, inputs: Array) -> Array:
        """Encoder output [B, S, D], on a CPU of as many examples at a time as its cache is for."""
        c, (B, S) = self.config, inputs.shape

        def encode(inputs: Array) -> Array:
            x = constrain(weights["embedding"][inputs].astype(c.dtype), "batch", None, None)
            real = (inputs > 0).astype(jnp.int32)
            segments = Segments(real, real, packed=False)
            x = Encoder(c).apply({"params": weights["encoder"]}, x, segments, False)
            # Else a cache that is split by its rows would have XLA split every layer's x so.
            return constrain(x, "batch", None, None)

        fit = CPU_LOGITS // (c.num_heads * S * S) if self.backend == "cpu" else B
        rows = next(n for n in range(min(max(fit, 1), B), 0, -1) if B % n == 0)
        if rows == B:
            return encode(inputs)
        return jax.lax.map(encode, inputs.reshape(-1, rows, S)).reshape(B, S, c.d_model)

    def init_cache(self, batch_size: int, num_beams: int, length: int) -> list[KV]:
        """Zero self-attention keys and values of B * R rows, a pair a layer.

        There is room for `length` positions, and up to a block's more.
        """
        rows, c = batch_size * num_beams, self.config
        length += self._fill(length, [c.num_heads // K for K in c.kv_heads("self_attention")])
        return [form.cache(rows, length, self.cache_dtype) for form in self.forms]

    def room(self, cache: list[KV]) -> int:
        """Positions that a cache holds."""
        return self.form.room(cache[0])

    def grow(self, cache: list[KV], length: int) -> list[KV]:
        """The cache with room for `length` positions."""
        empty = self.init_cache(self.form.rows(cache[0]), 1, length)
        return jax.tree.map(self.form.grown, cache, empty)

    def step(
        self, weights: dict, tokens: Array, index: Array, cache: list[KV], memory: Memory
    ) -> tuple[Array, list[KV]]:
        """Logits [B, R, V] after tokens [B, R] at position `index`, and the cache with it.

        Row b * R + r of the cache belongs to tokens[b, r].
        """
        c, decoder = self.config, weights["decoder"]
        length = self.room(cache)
        bias = RelativePositionBias(c.num_heads, c.num_buckets, c.max_distance, False).apply(
            {"params": decoder["position_bias"]}, index, length, method="row"
        )
        bias += as_bias(jnp.arange(length) <= index)[None, None, None]
        x = constrain(weights["embedding"][tokens].astype(c.dtype), "batch", None, None)
        new_cache = []
        for form, layer, kv, memory_kv in zip(
            self.forms, decoder["layers"], cache, memory.kv, strict=True
        ):
            y, kv = self._self_attend(form, layer, x, index, kv, bias)
            new_cache.append(kv)
            x += y
            x += self._cross_attend(form, layer, x, memory_kv, memory.mask)
            x += form.mlp(layer, self._norm(layer["mlp_norm"], x))
        x = self._norm(decoder["norm"], x).astype(jnp.float32)
        if c.tied_logits:
            x *= c.d_model**-0.5
            # The embedding lies as [V, D]: its rows come first, so that they are read in order.
            return jnp.einsum("VD,BRD->VBR", weights["embedding"], x).transpose(1, 2, 0), new_cache
        return self.form.logits(x, weights["logits"]), new_cache

    def _self_attend(
        self, form: Joined | Apart, layer: dict, x: Array, index: Array, cache: KV, bias: Array
    ) -> tuple[Array, KV]:
        q, k, v = form.own_heads(layer, self._norm(layer["self_attention_norm"], x))
        cache = form.put(cache, k, v, index)
        out = form.attend_own(q, cache, bias).astype(self.config.dtype)
        return form.out(layer["self_out"], out), cache

    def _cross_attend(
        self, form: Joined | Apart, layer: dict, x: Array, memory: KV, mask: Array
    ) -> Array:
        q = form.cross_heads(layer, self._norm(layer["cross_attention_norm"], x))
        out = form.attend_cross(q, memory, mask).astype(self.config.dtype)
        return form.out(layer["cross_out"], out)

    def _norm(self, params: dict, x: Array) -> Array:
        return RMSNorm(jnp.dtype(self.config.dtype)).apply({"params": params}, x)
