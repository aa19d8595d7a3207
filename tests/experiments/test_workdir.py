"""The workdir is made or refused, locked by one process, and its files are never half written."""

import multiprocessing
import os
from pathlib import Path

import pytest

from experiments import workdir
from experiments.workdir import lock, write_whole
from gqa.runtime.errors import UserError


def hold(path, ready, leave):
    with lock(path, "it"):
        ready.set()
        leave.wait()


def test_a_lock_is_for_one_process_and_goes_with_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "lock", ready, leave))
    other.start()
    ready.wait()
    message = f"runs is in use by process {other.pid} on .*; wait for it, stop it, or use another"
    with pytest.raises(UserError, match=message), lock(tmp_path / "lock", "runs"):
        pass
    other.kill()
    other.join()
    with lock(tmp_path / "lock", "runs"):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


@pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path, make):
    (tmp_path / "precious").write_text("kept")
    getattr(tmp_path / "lock", make)(tmp_path / "precious")
    with pytest.raises(UserError, match=r"lock: .*delete it"), lock(tmp_path / "lock", "runs"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_dangling_link_makes_no_file(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "new")
    with pytest.raises(UserError, match="is a link"), lock(tmp_path / "lock", "runs"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_lock_that_is_a_pipe_or_a_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match=name), lock(tmp_path / name, "runs"):
            pass


def test_a_lock_that_was_deleted_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Another process deletes the file after this one has opened it and before it is locked."""
    path, flock, deleted = tmp_path / "lock", workdir.fcntl.flock, []

    def delete_first(file, how):
        if not deleted:
            deleted.append(path.stat().st_ino)
            path.rename(tmp_path / "old")  # its inode must not be used again
        return flock(file, how)

    monkeypatch.setattr(workdir.fcntl, "flock", delete_first)
    with lock(path, "runs"):
        assert path.stat().st_ino != deleted[0]
        assert str(os.getpid()) in path.read_text()
        with pytest.raises(UserError, match="in use"), lock(path, "runs"):
            pass


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "before")
    monkeypatch.setattr(
        workdir.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a[b]", "a\\b", "gs://bucket/runs", "s3://bucket/runs"])
def test_a_workdir_whose_checkpoints_could_not_be_read_is_refused_at_once(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--workdir=.* use a folder whose path|mount the bucket"):
        workdir.make_workdir(Path(name) / "runs")
    assert not list(tmp_path.iterdir())
