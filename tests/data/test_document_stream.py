"""A stream of documents: read whole, in an order and with noise drawn from the seed, resumed."""

import json

import grain
import numpy as np
import pytest

from gqa.data import batching
from gqa.runtime.errors import UserError
from tests.data.test_batching import assert_same_batches, take
from tests.data.test_span_corruption import FIRST_SENTINEL, LENGTH, SENTINELS, noise
from tests.support.spans import restore


def stream(**changes):
    """Documents of 1 to 9 tokens that can be told apart."""
    documents = grain.MapDataset.source([f"{i} " * (1 + i % 9) for i in range(200)])
    options = {"inputs_length": 43, "batch_size": 6, "seed": 3, "sentinels": SENTINELS}
    return batching.streamed_pretraining_batches(documents, encode, **options | changes)


def encode(text):
    return [100 + int(word) for word in text.split()]


def texts(batches):
    rows = [row for b in batches for row in zip(b["inputs"], b["targets"], strict=True)]
    return np.concatenate([restore(*row, FIRST_SENTINEL) for row in rows])


def test_a_stream_joins_whole_documents_of_an_epoch_in_a_new_order():
    tokens = texts(take(stream(), 8))
    starts = np.flatnonzero(np.diff(tokens, prepend=-1))
    documents, sizes = tokens[starts] - 100, np.diff(starts, append=len(tokens))
    inner = slice(None, -1)  # the last one may be cut
    np.testing.assert_array_equal(sizes[inner], 1 + documents[inner] % 9)
    assert sorted(documents[:200]) == list(range(200))
    assert documents[:200].tolist() != documents[200:400].tolist()


def test_a_stream_resumes_and_shards():
    original = stream()
    for step in (1, 4, 30):
        take(original, step)
        state = json.loads(json.dumps(original.get_state()))
        resumed = stream()
        next(resumed)
        resumed.set_state(state)
        assert_same_batches(take(resumed, 10), take(original, 10))
    assert not np.array_equal(next(stream())["inputs"], next(stream(seed=4))["inputs"])
    parts = [texts(take(stream(shard=(i, 2)), 3)) for i in range(2)]
    assert len(parts[0]) == 3 * 3 * 47
    assert not set(parts[0]) & set(parts[1])
    with pytest.raises(UserError, match="batch_size=6 does not divide among 4"):
        stream(shard=(0, 4))


def stream_of_one_token(**changes):
    """Batches of a text that repeats one token, so that rows differ in their noise alone."""
    documents = grain.MapDataset.source(["5 " * LENGTH] * 8)
    options = {"inputs_length": 128, "batch_size": 4, "seed": 3, "sentinels": SENTINELS}
    encode = lambda text: [int(word) for word in text.split()]  # noqa: E731
    return batching.streamed_pretraining_batches(documents, encode, **options | changes)


def test_noise_of_a_stream_differs_by_row_step_seed_and_process():
    several = {
        name: noise(np.concatenate([next(batches)["inputs"] for _ in range(2)]))
        for name, batches in (
            ("whole", stream_of_one_token()),
            ("another seed", stream_of_one_token(seed=4)),
            ("first of two", stream_of_one_token(batch_size=8, shard=(0, 2))),
            ("second of two", stream_of_one_token(batch_size=8, shard=(1, 2))),
        )
    }
    assert all(len(found) == 8 for found in several.values())
    assert not several["whole"] & several["another seed"]
    assert not several["first of two"] & several["second of two"]


def test_the_order_of_a_streams_documents_is_drawn_from_the_seed():
    documents = grain.MapDataset.source([str(100 + i) for i in range(LENGTH)])
    options = {"inputs_length": 128, "batch_size": 1, "sentinels": SENTINELS}

    def order(seed):
        """Every document is one token, and the first batch is one epoch of them."""
        batch = next(
            batching.streamed_pretraining_batches(
                documents, lambda x: [int(x)], **options, seed=seed
            )
        )
        return restore(batch["inputs"][0], batch["targets"][0], FIRST_SENTINEL).tolist()

    found = order(3)
    assert sorted(found) == list(range(100, 100 + LENGTH))
    assert found == order(3)
    assert found != order(4)
