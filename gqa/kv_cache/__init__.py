"""Bytes of the decoder's KV cache, and the bytes and FLOPs of a decoding step.

`kv_cache_bytes` is a formula. `step` reads its numbers from the shapes of the arrays that
`gqa/inference/step.py` allocates. Both are about networks of this project. Decoders of others are
in `decoder.py` and read by `config_json.py`; the command `python -m gqa kv-cache` is in
`command.py`.
"""

from functools import partial
from typing import Any, NamedTuple

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
    """Return the bytes of keys and values that a decoder keeps for `batch_size` sequences.

    For each layer and KV head, self-attention keeps a key and a value of H numbers for each of
    `targets_length` positions, cross-attention for each of `inputs_length` positions.

    Args:
        dtype: of the cache; by default that of the config's activations.
    """
    # Sums over the decoder's layers.
    self_heads = sum(config.kv_heads("self_attention"))
    cross_heads = sum(config.kv_heads("cross_attention"))

    vectors = 2 * batch_size * (self_heads * targets_length + cross_heads * inputs_length)
    return vectors * config.head_dim * jnp.dtype(dtype or config.dtype).itemsize


class Step(NamedTuple):
    """The bytes read and the FLOPs computed to decode one token for each sequence of a batch.

    Attributes:
        weights: bytes of weights.
        cross_cache: bytes of the cross-attention cache.
        self_cache: bytes of the self-attention cache, as the mean over all tokens, because the
            cache grows with the text.
        flops: FLOPs of the products with weights.
    """

    weights: int
    cross_cache: int
    self_cache: float
    flops: float


def step(net: Inference, batch_size: int, inputs_length: int, targets_length: int) -> Step:
    """Return the bytes and FLOPs of a step of greedy decoding, from the shapes of its arrays.

    Args:
        net: the network, with the layout and the dtypes of its backend.
        inputs_length, targets_length: positions of the encoder and of the decoder.
    """
    inputs = jax.ShapeDtypeStruct((batch_size, inputs_length), jnp.int32)

    weights = weight_shapes(net)
    memory = jax.eval_shape(net.prefill, weights, inputs)

    # The capacity of the self-attention cache at each token, and the bytes of each capacity.
    capacities = [bucket(index + 1, targets_length) for index in range(targets_length)]
    cache_bytes = {
        capacity: nbytes(jax.eval_shape(partial(net.init_cache, batch_size, 1, capacity)))
        for capacity in set(capacities)
    }

    # Tied logits read the whole embedding. Otherwise a step looks up one row of it for each token.
    read = _read_by_step(net, weights)
    looked_up = batch_size * net.config.d_model * weights["embedding"].dtype.itemsize
    matrix_elements = sum(x.size for x in jax.tree.leaves(read) if x.ndim > 1)
    return Step(
        weights=nbytes(read) + (0 if net.config.tied_logits else looked_up),
        cross_cache=nbytes(memory.kv),
        self_cache=float(np.mean([cache_bytes[capacity] for capacity in capacities])),
        flops=2.0 * batch_size * matrix_elements,
    )


def weight_shapes(net: Inference) -> dict:
    """Return the shapes and dtypes of `net.prepare`'s result, without computing it."""
    return jax.eval_shape(lambda: net.prepare(init_params(net.config, 0)))


def _read_by_step(net: Inference, weights: dict) -> list:
    """Return the weights that a step multiplies with all its rows.

    The projections of cross-attention's keys and values are not among them, because only `prefill`
    needs them; nor are tables of which a step looks up a few rows.
    """
    prefill_only = ("cross_key", "cross_value")
    layers = [
        {name: x for name, x in layer.items() if name not in prefill_only}
        for layer in weights["decoder"]["layers"]
    ]

    # Tied logits use the embedding a second time, as the matrix of the last product.
    logits = weights["embedding" if net.config.tied_logits else "logits"]
    return [layers, weights["decoder"]["norm"], logits]


def nbytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree; shapes with dtypes do as well."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
