"""Bytes of the decoder's KV cache, which grouped-query attention divides, and of a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gqa.inference.generator import bucket
from gqa.inference.step import Inference
from gqa.model.config import Config
from gqa.model.transformer import init_params


def kv_cache_bytes(
    config: Config, batch_size: int, inputs_length: int, targets_length: int, dtype: str = ""
) -> int:
    """Bytes of keys and values that a decoder holds for `batch_size` sequences.

    Self-attention keeps `targets_length` positions, cross-attention `inputs_length`; both keep a
    key and a value of H numbers a KV head and layer. `dtype` defaults to the config's activations.
    """
    own, cross = (sum(config.kv_heads(name)) for name in ("self_attention", "cross_attention"))
    numbers = 2 * batch_size * (own * targets_length + cross * inputs_length) * config.head_dim
    return numbers * jnp.dtype(dtype or config.dtype).itemsize


class Step(NamedTuple):
    """What decoding one token for a batch reads, in bytes, and its products with weights, in FLOPs.

    `self_cache` is the mean over all tokens, since the part of the cache that is read grows.
    """

    weights: int
    cross_cache: int
    self_cache: float
    flops: float


def step(net: Inference, batch_size: int, inputs_length: int, targets_length: int) -> Step:
    """The sizes of the arrays that `net.step` is given, as greedy decoding has them."""
    inputs = jax.ShapeDtypeStruct((batch_size, inputs_length), jnp.int32)
    weights = weight_shapes(net)
    memory = jax.eval_shape(net.prefill, weights, inputs)
    rooms = [bucket(index + 1, targets_length) for index in range(targets_length)]
    cache = {
        room: nbytes(jax.eval_shape(lambda room=room: net.init_cache(batch_size, 1, room)))
        for room in set(rooms)
    }
    read = _read_by_step(net, weights)
    rows = batch_size * net.config.d_model * weights["embedding"].dtype.itemsize
    products = sum(x.size for x in jax.tree.leaves(read) if x.ndim > 1)
    return Step(
        nbytes(read) + (0 if net.config.tied_logits else rows),
        nbytes(memory.kv),
        float(np.mean([cache[room] for room in rooms])),
        2.0 * batch_size * products,
    )


def weight_shapes(net: Inference) -> dict:
    """`net.prepare`'s result as shapes."""
    return jax.eval_shape(lambda: net.prepare(init_params(net.config, 0)))


def _read_by_step(net: Inference, weights: dict) -> list:
    """The weights that meet every row: not those that only `prefill` needs, nor look-ups."""
    of_prefill = ("cross_key", "cross_value")
    layers = [
        {name: x for name, x in layer.items() if name not in of_prefill}
        for layer in weights["decoder"]["layers"]
    ]
    logits = weights["embedding" if net.config.tied_logits else "logits"]
    return [layers, weights["decoder"]["norm"], logits]


def nbytes(tree) -> int:
    """Bytes of all arrays, or shapes, of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
