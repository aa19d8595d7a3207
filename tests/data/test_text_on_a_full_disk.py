"""Vocabulary, tokens and corpus on a full disk: each is written whole or not at all."""

import importlib.metadata
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from gqa.data import corpus, token_cache, tokenizer
from tests.support import small_disk
from tests.support.small_disk import assert_full, fill


@pytest.fixture
def disk(tmp_path):
    with small_disk.mounted(tmp_path / "disk", "64k") as folder:
        yield folder


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_vocabulary_is_written_whole_or_not(disk):
    path = disk / "small.model"
    subprocess.run(["mount", "-o", "remount,size=400k", str(disk)], check=True)
    ballast = fill(disk)
    texts = [" ".join(f"w{i} x{i * i}" for i in range(300))]
    with pytest.raises(OSError, match="No space left") as error:
        tokenizer.train(texts, 460, path)
    assert_full(error, path)
    assert names(disk) == ["ballast"]
    ballast.unlink()
    assert tokenizer.train(texts, 460, path).hash == tokenizer.load(path).hash


def test_tokens_are_written_whole_or_not(disk):
    encoded = [list(range(i)) for i in range(90)]
    encoder = SimpleNamespace(hash="x", encode_batch=lambda texts: encoded[: len(texts)])
    texts = [str(i) for i in range(90)]
    ballast = fill(disk)
    with pytest.raises(OSError, match="No space left") as error:
        token_cache.tokenize(texts, encoder, disk / "tokens")
    assert_full(error, disk / "tokens" / "tokens-")
    assert names(disk) == ["ballast"]
    ballast.unlink()
    for _ in range(2):  # made, then read
        for ids, expected in zip(
            token_cache.tokenize(texts, encoder, disk / "tokens"), encoded, strict=True
        ):
            np.testing.assert_array_equal(ids, expected)


def test_a_corpus_is_built_whole_or_not(disk, monkeypatch):
    ballast = fill(disk)
    packages = ["iniconfig", "rich", "optax"]
    with pytest.raises(OSError, match="No space left") as error:
        corpus.build(disk / "corpus", packages)
    assert_full(error, disk / "corpus" / "docstrings-train.jsonl.gz")
    assert not (disk / "corpus" / "manifest.json").exists()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    built = corpus.build(disk / "corpus", packages)
    assert built.rows("docstrings", "test")
    assert not any(name.endswith(".tmp") for name in names(disk))
    monkeypatch.setattr(importlib.metadata.PathDistribution, "files", None)
    assert corpus.build(disk / "corpus", packages).manifest == built.manifest
