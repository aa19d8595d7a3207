"""The matrix product x @ kernel of the training network, with a hand-written gradient.

`linear` equals `jnp.matmul`, in value and gradient
(tests/model/test_linear.py::test_linear_has_the_values_and_gradients_of_a_product). Only the order
in which its gradient reads memory differs, which XLA:CPU would choose badly.
"""

import jax
from jaxtyping import Array, Float


@jax.custom_vjp
def linear(x: Float[Array, "*rows D"], kernel: Float[Array, "D F"]) -> Float[Array, "*rows F"]:
    """Return x times kernel.

    The gradients are products of arrays as they already lie in memory. Left alone, XLA:CPU fuses
    the computation of the output's gradient with a transpose of it, and that takes longer than the
    product itself.
    """
    return x @ kernel


def _linear_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _linear_backward(saved: tuple[Array, Array], dout: Array) -> tuple[Array, Array]:
    x, kernel = saved

    # Materialise the output's gradient once, so that neither product fuses a transpose of it.
    dout = jax.lax.optimization_barrier(dout)

    # dx = dout kernel', summed over F. dkernel = x' dout, summed over all rows of x.
    batch = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(dout, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    dkernel = jax.lax.dot_general(x, dout, ((batch, batch), ((), ())))
    return dx, dkernel


linear.defvjp(_linear_forward, _linear_backward)
