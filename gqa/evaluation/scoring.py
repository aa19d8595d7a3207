"""Generate the texts of a test set with a network, and compute its losses.

`gqa.evaluation.metrics` compares the texts with references.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gqa.data.batching import evaluation_batches
from gqa.data.examples import TokenPair
from gqa.inference.generator import Generator, bucket
from gqa.model.special_tokens import T5_TOKENS
from gqa.runtime import distributed


def predict(
    generator: Generator,
    weights: dict,
    texts: Sequence[np.ndarray],
    *,
    inputs_length: int,
    batch_size: int,
    together: bool = False,
) -> np.ndarray:
    """Return the tokens [n, length] that `generator` gives for n texts of token ids, in order.

    Texts are cut to `inputs_length` including EOS. Texts of similar length share a batch, which
    saves padding; the tokens of a text do not depend on the batch it is in.

    Several processes divide the batches among themselves, and every process gets all tokens. With
    `together`, one generator spans the devices of all processes, and they run every batch jointly.
    """
    order = np.argsort([len(text) for text in texts], kind="stable")
    special = generator.special

    outputs = np.zeros((len(texts), generator.length), np.int32)
    # Process 1 of 4 takes the batches 1, 5, 9 ... Jointly, every process runs all batches.
    turn, turns = (0, 1) if together else (jax.process_index(), jax.process_count())

    for start in range(turn * batch_size, len(texts), turns * batch_size):
        chosen = order[start : start + batch_size]
        rows = [np.append(texts[i][: inputs_length - 1], special.eos) for i in chosen]

        # Lengths and batch sizes are rounded up, because every new shape of inputs is compiled. The
        # rows behind the last text stay empty.
        width = bucket(max(map(len, rows)), inputs_length)
        # Any, because the generator takes NumPy arrays too, and `Array` does not say so.
        inputs: Any = np.full((batch_size, width), special.pad, np.int32)
        for row, text in zip(inputs, rows, strict=False):
            row[: len(text)] = text

        # Sampling draws by the number of a text, so that its tokens do not depend on its batch.
        # Rows without a text have the number -1.
        numbers = np.full(batch_size, -1)
        numbers[: len(chosen)] = chosen

        outputs[chosen] = generator(weights, inputs, numbers)[: len(chosen)]

    # Where another process has generated the tokens, this one has zeros.
    return np.asarray(distributed.maximum(outputs))


def losses(
    validation_loss: Callable,
    params: dict,
    pairs: Sequence[TokenPair],
    train: Sequence[TokenPair],
    **shape,
) -> dict[str, float]:
    """Return losses on `pairs`, in nats per target token.

    `test_loss_other_input` gives the network another example's input, so that its distance to
    `test_loss` says how much the network uses its input. It is left out where all pairs have the
    same input, such as with one pair. `test_loss_unigram` is the loss of the training targets'
    token frequencies alone.

    Args:
        train: training examples, for the token frequencies.
        shape: inputs_length, targets_length, batch_size, special and others of
            `evaluation_batches`.
    """
    results = {"test_loss": validation_loss(params, evaluation_batches(pairs, **shape))}

    # Example i gets the input of example i - 1, and example 0 that of the last. Where no input is
    # another one, the difference to `test_loss` would be 0 without having been measured.
    swapped = [(pairs[i - 1][0], targets) for i, (_, targets) in enumerate(pairs)]
    if any(not np.array_equal(pairs[0][0], inputs) for inputs, _ in pairs):
        results["test_loss_other_input"] = validation_loss(
            params, evaluation_batches(swapped, **shape)
        )

    results["test_loss_unigram"] = unigram_loss(
        [t for _, t in train],
        [t for _, t in pairs],
        shape["targets_length"],
        shape.get("special", T5_TOKENS).eos,
    )
    return results


def unigram_loss(
    train: Sequence[np.ndarray], test: Sequence[np.ndarray], targets_length: int, eos: int
) -> float:
    """Return nats per token of test targets under training token frequencies (add-one).

    Targets are cut to `targets_length` with the token `eos` behind them.
    """

    def tokens(texts):
        # The order of the tokens does not matter, so that every EOS can stand at the end.
        return np.concatenate([*(text[: targets_length - 1] for text in texts), [eos] * len(texts)])

    train_ids, test_ids = tokens(train), tokens(test)

    # Every token counts once more than it was seen: one that is only in the test set would have an
    # infinite loss.
    counts = np.bincount(train_ids, minlength=max(train_ids.max(), test_ids.max()) + 1) + 1
    return float(-np.log(counts[test_ids] / counts.sum()).mean())
