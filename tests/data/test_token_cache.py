"""Token ids on disk: found again by text and vocabulary, and encoded anew where damaged."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from gqa.data import token_cache, tokenizer
from gqa.data.examples import Example

IDS = [[4, 5, 6], [], [7, 8, 9, 10, 11, 12, 13]]


def assert_ids(tokens):
    assert [ids.tolist() for ids in tokens] == IDS
    assert {ids.dtype for ids in tokens} == {np.dtype("int32")}


def test_tokens_are_cached_by_content(tmp_path, monkeypatch):
    texts = ["a b c", "", "def f(x): return x"]
    vocabulary = tokenizer.train(["abc def return f(x): a b c return"], 455, tmp_path / "v")
    first = token_cache.tokenize(texts, vocabulary, tmp_path / "tokens")
    assert [ids.tolist() for ids in first] == vocabulary.encode_batch(texts)
    pairs = token_cache.tokenize_examples(
        [Example("a b", ("x", "y"))], vocabulary, tmp_path / "tokens"
    )
    assert [[side.tolist() for side in pair] for pair in pairs] == [
        [vocabulary.encode("a b"), vocabulary.encode("x")]
    ]
    assert token_cache.tokenize([], vocabulary, tmp_path / "tokens") == []
    assert not list((tmp_path / "tokens").glob("*.tmp"))

    monkeypatch.setattr(vocabulary, "encode_batch", lambda texts: pytest.fail("tokenized again"))
    again = token_cache.tokenize(texts, vocabulary, tmp_path / "tokens")
    assert [ids.tolist() for ids in again] == [ids.tolist() for ids in first]
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):
        token_cache.tokenize([*texts, "new"], vocabulary, tmp_path / "tokens")


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
        assert_ids(token_cache.tokenize(["a", "b", "c"], encoder, tmp_path))
    assert len(calls) == 1
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    assert_ids(token_cache.tokenize(["a", "b", "c"], encoder, tmp_path))
    assert len(calls) == 2
    assert path.read_bytes() == content


def test_kept_tokens_are_of_one_vocabulary_and_one_division_into_texts(tmp_path):
    def tokenize(name, texts):
        """Each vocabulary gives its own number for every character."""
        number = {"coarse": 7, "fine": 9}[name]
        encode = lambda texts: [[number] * len(text) for text in texts]  # noqa: E731
        found = token_cache.tokenize(
            texts, SimpleNamespace(hash=name, encode_batch=encode), tmp_path
        )
        return [ids.tolist() for ids in found]

    for _ in range(2):  # made, then read
        assert tokenize("coarse", ["ab", "c"]) == [[7, 7], [7]]
        assert tokenize("fine", ["ab", "c"]) == [[9, 9], [9]]
        assert tokenize("coarse", ["a", "bc"]) == [[7], [7, 7]]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [([4, 5, 6], [3, 0]), ([4, 5], [3, 0, 7]), ([4] * 11, [3, 0, 7]), ([], [])],
)
def test_a_whole_file_of_other_sizes_is_made_again(tmp_path, ids, lengths):
    """The file's checksums are right; its contents are not those of three texts of ten ids."""
    encoder = SimpleNamespace(hash="x", encode_batch=lambda texts: IDS)
    token_cache.tokenize(["a", "b", "c"], encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    with open(path, "wb") as file:
        np.savez(file, ids=np.array(ids, np.int32), lengths=np.array(lengths, np.int64))
    assert_ids(token_cache.tokenize(["a", "b", "c"], encoder, tmp_path))


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        (np.zeros(10, np.int32), np.int64(3)),
        (np.zeros(10, np.int32), np.array([[3], [0], [7]])),
        (np.zeros(10, np.int32), np.array([3.0, 0.0, 7.0])),
        (np.zeros(10, np.int32), np.array([11, -8, 7])),
        (np.zeros(10, np.float32), np.array([3, 0, 7])),
        (np.zeros((10, 2), np.int32), np.array([3, 0, 7])),
        (np.array(["a"] * 10), np.array([3, 0, 7])),
    ],
)
def test_arrays_that_are_no_tokens_are_made_again(tmp_path, ids, lengths):
    encoder = SimpleNamespace(hash="x", encode_batch=lambda texts: IDS)
    token_cache.tokenize(["a", "b", "c"], encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    with open(path, "wb") as file:
        np.savez(file, ids=ids, lengths=lengths)
    assert_ids(token_cache.tokenize(["a", "b", "c"], encoder, tmp_path))


def test_a_pipe_in_the_place_of_a_cache_is_replaced(tmp_path):
    encoder = SimpleNamespace(hash="x", encode_batch=lambda texts: IDS)
    token_cache.tokenize(["a", "b", "c"], encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    os.mkfifo(path)
    assert_ids(token_cache.tokenize(["a", "b", "c"], encoder, tmp_path))
    assert path.is_file()


def test_a_compressed_cache_is_made_again(tmp_path):
    """What is compressed could be a thousand times as large as its file."""
    calls = []
    encoder = SimpleNamespace(hash="x", encode_batch=lambda texts: calls.append(1) or IDS)
    token_cache.tokenize(["a", "b", "c"], encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    with np.load(path) as arrays:
        np.savez_compressed(path, **arrays)
    assert_ids(token_cache.tokenize(["a", "b", "c"], encoder, tmp_path))
    assert len(calls) == 2
