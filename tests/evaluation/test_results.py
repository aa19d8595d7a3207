"""Result files survive killed writers, and say where their numbers come from."""

import fcntl
import json
import multiprocessing
import subprocess
import threading
from datetime import datetime

import numpy as np
import pytest

from gqa.evaluation import results
from gqa.runtime.errors import UserError


def record(value, **changes):
    base = {"run": "a", "stage": "evaluate", "task": None, "variant": {"seed": 0}, "metric": "f1"}
    return base | {"value": value} | changes


def test_what_is_appended_is_read_in_order(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    results.append(path, [record(1), record(np.float32(0.5))])
    results.append(path, [record(np.int64(3))])
    assert [r["value"] for r in results.read(path)] == [1, 0.5, 3]


def test_nan_is_refused_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    results.append(path, [record(1)])
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.append(path, [record(2), record(float("nan"))])
    assert results.read(path) == [record(1)]


def test_a_writer_killed_at_any_byte_costs_only_its_last_line(tmp_path):
    path = tmp_path / "results.jsonl"
    results.append(path, [record(1), record("é 2")])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole) + 1):
        path.write_bytes(whole[:size])
        survivors = 1 + (size >= len(whole) - 1)
        assert len(results.read(path)) == survivors
        results.append(path, [record(3)])
        assert [r["value"] for r in results.read(path)] == [*[1, "é 2"][:survivors], 3]
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_broken_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n{"a":\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"results.jsonl:2: not a JSON object"):
        results.read(path)
    for line in (b'{"a": "\xff"}', b"[" * 100_000, b"1" * 5000, b"[1]"):
        path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
        with pytest.raises(UserError, match=r"results.jsonl:2: not a JSON object"):
            results.read(path)
    with pytest.raises(UserError, match=r"absent.jsonl: No such file"):
        results.read(tmp_path / "absent.jsonl")


def append_many(path, writer):
    for i in range(50):
        results.append(path, [record(i, run=writer), record(i, run=writer)])


def test_several_processes_write_to_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_many, args=(path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(r["run"] for r in results.read(path)) == ["a"] * 100 + ["b"] * 100 + ["c"] * 100


def test_a_writer_waits_for_the_lock_of_another(tmp_path):
    path = tmp_path / "results.jsonl"
    results.append(path, [record(1)])
    writer = threading.Thread(target=results.append, args=(path, [record(2)]))
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.5)
        assert writer.is_alive()
        assert len(results.read(path)) == 1
    writer.join()
    assert [r["value"] for r in results.read(path)] == [1, 2]


def test_latest_keeps_the_last_of_each_measurement():
    other_seed = record(2, variant={"seed": 1})
    records = [record(1), other_seed, record(5, task="t"), record(3), record(4, run="b")]
    assert results.latest(records) == [
        other_seed,
        record(5, task="t"),
        record(3),
        record(4, run="b"),
    ]
    same = [record(1, variant={"x": 1, "y": 2}), record(2, variant={"y": 2, "x": 1})]
    assert results.latest(same) == same[1:]


def test_provenance():
    found = results.provenance()
    assert set(found) == {"commit", "device", "time"}
    assert datetime.fromisoformat(found["time"]).utcoffset().total_seconds() == 0
    assert "core" in found["device"]


def test_commit_is_ours_or_unknown(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    inside = tmp_path / "copy"
    inside.mkdir()
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "first")
    monkeypatch.setattr(results, "_SOURCE", inside)
    assert results._commit.__wrapped__() == "unknown"
    monkeypatch.setattr(results, "_SOURCE", tmp_path)
    (tmp_path / "file").write_text("x")
    git("add", "file")
    assert results._commit.__wrapped__().endswith("-dirty")
    git("commit", "--quiet", "-m", "second")
    assert not results._commit.__wrapped__().endswith("-dirty")


def test_what_differs_in_anything_but_value_and_time_is_another_measurement():
    changes = [{}, {"stage": "finetune"}, {"metric": "bleu"}, {"step": 1}, {"step": 2}]
    changes += [{"example": 0}, {"example": 1}, {"run": "b"}, {"task": "t"}]
    records = [record(i, **change) for i, change in enumerate(changes)]
    assert results.latest(records) == records
    again = [r | {"value": 9, "time": "later"} for r in records]
    assert results.latest([*records, *again]) == again
