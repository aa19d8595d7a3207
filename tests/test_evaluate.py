"""Predictions are the decoder's, complete and in order; losses are what their names say."""

import jax.numpy as jnp
import numpy as np
import pytest

from gqa import data, evaluate, sharding, train
from gqa.model import init_params

TRAIN = [(np.array([5]), np.array([7, 7, 8])), (np.array([6]), np.array([7]))]
SHAPE = {"inputs_length": 6, "targets_length": 4, "batch_size": 2}


class Spell:
    """A tokenizer that spells ids out, so that a prediction can be read."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return [(rng.integers(3, 32, n), rng.integers(3, 32, 2)) for n in (3, 5, 2)]


def test_predictions_are_complete_and_in_order(tiny, pairs):
    params = init_params(tiny, 1)
    batches = data.evaluation(pairs, **SHAPE)
    mesh = sharding.make_mesh()
    texts = evaluate.predict(params, tiny, batches, 4, Spell(), mesh)
    generate = evaluate.make_generate(tiny, 4)
    for (inputs, _), text in zip(pairs, texts, strict=True):
        row = np.zeros((1, 6), np.int32)
        row[0, : len(inputs) + 1] = [*inputs, 1]
        assert text == Spell().decode(np.asarray(generate(params, jnp.array(row)))[0])


def test_losses_swap_inputs_and_know_the_baseline(tiny, pairs):
    mesh = sharding.make_mesh()
    validation = train.make_validation(tiny, mesh)
    params = init_params(tiny, 1)
    found = evaluate.losses(validation, params, pairs, TRAIN, **SHAPE)
    own = validation(params, data.evaluation(pairs, **SHAPE))
    shifted = [(pairs[i][0], pairs[j][1]) for i, j in ((2, 0), (0, 1), (1, 2))]
    other = validation(params, data.evaluation(shifted, **SHAPE))
    assert found["test_loss"] == own
    assert found["test_loss_other_input"] == pytest.approx(other, rel=1e-6)
    assert own != pytest.approx(other, rel=1e-6)


def test_unigram_loss_counts_every_token_and_the_end():
    # Training tokens 7 7 8 1 and 7 1, one added for each of the ids 0..8: 15 in all.
    expected = -(np.log(4 / 15) + np.log(3 / 15)) / 2
    targets = [pair[1] for pair in TRAIN]
    assert evaluate.unigram_loss(targets, [np.array([7])], 4) == pytest.approx(expected)
    # A target of 4 or more tokens is cut to leave room for its end.
    long = [np.array([7, 7, 7, 7, 7])]
    expected = -(3 * np.log(4 / 15) + np.log(3 / 15)) / 4
    assert evaluate.unigram_loss(targets, long, 4) == pytest.approx(expected)
