"""A hash is that of the file's bytes, also where a change leaves size and time as they were."""

import hashlib
import os
import time

import pytest

from gqa.runtime import file_hashes
from gqa.runtime.errors import UserError


def test_a_hash_is_of_the_bytes_however_quickly_they_change(tmp_path, monkeypatch):
    """A file system's clock may tick every hundredth of a second: all times are the same."""
    path, now = tmp_path / "file", time.time_ns()
    monkeypatch.setattr(file_hashes, "_signature", lambda _: (1, 2, 3, now, now))
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert file_hashes.sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_file_that_was_left_alone_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    monkeypatch.setattr(file_hashes, "SETTLED", 0.0)
    first = file_hashes.sha256(path)
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert file_hashes.sha256(path) == first


def test_a_change_that_sets_the_time_back_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(file_hashes, "SETTLED", -1.0)  # remember at once
    file_hashes.sha256(path)
    while path.stat().st_ctime_ns == (before := path.stat().st_ctime_ns):
        path.write_bytes(b"two")
        os.utime(path, (1e9, 1e9))
        if path.stat().st_ctime_ns != before:
            break
    assert file_hashes.sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_only_regular_files_have_a_hash(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "absent", "."):
        with pytest.raises(UserError, match=str(tmp_path)):
            file_hashes.sha256(tmp_path / name)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large; its hash is kept on disk in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(file_hashes, "LARGE", 3)
    monkeypatch.setattr(file_hashes, "SETTLED", -1.0)
    monkeypatch.setattr(file_hashes, "_remembered", {})
    path = tmp_path / "file"
    path.write_bytes(b"one")
    return path


def test_another_process_does_not_read_a_large_file_again(large, tmp_path, monkeypatch):
    first = file_hashes.sha256(large)
    file_hashes._remembered.clear()
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", None)
        assert file_hashes.sha256(large) == first
    large.write_bytes(b"two")
    assert file_hashes.sha256(large) == hashlib.sha256(b"two").hexdigest()
    assert (tmp_path / "caches" / "gqa" / "hashes").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("content", ["", "x" * 64, "0" * 65, "0" * 63])
def test_what_is_no_hash_is_not_taken_for_one(large, tmp_path, content):
    file_hashes.sha256(large)
    (kept,) = (tmp_path / "caches" / "gqa" / "hashes").iterdir()
    kept.write_text(content)
    file_hashes._remembered.clear()
    assert file_hashes.sha256(large) == hashlib.sha256(b"one").hexdigest()


def test_hashes_that_others_could_write_are_not_read(large, tmp_path):
    file_hashes.sha256(large)
    folder = tmp_path / "caches" / "gqa" / "hashes"
    (kept,) = folder.iterdir()
    kept.write_text("0" * 64)
    folder.chmod(0o777)
    file_hashes._remembered.clear()
    assert file_hashes.sha256(large) == hashlib.sha256(b"one").hexdigest()
