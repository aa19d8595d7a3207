"""A stage is run from its folder: once, by one process, and published whole."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import stage as stages
from experiments import worker
from experiments.plan import Stage
from experiments.stage import Outcome, finish, lock, read_done, record, write_whole
from gqa import results
from gqa.errors import UserError

VARIANT = {"size": "nano", "num_kv_heads": 8, "method": "none", "alpha": 0.0, "seed": 0}
SETUP = {"run": "r", "text": {}, "checkpoint": {"keep_last": 1}}
PLANNED = Stage("pretrain", {"variant": VARIANT}, (), SETUP)
ORIGIN = {"commit": "c", "device": "d", "time": "t"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A described stage whose work is two numbers, counted in the file `runs`."""

    def outcome(folder, what):
        with open(tmp_path / "runs", "a") as file:
            file.write(what["label"] + "\n")
        return Outcome([record("a", 1.0, "s"), record("b", 2.0, "s")])

    monkeypatch.setattr(worker, "_outcome", outcome)
    return worker.describe(PLANNED, tmp_path)


def published(folder):
    return [r["metric"] for r in results.read(folder.parent.parent / "results.jsonl")]


def test_a_stage_is_done_once_and_published_once(folder, tmp_path):
    for _ in range(2):
        worker.run(folder)
    assert (tmp_path / "runs").read_text().count("\n") == 1
    assert published(folder) == ["a", "b"]
    (line, _) = results.read(tmp_path / "results.jsonl")
    assert line["run"] == "r"
    assert line["stage_key"] == PLANNED.key
    assert line["variant"] == VARIANT
    assert read_done(folder)["seconds"] >= 0


def test_what_a_kill_kept_from_being_published_is_published_later(folder, tmp_path):
    finish(folder, Outcome([record("a", 1.0, "s"), record("b", 2.0, "s")]), ORIGIN, 1.0)
    worker.run(folder)
    assert published(folder) == ["a", "b"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text(lines[0])
    worker.run(folder)
    assert published(folder) == ["a", "a", "b"]  # `results.latest` takes the last of each
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_was_interrupted_has_no_duration(folder):
    (folder / "checkpoints").mkdir()
    worker.run(folder)
    assert read_done(folder)["seconds"] is None


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


def test_two_processes_do_not_share_a_stage(folder):
    with lock(folder / "lock", "x"), pytest.raises(UserError, match=r"stage in .* is in use"):
        worker.run(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"kind": "launch", "parents": []}', '{"kind": "convert", "parents": ["../x"]}'],
)
def test_only_a_stage_is_run(folder, text):
    (folder / "stage.json").write_text(text)
    with pytest.raises(UserError, match=r"stage.json: not the description of a stage"):
        worker.run(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"records": []}', "\xff"])
def test_a_damaged_result_is_named(folder, text):
    (folder / "done.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"done.json is damaged; remove it"):
        worker.run(folder)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "before")
    monkeypatch.setattr(stages.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_parent_that_is_not_finished_is_named(tmp_path):
    parent = tmp_path / "stages" / "pretrain-1"
    parent.mkdir(parents=True)
    with pytest.raises(UserError, match="pretrain-1 is not finished"):
        worker._result(parent)
    finish(parent, Outcome([], "../../elsewhere/12"), ORIGIN, 1.0)
    assert worker._result(parent) == parent / "checkpoints" / "12"


def test_the_process_says_what_is_wrong_in_one_line(tmp_path):
    root = Path(worker.__file__).parent.parent
    command = [sys.executable, "-m", "experiments.worker", str(tmp_path / "stages" / "x")]
    for argv in (command, command[:-1]):
        done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_what_is_written_down_is_what_was_planned(folder):
    what = json.loads((folder / "stage.json").read_text())
    assert what["settings"] == PLANNED.settings
    assert what["setup"] == SETUP
