"""Random queries, keys, values and biases of small sizes, for the tests of attention."""

import jax.numpy as jnp
import numpy as np

B, T, S, N, H = 2, 5, 7, 4, 8


def random_qkv(K, N=N, T=T, S=S):
    """Draw q [B, T, N, H], k and v [B, S, K, H] from a normal distribution."""
    rng = np.random.default_rng(K)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def random_bias(*shape):
    """Draw an array of `shape` from a normal distribution."""
    return jnp.asarray(np.random.default_rng(9).normal(size=shape), jnp.float32)
