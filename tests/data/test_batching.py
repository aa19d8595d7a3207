"""Batches: nothing lost, nothing twice, and a function of (seed, step)."""

import json
from types import SimpleNamespace

import grain
import numpy as np
import pytest

from gqa.data import batching, tokenizer
from gqa.data.examples import Example
from gqa.data.tokenizer import EOS
from gqa.runtime.errors import UserError

FIRST_SENTINEL = 32099


def numbered_pairs(n, rng=None):
    """Pairs that can be told apart: every token of pair i is 1000 + i, lengths vary."""
    rng = rng or np.random.default_rng(0)
    return [
        (np.full(rng.integers(1, 12), 1000 + i), np.full(rng.integers(1, 6), 1000 + i))
        for i in range(n)
    ]


def take(stream, n):
    return [next(stream) for _ in range(n)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def pretrain(**changes):
    tokens = np.arange(100, 100 + 47 * 50, dtype=np.int32)  # 50 segments of 47 distinct tokens
    options = {"inputs_length": 43, "batch_size": 4, "seed": 3, "first_sentinel": FIRST_SENTINEL}
    return batching.pretrain([tokens], **options | changes)


def seq2seq(n=50, **changes):
    options = {"inputs_length": 16, "targets_length": 8, "batch_size": 4, "seed": 3, "pack": True}
    return batching.seq2seq([numbered_pairs(n)], **options | changes)


STREAMS = pytest.mark.parametrize(
    "stream",
    [pretrain, seq2seq, lambda **c: seq2seq(pack=False, **c)],
    ids=["spans", "packed", "plain"],
)


@pytest.mark.parametrize(
    ("inputs_length", "lengths"),
    [(512, (568, 512, 114)), (256, (284, 256, 58)), (128, (141, 128, 29))],
)
def test_span_lengths_are_those_of_t5(inputs_length, lengths):
    assert batching.span_lengths(inputs_length) == lengths
    tokens = np.arange(3, 3 + lengths[0])
    inputs, targets = batching.span_corruption(tokens, np.random.default_rng(0), FIRST_SENTINEL)
    assert (len(inputs), len(targets)) == lengths[1:]


def test_sentinels_count_down_and_stand_for_the_same_span_on_both_sides():
    tokens = np.arange(3, 571)
    inputs, targets = batching.span_corruption(tokens, np.random.default_rng(0), FIRST_SENTINEL)
    expected = FIRST_SENTINEL - np.arange(28)
    np.testing.assert_array_equal(inputs[inputs > FIRST_SENTINEL - 100], expected)
    np.testing.assert_array_equal(targets[targets > FIRST_SENTINEL - 100], expected)
    assert inputs[0] == tokens[0]  # text first, noise last
    assert targets[0] == FIRST_SENTINEL
    assert inputs[-1] == targets[-1] == EOS


@pytest.mark.parametrize("length", [2, 3, 10, 47, 568, 1500])
def test_span_corruption_is_invertible(length):
    tokens = np.random.default_rng(length).integers(3, 32000, length)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        inputs, targets = batching.span_corruption(tokens, rng, FIRST_SENTINEL)
        np.testing.assert_array_equal(batching.restore(inputs, targets, FIRST_SENTINEL), tokens)


def test_every_token_is_noise_as_often_as_another():
    tokens = np.arange(3, 144)
    noisy = np.zeros(200)
    for seed in range(3000):
        _, targets = batching.span_corruption(tokens, np.random.default_rng(seed), FIRST_SENTINEL)
        noisy[targets[(targets >= 3) & (targets < 144)]] += 1 / 3000
    inner = noisy[13:134]  # T5 puts text first and noise last, which shows at the ends
    assert noisy[3:144].mean() == pytest.approx(21 / 141)
    assert abs(inner - 0.15).max() < 0.05


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-30],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: content[:300] + content[310:],
        lambda content: b"not a zip file at all",
        lambda content: content.replace(b"ids.npy", b"idz.npy"),
        lambda content: content.replace(b"(10,)", b"(90,)"),
    ],
)
def test_damaged_tokens_are_made_again(tmp_path, damage):
    calls = []
    encoder = SimpleNamespace(hash="x", encode_batch=lambda texts: calls.append(1) or IDS)
    for _ in range(2):
        assert_ids(batching.tokenize(["a", "b", "c"], encoder, tmp_path))
    assert len(calls) == 1
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    assert_ids(batching.tokenize(["a", "b", "c"], encoder, tmp_path))
    assert len(calls) == 2
    assert path.read_bytes() == content


IDS = [[4, 5, 6], [], [7, 8, 9, 10, 11, 12, 13]]


def assert_ids(tokens):
    assert [ids.tolist() for ids in tokens] == IDS
    assert {ids.dtype for ids in tokens} == {np.dtype("int32")}


def test_span_corruption_refuses_lengths_it_cannot_do():
    with pytest.raises(UserError, match="inputs_length=3 is too short"):
        batching.span_lengths(3)
    with pytest.raises(UserError, match=r"=2147483647 needs more .* use at most 1809"):
        batching.span_lengths(2**31 - 1)
    batching.span_lengths(1809)
    with pytest.raises(UserError, match=r"inputs_length=1810 needs more sentinels than the 100"):
        batching.span_lengths(1810)
    with pytest.raises(UserError, match="30 tokens, one example needs 47"):
        batching.corrupted(np.arange(30), inputs_length=43, first_sentinel=99, seed=0)


def test_an_epoch_of_pretraining_is_the_text_and_the_next_has_other_noise():
    stream = pretrain(batch_size=10)
    epochs = [take(stream, 5), take(stream, 5)]
    texts = []
    for epoch in epochs:
        rows = [pair for b in epoch for pair in zip(b["inputs"], b["targets"], strict=True)]
        texts.append([tuple(batching.restore(*row, FIRST_SENTINEL)) for row in rows])
    assert sum(sorted(texts[0]), ()) == tuple(range(100, 100 + 47 * 50))
    assert sorted(texts[1]) == sorted(texts[0])
    assert texts[1] != texts[0]
    noise = [{tuple(row) for b in epoch for row in b["targets"]} for epoch in epochs]
    assert not noise[0] & noise[1]


@STREAMS
def test_batches_depend_on_the_seed_alone(stream):
    assert_same(take(stream(), 30), take(stream(), 30))
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
    assert_same(take(resumed, 20), expected)


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
    stream = batching.seq2seq(
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
    stream = seq2seq(300, batch_size=1)
    expected = sorted((*map(int, x), EOS, *map(int, y), EOS) for x, y in pairs)
    seen, rows = [], 0
    while len(seen) < 300:
        seen += [tuple(map(int, x + y)) for x, y in unpack(next(stream))]
        rows += 1
    assert sorted(seen) == expected
    assert rows < 200


def test_packed_segments_and_positions():
    pairs = [(np.array([7, 8, 9]), np.array([5])), (np.array([11]), np.array([12, 13]))]
    stream = batching.seq2seq(
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
    shards = [list(batching.evaluation(pairs, **options, shard=(i, count))) for i in range(count)]
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


def test_evaluation_noise_is_fixed_and_text_is_complete():
    tokens = np.arange(100, 100 + 47 * 5 + 20)
    options = {"inputs_length": 43, "first_sentinel": FIRST_SENTINEL, "seed": 0}
    once, again = batching.corrupted(tokens, **options), batching.corrupted(tokens, **options)
    restored = [batching.restore(*pair, FIRST_SENTINEL) for pair in once]
    np.testing.assert_array_equal(np.concatenate(restored), tokens[: 47 * 5])
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a[1], b[1])
    lengths = batching.span_lengths(43)
    batches = batching.evaluation(
        once, inputs_length=43, targets_length=lengths.targets, batch_size=5
    )
    batch, _ = next(batches)
    assert (batch["inputs"][:, -1] == EOS).all()  # nothing was cut, nothing is left over
    assert (batch["targets"][:, -1] == EOS).all()


def test_tokens_are_cached_by_content(tmp_path, monkeypatch):
    texts = ["a b c", "", "def f(x): return x"]
    vocabulary = tokenizer.train(["abc def return f(x): a b c return"], 455, tmp_path / "v")
    first = batching.tokenize(texts, vocabulary, tmp_path / "tokens")
    assert [ids.tolist() for ids in first] == vocabulary.encode_batch(texts)
    pairs = batching.tokenize_examples(
        [Example("a b", ("x", "y"))], vocabulary, tmp_path / "tokens"
    )
    assert [[side.tolist() for side in pair] for pair in pairs] == [
        [vocabulary.encode("a b"), vocabulary.encode("x")]
    ]
    assert batching.tokenize([], vocabulary, tmp_path / "tokens") == []
    assert not list((tmp_path / "tokens").glob("*.tmp"))

    monkeypatch.setattr(vocabulary, "encode_batch", lambda texts: pytest.fail("tokenized again"))
    again = batching.tokenize(texts, vocabulary, tmp_path / "tokens")
    assert [ids.tolist() for ids in again] == [ids.tolist() for ids in first]
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):
        batching.tokenize([*texts, "new"], vocabulary, tmp_path / "tokens")


def stream(**changes):
    """Documents of 1 to 9 tokens that can be told apart."""
    documents = grain.MapDataset.source([f"{i} " * (1 + i % 9) for i in range(200)])
    options = {"inputs_length": 43, "batch_size": 6, "seed": 3, "first_sentinel": FIRST_SENTINEL}
    return batching.pretrain_stream(documents, encode, **options | changes)


def encode(text):
    return [100 + int(word) for word in text.split()]


def texts(batches):
    rows = [row for b in batches for row in zip(b["inputs"], b["targets"], strict=True)]
    return np.concatenate([batching.restore(*row, FIRST_SENTINEL) for row in rows])


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
        assert_same(take(resumed, 10), take(original, 10))
    assert not np.array_equal(next(stream())["inputs"], next(stream(seed=4))["inputs"])
    parts = [texts(take(stream(shard=(i, 2)), 3)) for i in range(2)]
    assert len(parts[0]) == 3 * 3 * 47
    assert not set(parts[0]) & set(parts[1])
    with pytest.raises(UserError, match="batch_size=6 does not divide among 4"):
        stream(shard=(0, 4))


@pytest.mark.parametrize("pack", [False, True])
def test_a_mixture_draws_rows_as_often_as_their_weights_say(pack):
    pairs = numbered_pairs(60)
    options = {"inputs_length": 16, "targets_length": 8, "batch_size": 4, "seed": 3}
    stream = batching.seq2seq([pairs[:5], pairs[5:]], (1, 3), **options, pack=pack)
    rows = np.concatenate([batch["inputs"] for batch in take(stream, 100)])
    assert (rows[:, 0] < 1005).mean() == pytest.approx(0.25, abs=0.01)
    alone = batching.seq2seq([pairs[5:]], **options, pack=pack)
    expected = np.concatenate([batch["inputs"] for batch in take(alone, 20)])
    np.testing.assert_array_equal(rows[rows[:, 0] >= 1005][:80], expected)  # it keeps its order
    with pytest.raises(UserError, match="the training split is empty"):
        batching.seq2seq([pairs, []], (1, 3), **options, pack=pack)


def test_a_mixture_of_texts_draws_segments_as_often_as_their_weights_say():
    parts = [np.full(47 * 3, 200, np.int32), np.full(47 * 30, 300, np.int32)]
    options = {"inputs_length": 43, "batch_size": 4, "seed": 3, "first_sentinel": FIRST_SENTINEL}
    stream = batching.pretrain(parts, (4, 1), **options)
    rows = np.concatenate([batch["inputs"] for batch in take(stream, 50)])
    assert (rows[:, 0] == 200).mean() == pytest.approx(0.8, abs=0.01)
