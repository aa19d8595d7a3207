"""Activation functions of the MLP, by name.

A name of `FUNCTIONS` stands for the MLP f(x wi_0) wo. With `GATED` before it, it stands for the
gated MLP (f(x wi_0) * (x wi_1)) wo (Shazeer, 2020, "GLU Variants Improve Transformer"). T5 1.0 has
"relu", T5 1.1 has "gated_gelu", UL2 has "gated_silu".
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

GATED = "gated_"
GATED_GELU, RELU = "gated_gelu", "relu"  # of T5 1.1 and of T5 1.0


def gelu_clipped(x: Array) -> Array:
    """Return the exact GELU, clipped to [-10, 10]."""
    return jnp.clip(jax.nn.gelu(x, approximate=False), -10, 10)


def laplace(x: Array) -> Array:
    """Return a normal distribution's CDF near the squared ReLU (Ma et al., 2022, Mega, eq. 17)."""
    mean, deviation = 0.707107, 0.282095
    return 0.5 * (1 + jax.lax.erf((x - mean) / (deviation * 2**0.5)))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    # GELU by its tanh approximation, which is what T5 1.1 was trained with.
    "gelu": jax.nn.gelu,
    "gelu_clipped": gelu_clipped,
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "hard_swish": jax.nn.hard_swish,
    "laplace": laplace,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrt_softplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "tanh": jnp.tanh,
}


def is_gated(activation: str) -> bool:
    """Return whether the MLP has a second input kernel, wi_1."""
    return activation.startswith(GATED)


def function(activation: str) -> Callable[[Array], Array]:
    """Return the function of an activation, gated or not.

    Raises:
        KeyError: if there is none of this name.
    """
    return FUNCTIONS[activation.removeprefix(GATED)]
