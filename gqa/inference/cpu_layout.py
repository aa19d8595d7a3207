"""Weights and caches as one CPU reads them fastest: products joined, and all in blocks.

    keys     [B * K, C, H, S / C]   C blocks of positions, so that a product with a few query rows
    values   [B * K, C, S / C, H]   reads memory in order; without C where it is 1
    weights  [C, D, F / C]          C blocks of columns, for the same reason

An axis of length 1 would make XLA:CPU copy a cache: it drops it for a product but not for what is
kept.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from gqa.model.config import Config
from gqa.model.cpu_attention import blocked_attention
from gqa.model.layers import GATED_GELU

KV = tuple[Array, Array]

# Columns of a block: XLA's products of few rows by a wide matrix pack or transpose the matrix
# first. A single row (MHA without beams) is a matrix times a vector and needs no blocks.
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Joined:
    """How a network of `config` is laid out; the methods are pure functions."""

    config: Config

    def prepare_layer(self, layer: dict) -> dict:
        """One decoder layer with the products that share an input joined into one."""
        c = self.config
        own, cross, mlp = layer["self_attention"], layer["cross_attention"], layer["mlp"]

        def joined(*kernels: Array) -> Array:
            return in_blocks(jnp.concatenate([x.reshape(c.d_model, -1) for x in kernels], axis=1))

        def out(kernel: Array) -> Array:
            return in_blocks(kernel.reshape(-1, c.d_model))

        gate = (mlp["wi_1"],) if c.activation == GATED_GELU else ()
        return {
            "qkv": joined(own["query"], own["key"], own["value"]),
            "self_out": out(own["out"]),
            "cross_query": joined(cross["query"]),
            "cross_key": cross["key"],
            "cross_value": cross["value"],
            "cross_out": out(cross["out"]),
            "wi": joined(mlp["wi_0"], *gate),
            "wo": out(mlp["wo"]),
        }

    def prepare_logits(self, kernel: Array) -> Array:
        """[D, V] -> [C, D, V / C], V filled up with zeros."""
        return in_blocks(kernel)

    def fill(self, length: int, rows: int) -> int:
        """Positions that `rows` query rows have their keys filled up with, to whole blocks."""
        return -length % self._block(length, rows)

    def memory(self, layer: dict, encoded: Array, rows: int) -> KV:
        """Keys and values of encoded [B, S, D], for `rows` query rows at once."""
        k = jnp.einsum("BSD,DKH->BKHS", encoded, layer["cross_key"])
        v = jnp.einsum("BSD,DKH->BKSH", encoded, layer["cross_value"])
        B, K, H, S = k.shape
        k, v, block = k.reshape(B * K, H, S), v.reshape(B * K, S, H), self._block(S, rows)
        if block < S:
            k = k.reshape(B * K, H, -1, block).swapaxes(1, 2)
            v = v.reshape(B * K, -1, block, H)
        return k, v

    def cache(self, rows: int, length: int, dtype: str) -> KV:
        """Zeros for `length` positions of so many rows of the batch, or up to a block more."""
        c = self.config
        K, H = c.num_kv_heads_self_attention, c.head_dim
        block = self._block(length, c.num_heads // K)
        C = -(-length // block)
        lead = (rows * K, C) if C > 1 else (rows * K,)
        return jnp.zeros((*lead, H, block), dtype), jnp.zeros((*lead, block, H), dtype)

    def _block(self, length: int, rows: int) -> int:
        """Positions of a block of keys that `rows` query rows read at once."""
        return BLOCK if rows > 1 else length

    def rows(self, cache: KV) -> int:
        """Rows of the batch that a cache is of."""
        return len(cache[0]) // self.config.num_kv_heads_self_attention

    def room(self, cache: KV) -> int:
        """Positions that a cache holds."""
        _, *blocks, _ = cache[1].shape
        return math.prod(blocks)

    def grown(self, old: Array, new: Array) -> Array:
        """`new`, zeros with room for more positions, with what is in `old`."""
        if old.ndim < new.ndim:
            old = old[:, None]  # one block of what become several
        return jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)

    def own_heads(self, layer: dict, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values [B, R, heads, H] of x [B, R, D]."""
        c = self.config
        N, K, H = c.num_heads, c.num_kv_heads_self_attention, c.head_dim
        heads = project(x, layer["qkv"], (N + 2 * K) * H).reshape(*x.shape[:2], N + 2 * K, H)
        return tuple(jnp.split(heads, (N, N + K), axis=2))

    def cross_heads(self, layer: dict, x: Array) -> Array:
        """Queries [B, R, N, H] of x [B, R, D]."""
        N, H = self.config.num_heads, self.config.head_dim
        return project(x, layer["cross_query"], N * H).reshape(*x.shape[:2], N, H)

    def out(self, kernel: Array, x: Array) -> Array:
        """[B, R, N, H] -> [B, R, D]."""
        return project(x.reshape(*x.shape[:2], -1), kernel, self.config.d_model)

    def put(self, cache: KV, k: Array, v: Array, index: Array) -> KV:
        """The cache with keys and values [B, R, K, H] at position `index`."""
        block = cache[0].shape[-1]
        k, v = (x.reshape(-1, x.shape[-1]).astype(cache[0].dtype) for x in (k, v))
        k, v, at = k[:, :, None], v[:, None], (index % block,)
        lead = (0,)
        if cache[0].ndim == 4:
            k, v, lead = k[:, None], v[:, None], (0, index // block)
        return (
            jax.lax.dynamic_update_slice(cache[0], k, (*lead, 0, *at)),
            jax.lax.dynamic_update_slice(cache[1], v, (*lead, *at, 0)),
        )

    def attend_own(self, q: Array, kv: KV, bias: Array) -> Array:
        """q [B, R, N, H] to the cache of B * R rows, bias [1, N, 1, S]: [B, R, N, H]."""
        B, R, N, H = q.shape
        return blocked_attention(q.reshape(B * R, 1, N, H), *kv, bias).reshape(q.shape)

    def attend_cross(self, q: Array, kv: KV, mask: Array) -> Array:
        """q [B, R, N, H] to keys and values of B inputs, mask [B, 1, 1, S]: [B, R, N, H]."""
        return blocked_attention(q, *kv, mask)

    def mlp(self, layer: dict, x: Array) -> Array:
        """[B, R, D] -> [B, R, D]."""
        c = self.config
        gated = c.activation == GATED_GELU
        hidden = project(x, layer["wi"], c.d_ff * (1 + gated))
        if gated:
            hidden, gate = jnp.split(hidden, 2, axis=-1)
            hidden = jax.nn.gelu(hidden) * gate
        else:
            hidden = jax.nn.relu(hidden)
        return project(hidden, layer["wo"], c.d_model)

    def logits(self, x: Array, kernel: Array) -> Array:
        """[B, R, D] -> [B, R, V]."""
        return project(x, kernel, self.config.vocab_size)


def in_blocks(kernel: Array) -> Array:
    """[D, F] -> [C, D, F / C], F filled up with zeros."""
    D, F = kernel.shape
    kernel = jnp.pad(kernel, ((0, 0), (0, -F % BLOCK)))
    return kernel.reshape(D, -1, BLOCK).swapaxes(0, 1)


def project(x: Array, kernel: Array, width: int) -> Array:
    """x [..., D] times a kernel in blocks [C, D, F / C], the first columns: [..., width]."""
    C, D, block = kernel.shape
    rows = jnp.broadcast_to(x.reshape(1, -1, D), (C, x.size // D, D))
    out = jnp.einsum("CMD,CDF->CMF", rows, kernel)
    return out.swapaxes(0, 1).reshape(*x.shape[:-1], C * block)[..., :width]
