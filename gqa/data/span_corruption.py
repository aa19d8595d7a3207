"""T5's pretraining task: replace random spans of a text by sentinels and predict the spans.

Source: arXiv 1910.10683, section 3.1.4, and `preprocessors.py` of T5's code. This file works on one
segment of token ids at a time; `gqa.data.batching` makes training batches of the results.
"""

from typing import NamedTuple

import numpy as np

from gqa.data.examples import TokenPair
from gqa.data.tokenizer import NUM_SENTINELS
from gqa.runtime.errors import UserError

NOISE_DENSITY = 0.15  # share of the tokens that are replaced
MEAN_SPAN_LENGTH = 3.0  # tokens


class SpanLengths(NamedTuple):
    """Sizes of one example of span corruption, in tokens.

    `tokens` counts the raw text without EOS; `inputs` and `targets` include EOS.
    """

    tokens: int
    inputs: int
    targets: int


def span_lengths(inputs_length: int, num_sentinels: int = NUM_SENTINELS) -> SpanLengths:
    """Return the sizes for the longest raw text whose corrupted inputs fit `inputs_length`.

    For example, 512 gives (568, 512, 114), as in T5.

    Raises:
        UserError: if `inputs_length` is too short, or so long that the sentinels do not suffice.
    """
    if inputs_length < 4:
        raise UserError(
            f"inputs_length={inputs_length} is too short for span corruption; use 4 or more"
        )
    if not num_sentinels:
        raise UserError(
            "the vocabulary has no sentinels (<extra_id_0> ...), which span corruption puts in the "
            "place of spans; train on examples with inputs and targets, or use another vocabulary"
        )
    tokens = 2
    while _corrupted_lengths(tokens + 1).inputs <= inputs_length:
        tokens += 1
        if _noise(tokens)[1] > num_sentinels:
            raise UserError(
                f"inputs_length={inputs_length} needs more sentinels than the {num_sentinels} "
                f"there are; use at most {_corrupted_lengths(tokens).inputs - 1}"
            )
    return _corrupted_lengths(tokens)


def _noise(tokens: int) -> tuple[int, int]:
    """Return how many of `tokens` are replaced, and in how many spans."""
    noise = min(max(round(tokens * NOISE_DENSITY), 1), tokens - 1)
    return noise, max(round(noise / MEAN_SPAN_LENGTH), 1)


def _corrupted_lengths(tokens: int) -> SpanLengths:
    """Return the sizes for a raw text of `tokens`: one sentinel per span on each side, and EOS."""
    noise, spans = _noise(tokens)
    return SpanLengths(tokens, tokens - noise + spans + 1, noise + spans + 1)


def corrupt(tokens: np.ndarray, rng: np.random.Generator, sentinels: np.ndarray) -> TokenPair:
    """Replace random spans of `tokens` [n] by sentinels; return (inputs, targets) without EOS.

    The k-th span becomes `sentinels[k]` in the inputs. The targets are each sentinel followed by
    the tokens of its span. The inputs begin with text and end with a span.
    """
    noise, spans = _noise(len(tokens))

    # Stretches of text and of noise alternate, so the odd ones are noise. For example, lengths
    # 2 1 3 2 are text, text, NOISE, text, text, text, NOISE, NOISE; spans start at 2 and at 6.
    lengths = np.empty(2 * spans, np.int64)
    lengths[0::2] = _random_segmentation(len(tokens) - noise, spans, rng)
    lengths[1::2] = _random_segmentation(noise, spans, rng)
    is_noise = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
    span_starts = np.cumsum(lengths)[0::2]
    sentinels = sentinels[:spans]

    # Inputs: a sentinel takes the place of the first token of its span; the others are dropped.
    inputs = tokens.copy()
    inputs[span_starts] = sentinels
    keep = ~is_noise
    keep[span_starts] = True

    # Targets: the noise tokens, with a sentinel inserted before each span. In the example, spans
    # start at 0 and at 1 among the three noise tokens.
    noise_tokens = tokens[is_noise]
    noise_starts = np.cumsum(lengths[1::2]) - lengths[1::2]
    targets = np.insert(noise_tokens, noise_starts, sentinels)
    return inputs[keep], targets


def _random_segmentation(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """Return lengths [segments], each 1 or more, that sum to `items`; all splits equally likely."""
    # Cut behind `segments - 1` different items of the first `items - 1`, so that no segment is
    # empty.
    cuts = np.sort(rng.permutation(items - 1)[: segments - 1]) + 1
    return np.diff(cuts, prepend=0, append=items)


def cut_into_segments(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return `tokens` [n] as int32 [n // length, length]; a remainder shorter than that is dropped.

    Raises:
        UserError: if the text does not fill one segment.
    """
    count = len(tokens) // length
    if not count:
        raise UserError(f"the text has {len(tokens)} tokens, one example needs {length}")
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)


def held_out_pairs(
    tokens: np.ndarray, *, inputs_length: int, sentinels: np.ndarray, seed: int
) -> list[TokenPair]:
    """Return validation examples from the text `tokens` [n], in its order and without EOS.

    The noise depends on `seed` and the place of the segment alone, so it is the same every time.
    """
    segments = cut_into_segments(tokens, span_lengths(inputs_length).tokens)
    return [
        corrupt(segment, np.random.default_rng((seed, i)), sentinels)
        for i, segment in enumerate(segments)
    ]
