"""What random numbers and cache files of the data depend on: each ingredient makes a difference."""

from types import SimpleNamespace

import grain
import numpy as np

from gqa.data import batching
from gqa.data.tokenizer import EOS

FIRST_SENTINEL = 32099
LENGTH = 141  # raw tokens of an example whose inputs are 128 tokens long


def noise(inputs):
    """Where the sentinels stand in each row [B, length]: the noise, whatever the text."""
    return {tuple(np.flatnonzero(row > FIRST_SENTINEL - 100)) for row in np.asarray(inputs)}


def stream(**changes):
    """Batches of a text of one token alone, so that rows differ in their noise and nothing else."""
    documents = grain.MapDataset.source(["5 " * LENGTH] * 8)
    options = {"inputs_length": 128, "batch_size": 4, "seed": 3, "first_sentinel": FIRST_SENTINEL}
    encode = lambda text: [int(word) for word in text.split()]  # noqa: E731
    return batching.pretrain_stream(documents, encode, **options | changes)


def test_every_held_out_segment_has_noise_of_its_own():
    tokens = np.full(LENGTH * 20, 5)
    options = {"inputs_length": 128, "first_sentinel": FIRST_SENTINEL}
    first, other = (batching.corrupted(tokens, **options, seed=seed) for seed in (0, 1))
    found, different = (noise([inputs for inputs, _ in pairs]) for pairs in (first, other))
    assert len(found) == 20
    assert not found & different


def test_every_segment_of_an_epoch_has_noise_of_its_own():
    options = {"inputs_length": 128, "batch_size": 20, "first_sentinel": FIRST_SENTINEL}
    epochs = [
        noise(next(batching.pretrain([np.full(LENGTH * 20, 5)], **options, seed=s))["inputs"])
        for s in (0, 1)
    ]
    assert all(len(found) == 20 for found in epochs)
    assert not epochs[0] & epochs[1]


def test_noise_of_a_stream_differs_by_row_step_seed_and_process():
    several = {
        name: noise(np.concatenate([next(batches)["inputs"] for _ in range(2)]))
        for name, batches in (
            ("whole", stream()),
            ("another seed", stream(seed=4)),
            ("first of two", stream(batch_size=8, shard=(0, 2))),
            ("second of two", stream(batch_size=8, shard=(1, 2))),
        )
    }
    assert all(len(found) == 8 for found in several.values())
    assert not several["whole"] & several["another seed"]
    assert not several["first of two"] & several["second of two"]


def test_kept_tokens_are_of_one_vocabulary_and_one_division_into_texts(tmp_path):
    def tokenize(name, texts):
        """Each vocabulary gives its own number for every character."""
        number = {"coarse": 7, "fine": 9}[name]
        encode = lambda texts: [[number] * len(text) for text in texts]  # noqa: E731
        found = batching.tokenize(texts, SimpleNamespace(hash=name, encode_batch=encode), tmp_path)
        return [ids.tolist() for ids in found]

    for _ in range(2):  # made, then read
        assert tokenize("coarse", ["ab", "c"]) == [[7, 7], [7]]
        assert tokenize("fine", ["ab", "c"]) == [[9, 9], [9]]
        assert tokenize("coarse", ["a", "bc"]) == [[7], [7, 7]]
    assert len(list(tmp_path.iterdir())) == 3


def test_which_pairs_share_a_packed_row_is_drawn_from_the_seed():
    pairs = [(np.full(3, 1000 + i), np.full(3, 1000 + i)) for i in range(40)]
    options = {"inputs_length": 8, "targets_length": 8, "batch_size": 20, "pack": True}

    def together(seed):
        rows = next(batching.seq2seq([pairs], **options, seed=seed))["inputs"]
        return {frozenset(row[row >= 1000].tolist()) for row in rows}

    assert all(len(row) == 2 for row in together(3))
    assert len(together(3) & together(4)) < 5
    neighbours = {frozenset((1000 + i, 1001 + i)) for i in range(0, 40, 2)}
    assert len(together(3) & neighbours) < 5


def test_the_order_of_a_streams_documents_is_drawn_from_the_seed():
    documents = grain.MapDataset.source([str(100 + i) for i in range(LENGTH)])
    options = {"inputs_length": 128, "batch_size": 1, "first_sentinel": FIRST_SENTINEL}

    def order(seed):
        """Every document is one token, and the first batch is one epoch of them."""
        batch = next(batching.pretrain_stream(documents, lambda x: [int(x)], **options, seed=seed))
        return batching.restore(batch["inputs"][0], batch["targets"][0], FIRST_SENTINEL).tolist()

    found = order(3)
    assert sorted(found) == list(range(100, 100 + LENGTH))
    assert found == order(3)
    assert found != order(4)


def test_held_out_examples_leave_the_end_to_the_batches():
    pairs = batching.corrupted(
        np.full(LENGTH * 2, 5), inputs_length=128, first_sentinel=FIRST_SENTINEL, seed=0
    )
    for inputs, targets in pairs:
        assert (len(inputs), len(targets)) == (127, batching.span_lengths(128).targets - 1)
        assert EOS not in inputs
        assert EOS not in targets
