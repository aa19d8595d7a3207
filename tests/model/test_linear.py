"""`linear` is a matrix product, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from gqa.model.linear import linear
from tests.support.random_arrays import random_bias


def test_linear_has_the_values_and_gradients_of_a_product():
    x, kernel, weights = random_bias(3, 4, 5), random_bias(5, 6), random_bias(3, 4, 6)
    values, expected = (
        jax.value_and_grad(lambda x, kernel, f=f: (f(x, kernel) * weights).sum(), (0, 1))(x, kernel)
        for f in (linear, jnp.matmul)
    )
    for one, other in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
