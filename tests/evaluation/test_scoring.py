"""Predictions are each text's own, complete and in order; losses are what their names say."""

import numpy as np
import pytest

from gqa.data import batching
from gqa.evaluation import scoring
from gqa.inference.decoding import Sample
from gqa.inference.generator import Generator
from gqa.inference.step import Inference
from gqa.model.special_tokens import T5_TOKENS
from gqa.model.transformer import init_params
from gqa.runtime.mesh import make_mesh
from gqa.training import training_step

TRAIN = [(np.array([5]), np.array([7, 7, 8])), (np.array([6]), np.array([7]))]
SHAPE = {"inputs_length": 6, "targets_length": 4, "batch_size": 2}


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return [(rng.integers(3, 32, n), rng.integers(3, 32, 2)) for n in (3, 5, 2)]


def test_predictions_are_complete_in_order_and_each_texts_own(tiny, random_params):
    """Whatever their lengths, and whichever share a batch; a long text is cut."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 32, n) for n in (70, 3, 0, 66, 5, 2, 90)]
    generator = Generator(Inference(tiny), Sample(seed=1), 4)
    weights = generator.prepare(random_params(tiny))
    found = scoring.predict(generator, weights, texts, inputs_length=80, batch_size=4)
    assert len(np.unique(found, axis=0)) > 4
    for number, (text, row) in enumerate(zip(texts, found, strict=True)):
        inputs = np.zeros((1, 80), np.int32)
        inputs[0, : len(text[:79]) + 1] = [*text[:79], 1]
        np.testing.assert_array_equal(generator(weights, inputs, np.array([number]))[0], row)


def test_inputs_are_no_wider_than_their_bucket(tiny):
    texts = [np.full(n, 5) for n in (200, 3, 100, 63, 64, 5)]
    seen = []

    class Wide:
        length, special = 1, T5_TOKENS

        def __call__(self, weights, inputs, numbers):
            seen.append((inputs.shape, numbers.tolist(), (inputs > 0).sum(1).tolist()))
            return numbers[:, None]

    found = scoring.predict(Wide(), {}, texts, inputs_length=150, batch_size=2)
    assert seen == [
        ((2, 64), [1, 5], [4, 6]),
        ((2, 128), [3, 4], [64, 65]),
        ((2, 150), [2, 0], [101, 150]),
    ]
    np.testing.assert_array_equal(found[:, 0], range(6))


def test_losses_swap_inputs_and_know_the_baseline(tiny, pairs):
    mesh = make_mesh()
    validation = training_step.make_validation(tiny, mesh)
    params = init_params(tiny, 1)
    found = scoring.losses(validation, params, pairs, TRAIN, **SHAPE)
    own = validation(params, batching.evaluation_batches(pairs, **SHAPE))
    shifted = [(pairs[i][0], pairs[j][1]) for i, j in ((2, 0), (0, 1), (1, 2))]
    other = validation(params, batching.evaluation_batches(shifted, **SHAPE))
    assert found["test_loss"] == own
    assert found["test_loss_other_input"] == pytest.approx(other, rel=1e-6)
    assert own != pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_no_other_input_is_no_margin(tiny, pairs, count):
    """With one input alone, swapping inputs would give the same loss: a margin of 0."""
    same = [(pairs[0][0], pairs[i][1]) for i in range(count)]
    found = scoring.losses(lambda params, batches: 2.5, {}, same, TRAIN, **SHAPE)
    assert found.keys() == {"test_loss", "test_loss_unigram"}


def test_packed_losses_are_those_of_a_row_each(tiny, pairs):
    validation = training_step.make_validation(tiny, make_mesh())
    params = init_params(tiny, 1)
    shape = SHAPE | {"inputs_length": 12, "targets_length": 8}
    alone = scoring.losses(validation, params, pairs, TRAIN, **shape)
    packed = scoring.losses(validation, params, pairs, TRAIN, **shape, pack=True)
    rows = [real for _, real in batching.evaluation_batches(pairs, **shape, pack=True)]
    assert sum(rows) < len(pairs)
    assert packed == pytest.approx(alone, rel=1e-5)


def test_unigram_loss_counts_every_token_and_the_end():
    # Training tokens 7 7 8 1 and 7 1, one added for each of the ids 0..8: 15 in all.
    expected = -(np.log(4 / 15) + np.log(3 / 15)) / 2
    targets = [pair[1] for pair in TRAIN]
    assert scoring.unigram_loss(targets, [np.array([7])], 4, 1) == pytest.approx(expected)
    # A target of 4 or more tokens is cut to leave room for its end.
    long = [np.array([7, 7, 7, 7, 7])]
    expected = -(3 * np.log(4 / 15) + np.log(3 / 15)) / 4
    assert scoring.unigram_loss(targets, long, 4, 1) == pytest.approx(expected)
