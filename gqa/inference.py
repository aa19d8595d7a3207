"""The network as it generates: one token a step, over keys and values that are kept.

    net = Inference(config)
    weights = net.prepare(params)                                       once a checkpoint
    memory = net.prefill(weights, inputs)                               once a batch
    cache = net.init_cache(batch_size, num_beams, length)
    logits, cache = net.step(weights, tokens, index, cache, memory)     once a token

A step multiplies a few rows by every weight of the decoder and reads every key and value. To move
each of those bytes once, and nothing else of size, is all there is to its speed; hence the layouts:

    keys     [B * K, C, H, S / C]   C blocks of positions, so that a product with a few query rows
    values   [B * K, C, S / C, H]   reads memory in order; without C where it is 1
    weights  [C, D, F / C]          C blocks of columns, for the same reason

Beams R are more query rows of the same keys in cross-attention, which is never repeated for them,
and more batch rows in self-attention. Layers run one by one: a scan would copy each one's cache.
So would an axis of length 1 in it, which XLA:CPU drops for a product but not for what is kept.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gqa.attention import Segments, as_bias, attend_blocks
from gqa.layers import GATED_GELU, RelativePositionBias, RMSNorm
from gqa.model import Config, Encoder

KV = tuple[Array, Array]

# Columns of a block on CPUs, where XLA's products of few rows by a wide matrix pack or transpose
# the matrix first; a single row (MHA without beams) is a matrix times a vector and needs no blocks.
CPU_BLOCK = 64

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
    save, and to bfloat16 on accelerators; `backend` to JAX's own.
    """

    config: Config
    cache_dtype: str = ""
    backend: str = ""

    def __post_init__(self):
        backend = self.backend or jax.default_backend()
        default = "float32" if backend == "cpu" else "bfloat16"
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "cache_dtype", self.cache_dtype or default)

    def prepare(self, params: dict) -> dict:
        """The parameters with the decoder's layers apart, in the activations' dtype and layout."""
        decoder = params["decoder"]
        layers = [
            self._prepare_layer(jax.tree.map(lambda x, i=i: x[i], decoder["layers"]))
            for i in range(self.config.num_decoder_layers)
        ]
        weights = params | {"decoder": decoder | {"layers": layers}}
        if not self.config.tied_logits:
            weights["logits"] = self._in_blocks(params["logits"])
        return weights

    def _prepare_layer(self, layer: dict) -> dict:
        """One layer with the products that share an input joined into one."""
        c = self.config
        layer = jax.tree.map(lambda x: x.astype(c.dtype), layer)
        own, cross, mlp = layer["self_attention"], layer["cross_attention"], layer["mlp"]

        def joined(*kernels: Array) -> Array:
            matrices = [kernel.reshape(c.d_model, -1) for kernel in kernels]
            return self._in_blocks(jnp.concatenate(matrices, axis=1))

        def out(kernel: Array) -> Array:
            return self._in_blocks(kernel.reshape(-1, c.d_model))

        gate = (mlp["wi_1"],) if c.activation == GATED_GELU else ()
        return {
            "self_attention_norm": layer["self_attention_norm"],
            "qkv": joined(own["query"], own["key"], own["value"]),
            "self_out": out(own["out"]),
            "cross_attention_norm": layer["cross_attention_norm"],
            "cross_query": joined(cross["query"]),
            "cross_key": cross["key"],
            "cross_value": cross["value"],
            "cross_out": out(cross["out"]),
            "mlp_norm": layer["mlp_norm"],
            "wi": joined(mlp["wi_0"], *gate),
            "wo": out(mlp["wo"]),
        }

    def _in_blocks(self, kernel: Array) -> Array:
        """[D, F] -> [C, D, F / C], F filled up with zeros."""
        D, F = kernel.shape
        block = CPU_BLOCK if self.backend == "cpu" else F
        kernel = jnp.pad(kernel, ((0, 0), (0, -F % block)))
        return kernel.reshape(D, -1, block).swapaxes(0, 1)

    def prefill(self, weights: dict, inputs: Array, num_beams: int = 1) -> Memory:
        """Encode inputs [B, S], 0 being padding, and take each layer's keys and values of it."""
        encoded = self._encode(weights, inputs)
        G = self.config.num_heads // self.config.num_kv_heads_cross
        block = self._key_block(G * num_beams) or inputs.shape[1]
        fill = -inputs.shape[1] % block  # up to whole blocks, as more padding
        encoded = jnp.pad(encoded, ((0, 0), (0, fill), (0, 0)))
        mask = as_bias(jnp.pad(inputs, ((0, 0), (0, fill))) > 0)[:, None, None, :]

        def kv(layer: dict) -> KV:
            k = jnp.einsum("BSD,DKH->BKHS", encoded, layer["cross_key"])
            v = jnp.einsum("BSD,DKH->BKSH", encoded, layer["cross_value"])
            B, K, H, S = k.shape
            k, v = k.reshape(B * K, H, S), v.reshape(B * K, S, H)
            if block < S:
                k = k.reshape(B * K, H, -1, block).swapaxes(1, 2)
                v = v.reshape(B * K, -1, block, H)
            return k.astype(self.cache_dtype), v.astype(self.cache_dtype)

        return Memory([kv(layer) for layer in weights["decoder"]["layers"]], mask)

    def _encode(self, weights: dict, inputs: Array) -> Array:
        """Encoder output [B, S, D], on a CPU of as many examples at a time as its cache is for."""
        c, (B, S) = self.config, inputs.shape

        def encode(inputs: Array) -> Array:
            x = weights["embedding"][inputs].astype(c.dtype)
            real = (inputs > 0).astype(jnp.int32)
            segments = Segments(real, real, packed=False)
            return Encoder(c).apply({"params": weights["encoder"]}, x, segments, False)

        fit = CPU_LOGITS // (c.num_heads * S * S) if self.backend == "cpu" else B
        rows = next(n for n in range(min(max(fit, 1), B), 0, -1) if B % n == 0)
        if rows == B:
            return encode(inputs)
        return jax.lax.map(encode, inputs.reshape(-1, rows, S)).reshape(B, S, c.d_model)

    def _key_block(self, rows: int) -> int:
        """Positions of a block of keys that `rows` query rows read at once; 0 is all of them."""
        return CPU_BLOCK if self.backend == "cpu" and rows > 1 else 0

    def init_cache(self, batch_size: int, num_beams: int, length: int) -> list[KV]:
        """Zero self-attention keys and values of B * R rows, a pair a layer.

        There is room for `length` positions, and up to a block's more.
        """
        c = self.config
        K, H = c.num_kv_heads_decoder, c.head_dim
        block = self._key_block(c.num_heads // K) or length
        C = -(-length // block)
        rows = batch_size * num_beams * K

        def zeros(*shape: int) -> Array:
            return jnp.zeros(shape, self.cache_dtype)

        lead = (rows, C) if C > 1 else (rows,)
        return [
            (zeros(*lead, H, block), zeros(*lead, block, H)) for _ in range(c.num_decoder_layers)
        ]

    def grow(self, cache: list[KV], length: int) -> list[KV]:
        """The cache with room for `length` positions."""
        rows = len(cache[0][0]) // self.config.num_kv_heads_decoder

        def copy(new: Array, old: Array) -> Array:
            if old.ndim < new.ndim:
                old = old[:, None]  # one block of what become several
            return jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)

        return jax.tree.map(copy, self.init_cache(rows, 1, length), cache)

    def step(
        self, weights: dict, tokens: Array, index: Array, cache: list[KV], memory: Memory
    ) -> tuple[Array, list[KV]]:
        """Logits [B, R, V] after tokens [B, R] at position `index`, and the cache with it.

        Row b * R + r of the cache belongs to tokens[b, r].
        """
        c, decoder = self.config, weights["decoder"]
        length = room(cache)
        bias = RelativePositionBias(c.num_heads, c.num_buckets, c.max_distance, False).apply(
            {"params": decoder["position_bias"]}, index, length, method="row"
        )
        bias += as_bias(jnp.arange(length) <= index)[None, None, None]
        x = weights["embedding"][tokens].astype(c.dtype)
        new_cache = []
        for layer, kv, memory_kv in zip(decoder["layers"], cache, memory.kv, strict=True):
            y, kv = self._self_attend(layer, x, index, kv, bias)
            new_cache.append(kv)
            x += y
            x += self._cross_attend(layer, x, memory_kv, memory.mask)
            x += self._mlp(layer, x)
        x = self._norm(decoder["norm"], x).astype(jnp.float32)
        if c.tied_logits:
            x *= c.d_model**-0.5
            # The embedding lies as [V, D]: its rows come first, so that they are read in order.
            return jnp.einsum("VD,BRD->VBR", weights["embedding"], x).transpose(1, 2, 0), new_cache
        return project(x, weights["logits"], c.vocab_size), new_cache

    def _self_attend(self, layer: dict, x: Array, index: Array, cache: KV, bias: Array):
        c = self.config
        (B, R, _), N, K, H = x.shape, c.num_heads, c.num_kv_heads_decoder, c.head_dim
        x = self._norm(layer["self_attention_norm"], x).reshape(B * R, 1, -1)
        heads = project(x, layer["qkv"], (N + 2 * K) * H).reshape(B * R, N + 2 * K, H)
        q, k, v = jnp.split(heads, (N, N + K), axis=1)
        k, v = _put(cache, k.reshape(-1, H), v.reshape(-1, H), index)
        out = attend_blocks(q[:, None], k, v, bias).reshape(B, R, N * H)
        return project(out.astype(c.dtype), layer["self_out"], c.d_model), (k, v)

    def _cross_attend(self, layer: dict, x: Array, memory: KV, mask: Array) -> Array:
        c = self.config
        (B, R, _), N, H = x.shape, c.num_heads, c.head_dim
        x = self._norm(layer["cross_attention_norm"], x)
        q = project(x, layer["cross_query"], N * H).reshape(B, R, N, H)
        out = attend_blocks(q, *memory, mask).reshape(B, R, N * H)
        return project(out.astype(c.dtype), layer["cross_out"], c.d_model)

    def _mlp(self, layer: dict, x: Array) -> Array:
        c = self.config
        gated = c.activation == GATED_GELU
        hidden = project(self._norm(layer["mlp_norm"], x), layer["wi"], c.d_ff * (1 + gated))
        if gated:
            hidden, gate = jnp.split(hidden, 2, axis=-1)
            hidden = jax.nn.gelu(hidden) * gate
        else:
            hidden = jax.nn.relu(hidden)
        return project(hidden, layer["wo"], c.d_model)

    def _norm(self, params: dict, x: Array) -> Array:
        return RMSNorm(jnp.dtype(self.config.dtype)).apply({"params": params}, x)


def room(cache: list[KV]) -> int:
    """Positions that a cache holds."""
    _, *blocks, _ = cache[0][1].shape
    return math.prod(blocks)


def _put(cache: KV, k: Array, v: Array, index: Array) -> KV:
    """The cache with keys and values [B * R * K, H] at position `index`."""
    block = cache[0].shape[-1]
    k, v, at = k[:, :, None], v[:, None], (index % block,)
    lead = (0,)
    if cache[0].ndim == 4:
        k, v, lead = k[:, None], v[:, None], (0, index // block)
    return (
        jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (*lead, 0, *at)),
        jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (*lead, *at, 0)),
    )


def project(x: Array, kernel: Array, width: int) -> Array:
    """x [..., D] times a kernel in blocks [C, D, F / C], the first columns: [..., width]."""
    C, D, block = kernel.shape
    rows = jnp.broadcast_to(x.reshape(1, -1, D), (C, x.size // D, D))
    out = jnp.einsum("CMD,CDF->CMF", rows, kernel)
    return out.swapaxes(0, 1).reshape(*x.shape[:-1], C * block)[..., :width]
