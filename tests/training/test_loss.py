"""Test token losses against their definitions, and that padding does not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.training.loss import cross_entropy, kl_divergence


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


def test_divergence_is_from_the_teacher_and_of_the_real_tokens_alone(logits):
    """Position by position, in float64: sum over the vocabulary of p log(p / q)."""
    teacher = jax.random.normal(jax.random.key(1), logits.shape) * 2
    expected = 0.0
    for row, column in zip(*np.nonzero(TARGETS), strict=True):
        p, q = (np.exp(np.float64(x[row, column])) for x in (teacher, logits))
        p, q = p / p.sum(), q / q.sum()
        expected += (p * np.log(p / q)).sum()
    np.testing.assert_allclose(kl_divergence(teacher, logits, TARGETS), expected, rtol=1e-5)
    backward = kl_divergence(logits, teacher, TARGETS)
    assert abs(backward - expected) > 0.1  # the other direction is another number
    assert kl_divergence(logits, logits + 7, TARGETS) == pytest.approx(0, abs=1e-5)


def test_divergence_of_padding_alone_is_zero(logits):
    assert kl_divergence(logits, -logits, jnp.zeros_like(TARGETS)) == 0


def test_divergence_is_computed_in_float32(logits):
    narrow, other = logits.astype(jnp.bfloat16), (logits / 2).astype(jnp.bfloat16)
    expected = kl_divergence(narrow.astype(jnp.float32), other.astype(jnp.float32), TARGETS)
    np.testing.assert_array_equal(kl_divergence(narrow, other, TARGETS), expected)


def test_the_first_token_of_the_vocabulary_is_padding_even_if_it_is_likely(logits):
    """An accuracy counts a target that is the most likely token, and no position of padding."""
    likely = 20 * jax.nn.one_hot(TARGETS, logits.shape[-1])
    sums = cross_entropy(likely, TARGETS)
    assert (sums["correct"], sums["tokens"]) == (6, 6)
    assert cross_entropy(-likely, TARGETS)["correct"] == 0
