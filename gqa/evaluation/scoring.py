"""Score a model: generated text against references, and losses that say what it learned."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from gqa.data.batching import evaluation_batches
from gqa.data.examples import TokenPair
from gqa.data.tokenizer import EOS
from gqa.inference.generator import Generator, bucket
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
    """Tokens [n, length] that `generator` gives for n texts of token ids, in their order.

    Texts are cut to `inputs_length`, their end counted. Those of like length share a batch, so that
    few of its columns are padding; what a text gives does not depend on the batch it is in. Several
    processes, each with a generator on its own devices, share the batches out and get all tokens;
    those whose generator is one on the devices of all do each batch `together`.
    """
    order = np.argsort([len(text) for text in texts], kind="stable")
    outputs = np.zeros((len(texts), generator.length), np.int32)
    turn, turns = (0, 1) if together else (jax.process_index(), jax.process_count())
    for start in range(turn * batch_size, len(texts), turns * batch_size):
        chosen = order[start : start + batch_size]
        rows = [np.append(texts[i][: inputs_length - 1], EOS) for i in chosen]
        width = bucket(max(map(len, rows)), inputs_length)
        inputs = np.zeros((batch_size, width), np.int32)
        for row, text in zip(inputs, rows, strict=False):
            row[: len(text)] = text
        numbers = np.full(batch_size, -1)
        numbers[: len(chosen)] = chosen
        outputs[chosen] = generator(weights, inputs, numbers)[: len(chosen)]
    return np.asarray(distributed.maximum(outputs))  # 0 where another process has tokens


def losses(
    validation_loss: Callable,
    params: dict,
    pairs: Sequence[TokenPair],
    train: Sequence[TokenPair],
    **shape,
) -> dict[str, float]:
    """Nats per target token of the model; of it reading another example's input; of unigrams.

    The second says how much it reads its input, the third what token frequencies alone give.
    """
    swapped = [(pairs[i - 1][0], targets) for i, (_, targets) in enumerate(pairs)]
    return {
        "test_loss": validation_loss(params, evaluation_batches(pairs, **shape)),
        "test_loss_other_input": validation_loss(params, evaluation_batches(swapped, **shape)),
        "test_loss_unigram": unigram_loss(
            [t for _, t in train], [t for _, t in pairs], shape["targets_length"]
        ),
    }


def unigram_loss(
    train: Sequence[np.ndarray], test: Sequence[np.ndarray], targets_length: int
) -> float:
    """Nats per token of test targets under the (add-one) token frequencies of training targets."""

    def tokens(texts):
        return np.concatenate([np.append(text[: targets_length - 1], EOS) for text in texts])

    train_ids, test_ids = tokens(train), tokens(test)
    counts = np.bincount(train_ids, minlength=max(train_ids.max(), test_ids.max()) + 1) + 1
    return float(-np.log(counts[test_ids] / counts.sum()).mean())
