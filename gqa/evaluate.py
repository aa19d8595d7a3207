"""Score a model: generated text against references, and losses that say what it learned."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from gqa import decode, model
from gqa.data import EOS, Pair, evaluation
from gqa.model import Config
from gqa.sharding import place
from gqa.tokenizer import Tokenizer


def make_generate(config: Config, length: int, stop: bool = True) -> Callable[[dict, Array], Array]:
    """The jitted greedy decoder (params, inputs [B, S]) -> tokens [B, length]."""

    @jax.jit
    def generate(params: dict, inputs: Array) -> Array:
        params = model.unstack(params, config)
        memory, mask = model.prefill(params, config, inputs)
        cache = model.init_cache(config, len(inputs), length)

        def step(tokens, index, cache):
            return model.decode_step(params, config, tokens, index, cache, memory, mask)

        return decode.greedy(step, cache, len(inputs), length, stop)

    return generate


def predict(
    params: dict, config: Config, batches: Iterable, length: int, tokenizer: Tokenizer, mesh: Mesh
) -> list[str]:
    """Greedy outputs, as text and in order, for batches of (batch, number of real rows)."""
    generate = make_generate(config, length)
    texts = []
    for batch, real in batches:
        tokens = generate(params, place({"inputs": batch["inputs"]}, mesh)["inputs"])
        texts += [tokenizer.decode(row) for row in np.asarray(tokens)[:real]]
    return texts


def losses(
    validation_loss: Callable, params: dict, pairs: Sequence[Pair], train: Sequence[Pair], **shape
) -> dict[str, float]:
    """Nats per target token of the model; of it reading another example's input; of unigrams.

    The second says how much it reads its input, the third what token frequencies alone give.
    """
    swapped = [(pairs[i - 1][0], targets) for i, (_, targets) in enumerate(pairs)]
    return {
        "test_loss": validation_loss(params, evaluation(pairs, **shape)),
        "test_loss_other_input": validation_loss(params, evaluation(swapped, **shape)),
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
