"""The layout of weights and caches that one CPU reads fastest.

    keys     [B * K, C, H, S / C]   C blocks of positions, so that a product with a few query rows
    values   [B * K, C, S / C, H]   reads memory in order; the axis C is left out where C is 1
    weights  [C, D, F / C]          C blocks of columns, so that a product with a few rows of x
                                    reads memory in order

Products that share their input (queries, keys and values; the MLP's two halves) are one product.

An axis of length 1 is left out, because XLA:CPU drops a unit axis inside the matrix product but
keeps it in the stored cache, so it copies the cache.

`layout.py` documents the methods. `accelerator_layout.py` is the other implementation.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqa.inference.layout import KeysValues
from gqa.model import activations
from gqa.model.config import Config
from gqa.model.cpu_attention import blocked_attention

# Columns of a block. XLA:CPU packs or transposes a wide matrix before it multiplies a few rows by
# the matrix, but it reads blocks of this width directly. A single row (multi-head attention without
# beams) makes a product of a matrix and a vector, which needs no blocks.
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class CpuLayout:
    """A `DecoderLayout` of concatenated kernels and blocked caches, for a single CPU device."""

    config: Config

    def prepare_layer(self, params: dict) -> dict:
        c = self.config
        self_attention, cross_attention = params["self_attention"], params["cross_attention"]
        mlp = params["mlp"]

        def concatenate(*kernels: Array) -> Array:
            return in_blocks(jnp.concatenate([x.reshape(c.d_model, -1) for x in kernels], axis=1))

        def output(kernel: Array) -> Array:
            return in_blocks(kernel.reshape(-1, c.d_model))

        # The kernels of cross-attention's keys and values stay as they are. Prefill multiplies many
        # rows by them, and blocks help products with few rows.
        gate = (mlp["wi_1"],) if c.is_gated else ()
        return {
            "qkv": concatenate(*(self_attention[kind] for kind in ("query", "key", "value"))),
            "self_out": output(self_attention["out"]),
            "cross_query": concatenate(cross_attention["query"]),
            "cross_key": cross_attention["key"],
            "cross_value": cross_attention["value"],
            "cross_out": output(cross_attention["out"]),
            "wi": concatenate(mlp["wi_0"], *gate),
            "wo": output(mlp["wo"]),
        }

    def prepare_logits(self, kernel: Float[Array, "D V"]) -> Array:
        return in_blocks(kernel)

    def padding(self, length: int, num_query_rows: int) -> int:
        return -length % self._block(length, num_query_rows)

    def cross_attention_cache(
        self, weights: dict, encoded: Float[Array, "B S D"], num_query_rows: int
    ) -> KeysValues:
        k = jnp.einsum("BSD,DKH->BKHS", encoded, weights["cross_key"])
        v = jnp.einsum("BSD,DKH->BKSH", encoded, weights["cross_value"])
        B, K, H, S = k.shape
        k, v = k.reshape(B * K, H, S), v.reshape(B * K, S, H)

        block = self._block(S, num_query_rows)
        if block < S:
            k = k.reshape(B * K, H, -1, block).swapaxes(1, 2)
            v = v.reshape(B * K, -1, block, H)
        return k, v

    def empty_cache(self, num_rows: int, length: int, dtype: str) -> KeysValues:
        c = self.config
        K, H = c.layer_kv_heads("self_attention"), c.head_dim
        block = self._block(length, c.num_heads // K)
        C = -(-length // block)
        lead = (num_rows * K, C) if C > 1 else (num_rows * K,)
        return jnp.zeros((*lead, H, block), dtype), jnp.zeros((*lead, block, H), dtype)

    def _block(self, length: int, num_query_rows: int) -> int:
        """Return the number of positions in a block that `num_query_rows` rows read in one product.

        Example: with N = 16 and K = 4, each KV head has 4 query rows, so blocks have 64 positions.
        With K = 16 there is one row, and all positions are one block.
        """
        return BLOCK if num_query_rows > 1 else length

    def num_rows(self, cache: KeysValues) -> int:
        return len(cache[0]) // self.config.layer_kv_heads("self_attention")

    def capacity(self, cache: KeysValues) -> int:
        # Values are [rows, S, H], or [rows, C, S / C, H] in C blocks.
        _, *blocks, _ = cache[1].shape
        return math.prod(blocks)

    def grow(self, old: Array, empty: Array) -> Array:
        if old.ndim < empty.ndim:
            old = old[:, None]  # a cache of one block becomes a cache of several
        return jax.lax.dynamic_update_slice(empty, old, (0,) * old.ndim)

    def update_cache(
        self,
        cache: KeysValues,
        k: Float[Array, "B R K H"],
        v: Float[Array, "B R K H"],
        index: Int[Array, ""] | int,
    ) -> KeysValues:
        # Position `index` is position index % block of block index // block. Each write is one
        # slice of B * R * K rows.
        block = cache[0].shape[-1]
        k, v = (x.reshape(-1, x.shape[-1]).astype(cache[0].dtype) for x in (k, v))
        k, v, offset = k[:, :, None], v[:, None], index % block

        lead: tuple = (0,)
        if cache[0].ndim == 4:
            k, v, lead = k[:, None], v[:, None], (0, index // block)
        return (
            jax.lax.dynamic_update_slice(cache[0], k, (*lead, 0, offset)),
            jax.lax.dynamic_update_slice(cache[1], v, (*lead, offset, 0)),
        )

    def self_attention_heads(
        self, weights: dict, x: Float[Array, "B R D"]
    ) -> tuple[Float[Array, "B R N H"], Float[Array, "B R K H"], Float[Array, "B R K H"]]:
        # One product with the kernels of queries, keys and values side by side.
        c = self.config
        N, K, H = c.num_heads, c.layer_kv_heads("self_attention"), c.head_dim
        heads = project(x, weights["qkv"], (N + 2 * K) * H).reshape(*x.shape[:2], N + 2 * K, H)
        q, k, v = jnp.split(heads, (N, N + K), axis=2)
        return q, k, v

    def cross_attention_queries(
        self, weights: dict, x: Float[Array, "B R D"]
    ) -> Float[Array, "B R N H"]:
        N, H = self.config.num_heads, self.config.head_dim
        return project(x, weights["cross_query"], N * H).reshape(*x.shape[:2], N, H)

    def self_attention(
        self, q: Float[Array, "B R N H"], cache: KeysValues, bias: Float[Array, "1 N 1 S"]
    ) -> Float[Array, "B R N H"]:
        # Beams have caches of their own here, so each beam is a row of the batch with one query.
        B, R, N, H = q.shape
        return blocked_attention(q.reshape(B * R, 1, N, H), *cache, bias).reshape(q.shape)

    def cross_attention(
        self, q: Float[Array, "B R N H"], cache: KeysValues, mask: Float[Array, "B 1 1 S"]
    ) -> Float[Array, "B R N H"]:
        # Beams share the keys of their example, so they are R queries of one row of the batch.
        return blocked_attention(q, *cache, mask)

    def project_out(self, kernel: Array, x: Float[Array, "B R N H"]) -> Float[Array, "B R D"]:
        return project(x.reshape(*x.shape[:2], -1), kernel, self.config.d_model)

    def mlp(self, weights: dict, x: Float[Array, "B R D"]) -> Float[Array, "B R D"]:
        c = self.config
        activation = activations.function(c.activation)
        hidden = project(x, weights["wi"], c.d_ff * (1 + c.is_gated))
        if c.is_gated:
            hidden, gate = jnp.split(hidden, 2, axis=-1)
            hidden = activation(hidden) * gate
        else:
            hidden = activation(hidden)
        return project(hidden, weights["wo"], c.d_model)

    def logits(self, x: Float[Array, "B R D"], kernel: Array) -> Float[Array, "B R V"]:
        return project(x, kernel, self.config.vocab_size)


def in_blocks(kernel: Float[Array, "D F"]) -> Float[Array, "C D block"]:
    """Cut a kernel into C = ceil(F / BLOCK) blocks of columns; zeros fill the last block."""
    D, F = kernel.shape
    kernel = jnp.pad(kernel, ((0, 0), (0, -F % BLOCK)))
    return kernel.reshape(D, -1, BLOCK).swapaxes(0, 1)


def project(
    x: Float[Array, "*rows D"], kernel: Float[Array, "C D block"], width: int
) -> Float[Array, "*rows {width}"]:
    """Multiply x by a kernel that `in_blocks` cut, and drop the columns of zeros behind `width`."""
    C, D, block = kernel.shape
    rows = jnp.broadcast_to(x.reshape(1, -1, D), (C, x.size // D, D))
    out = jnp.einsum("CMD,CDF->CMF", rows, kernel)
    return out.swapaxes(0, 1).reshape(*x.shape[:-1], C * block)[..., :width]
