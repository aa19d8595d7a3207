"""On a full disk nothing half-written is taken for whole, and with space the same call succeeds."""

import contextlib
import errno
import importlib.metadata
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from gqa.data import corpus, token_cache, tokenizer
from gqa.evaluation import results

RECORD = {"run": "a", "value": 1}


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of 64 KiB, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk):
    """Take all space but less than a page."""
    path = disk / "ballast"
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


def assert_full(error, path):
    assert error.value.errno == errno.ENOSPC
    assert str(path) in str(error.value)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("first", [0, 1, 100])
def test_of_several_results_all_or_none_are_appended(disk, first):
    path = disk / "results.jsonl"
    results.append(path, [RECORD] * first)
    ballast = fill(disk)
    before = path.read_bytes()
    many = [RECORD | {"value": i} for i in range(1000)]
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as error:
            results.append(path, many)
        assert_full(error, path)
        assert path.read_bytes() == before
    ballast.unlink()
    results.append(path, many)
    assert results.read(path) == [RECORD] * first + many


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
