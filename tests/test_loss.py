"""Token losses: against their definitions, and indifferent to padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.loss import cross_entropy


@pytest.fixture
def logits():
    return jax.random.normal(jax.random.key(0), (2, 5, 11)) * 3


TARGETS = jnp.array([[4, 2, 9, 1, 0], [3, 1, 0, 0, 0]])


def test_sums_are_those_of_the_real_tokens(logits):
    sums = cross_entropy(logits, TARGETS)
    log_p = jax.nn.log_softmax(logits)
    rows, columns = np.nonzero(TARGETS)
    real = log_p[rows, columns, TARGETS[rows, columns]]
    np.testing.assert_allclose(sums["nats"], -real.sum(), rtol=1e-6)
    assert sums["loss"] == sums["nats"]
    assert sums["tokens"] == 6
    best = logits.argmax(-1)[rows, columns] == TARGETS[rows, columns]
    assert sums["correct"] == best.sum()


def test_z_loss_is_the_squared_log_partition(logits):
    log_z = jax.nn.logsumexp(logits, axis=-1)[np.nonzero(TARGETS)]
    sums = cross_entropy(logits, TARGETS, z_loss=0.5)
    np.testing.assert_allclose(sums["loss"] - sums["nats"], 0.5 * (log_z**2).sum(), rtol=1e-5)


def test_gradient_is_that_of_log_softmax_and_zero_on_padding(logits):
    def reference(x):
        log_p = jnp.take_along_axis(jax.nn.log_softmax(x), TARGETS[..., None], -1)[..., 0]
        return -jnp.sum(log_p * (TARGETS > 0))

    grads = jax.grad(lambda x: cross_entropy(x, TARGETS)["loss"])(logits)
    np.testing.assert_allclose(grads, jax.grad(reference)(logits), atol=1e-6)
    assert not grads[1, 2:].any()
