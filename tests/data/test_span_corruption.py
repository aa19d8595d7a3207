"""Span corruption: T5's lengths and noise, nothing of the text lost."""

import numpy as np
import pytest

from gqa.data import batching, span_corruption
from gqa.data.tokenizer import EOS
from gqa.runtime.errors import UserError
from tests.support.spans import restore

FIRST_SENTINEL = 32099
SENTINELS = np.arange(FIRST_SENTINEL, FIRST_SENTINEL - 100, -1)
LENGTH = 141  # raw tokens of an example whose inputs are 128 tokens long


def noise(inputs):
    """Where the sentinels stand in each row [B, length]: the noise, whatever the text."""
    return {tuple(np.flatnonzero(row > FIRST_SENTINEL - 100)) for row in np.asarray(inputs)}


@pytest.mark.parametrize(
    ("inputs_length", "lengths"),
    [(512, (568, 512, 114)), (256, (284, 256, 58)), (128, (141, 128, 29))],
)
def test_span_lengths_are_those_of_t5(inputs_length, lengths):
    assert span_corruption.span_lengths(inputs_length) == lengths
    tokens = np.arange(3, 3 + lengths[0])
    inputs, targets = span_corruption.corrupt(tokens, np.random.default_rng(0), SENTINELS)
    assert (len(inputs) + 1, len(targets) + 1) == lengths[1:]  # with EOS


def test_sentinels_count_down_and_stand_for_the_same_span_on_both_sides():
    tokens = np.arange(3, 571)
    inputs, targets = span_corruption.corrupt(tokens, np.random.default_rng(0), SENTINELS)
    expected = FIRST_SENTINEL - np.arange(28)
    np.testing.assert_array_equal(inputs[inputs > FIRST_SENTINEL - 100], expected)
    np.testing.assert_array_equal(targets[targets > FIRST_SENTINEL - 100], expected)
    assert inputs[0] == tokens[0]  # text first, noise last
    assert targets[0] == FIRST_SENTINEL
    assert inputs[-1] == FIRST_SENTINEL - 27


@pytest.mark.parametrize("length", [2, 3, 10, 47, 568, 1500])
def test_span_corruption_is_invertible(length):
    tokens = np.random.default_rng(length).integers(3, 32000, length)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        inputs, targets = span_corruption.corrupt(tokens, rng, SENTINELS)
        np.testing.assert_array_equal(restore(inputs, targets, FIRST_SENTINEL), tokens)


def test_every_token_is_noise_as_often_as_another():
    tokens = np.arange(3, 144)
    noisy = np.zeros(200)
    for seed in range(3000):
        _, targets = span_corruption.corrupt(tokens, np.random.default_rng(seed), SENTINELS)
        noisy[targets[(targets >= 3) & (targets < 144)]] += 1 / 3000
    inner = noisy[13:134]  # T5 puts text first and noise last, which shows at the ends
    assert noisy[3:144].mean() == pytest.approx(21 / 141)
    assert abs(inner - 0.15).max() < 0.05


def test_span_corruption_refuses_lengths_it_cannot_do():
    with pytest.raises(UserError, match="inputs_length=3 is too short"):
        span_corruption.span_lengths(3)
    with pytest.raises(UserError, match=r"=2147483647 needs more .* use at most 1809"):
        span_corruption.span_lengths(2**31 - 1)
    span_corruption.span_lengths(1809)
    with pytest.raises(UserError, match=r"inputs_length=1810 needs more sentinels than the 100"):
        span_corruption.span_lengths(1810)
    with pytest.raises(UserError, match="30 tokens, one example needs 47"):
        span_corruption.held_out_pairs(np.arange(30), inputs_length=43, sentinels=SENTINELS, seed=0)


def test_evaluation_noise_is_fixed_and_text_is_complete():
    tokens = np.arange(100, 100 + 47 * 5 + 20)
    options = {"inputs_length": 43, "sentinels": SENTINELS, "seed": 0}
    once, again = (
        span_corruption.held_out_pairs(tokens, **options),
        span_corruption.held_out_pairs(tokens, **options),
    )
    restored = [restore(*pair, FIRST_SENTINEL) for pair in once]
    np.testing.assert_array_equal(np.concatenate(restored), tokens[: 47 * 5])
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a[1], b[1])
    lengths = span_corruption.span_lengths(43)
    batches = batching.evaluation_batches(
        once, inputs_length=43, targets_length=lengths.targets, batch_size=5
    )
    batch, _ = next(batches)
    assert (batch["inputs"][:, -1] == EOS).all()  # nothing was cut, nothing is left over
    assert (batch["targets"][:, -1] == EOS).all()


def test_every_held_out_segment_has_noise_of_its_own():
    tokens = np.full(LENGTH * 20, 5)
    options = {"inputs_length": 128, "sentinels": SENTINELS}
    first, other = (span_corruption.held_out_pairs(tokens, **options, seed=seed) for seed in (0, 1))
    found, different = (noise([inputs for inputs, _ in pairs]) for pairs in (first, other))
    assert len(found) == 20
    assert not found & different


def test_held_out_examples_leave_the_end_to_the_batches():
    pairs = span_corruption.held_out_pairs(
        np.full(LENGTH * 2, 5), inputs_length=128, sentinels=SENTINELS, seed=0
    )
    for inputs, targets in pairs:
        assert (len(inputs), len(targets)) == (127, span_corruption.span_lengths(128).targets - 1)
        assert EOS not in inputs
        assert EOS not in targets
