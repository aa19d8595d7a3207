"""Search over a step function; knows no model. Tokens are int32, 0 is padding and 1 ends a row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

EOS = 1

# (tokens [B], index, cache) -> logits [B, V] of the next token and the cache with this position.
Step = Callable[[Array, Array, Any], tuple[Array, Any]]


def greedy(step: Step, cache: Any, batch_size: int, length: int, stop: bool = True) -> Array:
    """The most likely token at each position, [batch_size, length]; rows are 0 after their EOS.

    Starts from token 0 and ends when every row has ended; with `stop=False` EOS is a token like
    others and all positions are filled, for timing.
    """

    def unfinished(carry):
        index, _, _, ended, _ = carry
        return (index < length) & ~ended.all()

    def advance(carry):
        index, last, cache, ended, tokens = carry
        logits, cache = step(last, index, cache)
        new = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if stop:
            new = jnp.where(ended, 0, new)
            ended |= new == EOS
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], index, axis=1)
        return index + 1, new, cache, ended, tokens

    carry = (
        jnp.int32(0),
        jnp.zeros(batch_size, jnp.int32),
        cache,
        jnp.zeros(batch_size, bool),
        jnp.zeros((batch_size, length), jnp.int32),
    )
    return jax.lax.while_loop(unfinished, advance, carry)[-1]
