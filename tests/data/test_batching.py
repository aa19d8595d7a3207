"""Batches: nothing lost, nothing twice, and a function of (seed, step)."""

import json

import numpy as np
import pytest

from gqa.data import batching
from gqa.data.tokenizer import EOS
from gqa.runtime.errors import UserError
from tests.data.test_span_corruption import FIRST_SENTINEL, LENGTH, SENTINELS, noise
from tests.support.spans import restore


def numbered_pairs(n, rng=None):
    """Pairs that can be told apart: every token of pair i is 1000 + i, lengths vary."""
    rng = rng or np.random.default_rng(0)
    return [
        (np.full(rng.integers(1, 12), 1000 + i), np.full(rng.integers(1, 6), 1000 + i))
        for i in range(n)
    ]


def take(stream, n):
    return [next(stream) for _ in range(n)]


def assert_same_batches(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def pretraining(**changes):
    tokens = np.arange(100, 100 + 47 * 50, dtype=np.int32)  # 50 segments of 47 distinct tokens
    options = {"inputs_length": 43, "batch_size": 4, "seed": 3, "sentinels": SENTINELS}
    return batching.pretraining_batches([tokens], **options | changes)


def finetuning(n=50, **changes):
    options = {"inputs_length": 16, "targets_length": 8, "batch_size": 4, "seed": 3, "pack": True}
    return batching.finetuning_batches([numbered_pairs(n)], **options | changes)


STREAMS = pytest.mark.parametrize(
    "stream",
    [pretraining, finetuning, lambda **c: finetuning(pack=False, **c)],
    ids=["spans", "packed", "plain"],
)


def test_an_epoch_of_pretraining_is_the_text_and_the_next_has_other_noise():
    stream = pretraining(batch_size=10)
    epochs = [take(stream, 5), take(stream, 5)]
    texts = []
    for epoch in epochs:
        rows = [pair for b in epoch for pair in zip(b["inputs"], b["targets"], strict=True)]
        texts.append([tuple(restore(*row, FIRST_SENTINEL)) for row in rows])
    assert sum(sorted(texts[0]), ()) == tuple(range(100, 100 + 47 * 50))
    assert sorted(texts[1]) == sorted(texts[0])
    assert texts[1] != texts[0]
    noise = [{tuple(row) for b in epoch for row in b["targets"]} for epoch in epochs]
    assert not noise[0] & noise[1]


def test_every_segment_of_an_epoch_has_noise_of_its_own():
    options = {"inputs_length": 128, "batch_size": 20, "sentinels": SENTINELS}
    epochs = [
        noise(
            next(batching.pretraining_batches([np.full(LENGTH * 20, 5)], **options, seed=s))[
                "inputs"
            ]
        )
        for s in (0, 1)
    ]
    assert all(len(found) == 20 for found in epochs)
    assert not epochs[0] & epochs[1]


@STREAMS
def test_batches_depend_on_the_seed_alone(stream):
    assert_same_batches(take(stream(), 30), take(stream(), 30))
    assert not np.array_equal(next(stream())["inputs"], next(stream(seed=4))["inputs"])


@STREAMS
@pytest.mark.parametrize("step", [1, 5, 13, 40])
def test_resuming_from_a_saved_state_is_exact(stream, step):
    original = stream()
    take(original, step)
    state = json.loads(json.dumps(original.get_state()))
    expected = take(original, 20)
    resumed = stream()
    next(resumed)
    resumed.set_state(state)
    assert_same_batches(take(resumed, 20), expected)


@STREAMS
def test_shards_make_up_the_batches_of_one_process(stream):
    whole = take(stream(batch_size=6), 40)
    parts = [take(stream(batch_size=6, shard=(i, 3)), 40) for i in range(3)]
    for step, batch in enumerate(whole):
        for name, rows in batch.items():
            got = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(got, rows)  # in order, for dropout is drawn by place
    with pytest.raises(UserError, match="batch_size=6 does not divide among 4"):
        stream(batch_size=6, shard=(0, 4))


def test_plain_batches_truncate_end_and_pad():
    pairs = [(np.arange(10, 30), np.arange(40, 42)), (np.arange(20, 22), np.arange(40, 60))]
    stream = batching.finetuning_batches(
        [pairs], inputs_length=6, targets_length=5, batch_size=2, seed=0, pack=False
    )
    batch = next(stream)
    assert batch.keys() == {"inputs", "targets"}
    assert batch["inputs"].dtype == np.int32
    order = np.argsort(batch["inputs"][:, 0])
    expected = [[10, 11, 12, 13, 14, EOS], [20, 21, EOS, 0, 0, 0]]
    np.testing.assert_array_equal(batch["inputs"][order], expected)
    expected = [[40, 41, EOS, 0, 0], [40, 41, 42, 43, EOS]]
    np.testing.assert_array_equal(batch["targets"][order], expected)


def unpack(batch):
    """The pairs in a packed batch, by row and segment."""
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["inputs_segments"][row].max() + 1):
            yield tuple(
                tuple(batch[side][row][batch[f"{side}_segments"][row] == segment])
                for side in ("inputs", "targets")
            )


def test_packing_loses_nothing_in_an_epoch():
    pairs = numbered_pairs(300)
    stream = finetuning(300, batch_size=1)
    expected = sorted((*map(int, x), EOS, *map(int, y), EOS) for x, y in pairs)
    seen, rows = [], 0
    while len(seen) < 300:
        seen += [tuple(map(int, x + y)) for x, y in unpack(next(stream))]
        rows += 1
    assert sorted(seen) == expected
    assert rows < 200


def test_packed_segments_and_positions():
    pairs = [(np.array([7, 8, 9]), np.array([5])), (np.array([11]), np.array([12, 13]))]
    stream = batching.finetuning_batches(
        [pairs], inputs_length=8, targets_length=6, batch_size=1, seed=0, pack=True
    )
    batch = {name: rows[0] for name, rows in next(stream).items()}
    first, second = sorted(unpack({k: v[None] for k, v in batch.items()}))
    assert first == ((7, 8, 9, EOS), (5, EOS))
    assert second == ((11, EOS), (12, 13, EOS))
    for side, length in (("inputs", 6), ("targets", 5)):
        segments, positions = batch[f"{side}_segments"], batch[f"{side}_positions"]
        np.testing.assert_array_equal(segments > 0, np.arange(len(segments)) < length)
        np.testing.assert_array_equal(batch[side] > 0, segments > 0)
        assert (np.diff(segments[:length]) >= 0).all()
        for k in (1, 2):
            part = positions[segments == k]
            np.testing.assert_array_equal(part, np.arange(len(part)))
        assert (positions[length:] == 0).all()


def test_which_pairs_share_a_packed_row_is_drawn_from_the_seed():
    pairs = [(np.full(3, 1000 + i), np.full(3, 1000 + i)) for i in range(40)]
    options = {"inputs_length": 8, "targets_length": 8, "batch_size": 20, "pack": True}

    def together(seed):
        rows = next(batching.finetuning_batches([pairs], **options, seed=seed))["inputs"]
        return {frozenset(row[row >= 1000].tolist()) for row in rows}

    assert all(len(row) == 2 for row in together(3))
    assert len(together(3) & together(4)) < 5
    neighbours = {frozenset((1000 + i, 1001 + i)) for i in range(0, 40, 2)}
    assert len(together(3) & neighbours) < 5


def test_first_fit_keeps_within_capacity_and_window():
    sizes = np.random.default_rng(0).integers(1, 20, (400, 2))
    rows = batching.first_fit(sizes, (40, 30), window=8)
    assert sorted(item for row in rows for item in row) == list(range(400))
    assert all((sizes[row].sum(axis=0) <= (40, 30)).all() for row in rows)
    assert batching.first_fit(np.array([[6], [6], [3], [3]]), (10,)) == [[0, 2], [1, 3]]
    assert batching.first_fit(np.array([[6], [6], [3], [3]]), (10,), window=1) == [[0], [1, 2], [3]]


@pytest.mark.parametrize(("n", "count"), [(1, 1), (8, 1), (11, 1), (11, 2), (9, 4)])
def test_evaluation_gives_every_pair_once_and_in_order(n, count):
    pairs = numbered_pairs(n)
    options = {"inputs_length": 16, "targets_length": 8, "batch_size": 4}
    shards = [
        list(batching.evaluation_batches(pairs, **options, shard=(i, count))) for i in range(count)
    ]
    assert len({len(shard) for shard in shards}) == 1
    seen = []
    for blocks in zip(*shards, strict=True):
        for batch, real in blocks:
            assert batch["inputs"].shape == (4 // count, 16)
            assert not batch["inputs"][real:].any()
            assert not batch["targets"][real:].any()
            for row in range(real):
                x, y = batch["inputs"][row], batch["targets"][row]
                seen.append((x[x > 0].tolist(), y[y > 0].tolist()))
    assert seen == [([*x.tolist(), EOS], [*y.tolist(), EOS]) for x, y in pairs]


@pytest.mark.parametrize("count", [1, 2])
def test_a_packed_evaluation_gives_every_pair_once(count):
    pairs = numbered_pairs(11)
    options = {"inputs_length": 24, "targets_length": 12, "batch_size": 2, "pack": True}
    seen = []
    for i in range(count):
        for batch, real in batching.evaluation_batches(pairs, **options, shard=(i, count)):
            assert not batch["inputs_segments"][real:].any()
            for row in range(real):
                for k in range(1, batch["inputs_segments"][row].max() + 1):
                    x, y = (
                        batch[name][row][batch[f"{name}_segments"][row] == k].tolist()
                        for name in ("inputs", "targets")
                    )
                    seen.append((x, y))
    expected = [([*x.tolist(), EOS], [*y.tolist(), EOS]) for x, y in pairs]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("pack", [False, True])
def test_a_mixture_draws_rows_as_often_as_their_weights_say(pack):
    pairs = numbered_pairs(60)
    options = {"inputs_length": 16, "targets_length": 8, "batch_size": 4, "seed": 3}
    stream = batching.finetuning_batches([pairs[:5], pairs[5:]], (1, 3), **options, pack=pack)
    rows = np.concatenate([batch["inputs"] for batch in take(stream, 100)])
    assert (rows[:, 0] < 1005).mean() == pytest.approx(0.25, abs=0.01)
    alone = batching.finetuning_batches([pairs[5:]], **options, pack=pack)
    expected = np.concatenate([batch["inputs"] for batch in take(alone, 20)])
    np.testing.assert_array_equal(rows[rows[:, 0] >= 1005][:80], expected)  # it keeps its order
    with pytest.raises(UserError, match="the training split is empty"):
        batching.finetuning_batches([pairs, []], (1, 3), **options, pack=pack)


def test_a_mixture_of_texts_draws_segments_as_often_as_their_weights_say():
    parts = [np.full(47 * 3, 200, np.int32), np.full(47 * 30, 300, np.int32)]
    options = {"inputs_length": 43, "batch_size": 4, "seed": 3, "sentinels": SENTINELS}
    stream = batching.pretraining_batches(parts, (4, 1), **options)
    rows = np.concatenate([batch["inputs"] for batch in take(stream, 50)])
    assert (rows[:, 0] == 200).mean() == pytest.approx(0.8, abs=0.01)
