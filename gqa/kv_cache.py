"""The size of the decoder's KV cache, the quantity that grouped-query attention divides."""

import jax.numpy as jnp

from gqa.model import Config


def kv_cache_bytes(
    config: Config, batch_size: int, inputs_length: int, targets_length: int, dtype: str = ""
) -> int:
    """Bytes of keys and values that a decoder holds for `batch_size` sequences.

    Self-attention keeps `targets_length` positions, cross-attention `inputs_length`; both keep a
    key and a value of H numbers a KV head and layer. `dtype` defaults to the config's activations.
    """
    positions = (
        config.num_kv_heads_decoder * targets_length + config.num_kv_heads_cross * inputs_length
    )
    numbers = 2 * batch_size * config.num_decoder_layers * positions * config.head_dim
    return numbers * jnp.dtype(dtype or config.dtype).itemsize
