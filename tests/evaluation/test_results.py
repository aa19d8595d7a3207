"""Result files survive killed writers, and say where their numbers come from."""

import fcntl
import json
import multiprocessing
import os
import subprocess
import threading
from datetime import datetime

import numpy as np
import pytest

from gqa.evaluation import results
from gqa.runtime.errors import UserError


def record(value, **changes):
    base = {"run": "a", "stage": "evaluate", "task": None, "variant": {"seed": 0}, "metric": "f1"}
    base |= {"unit": "%", "commit": "c", "device": "d", "time": "t", "stage_key": "k"}
    return base | dict.fromkeys(("low", "high", "n")) | {"value": value} | changes


def line(**changes):
    return (json.dumps(record(1) | changes) + "\n").encode()


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
    results.append(path, [record(1), record(2, unit="é")])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole) + 1):
        path.write_bytes(whole[:size])
        survivors = 1 + (size >= len(whole) - 1)
        assert len(results.read(path)) == survivors
        results.append(path, [record(3)])
        assert [r["value"] for r in results.read(path)] == [*[1, 2][:survivors], 3]
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_broken_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(line() + b'{"a":\n' + line())
    with pytest.raises(UserError, match=r"results.jsonl:2: not a JSON object"):
        results.read(path)
    deep = b'{"a": ' * 100_000
    for broken in (b'{"a": "\xff"}', b"[" * 100_000, deep, b"1" * 5000, b"[1]", b"\0", b""):
        path.write_bytes(line() + broken + b"\n" + line())
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value": "1"}, 'value is "1"'),
        ({"value": None}, "value is null"),
        ({"value": True}, "value is true"),
        ({"value": float("nan")}, "value is NaN"),
        ({"value": 10**400}, "value is 1000"),
        ({"low": []}, "low is a list"),
        ({"n": 1.5}, "n is 1.5"),
        ({"step": "3"}, 'step is "3"'),
        ({"example": 0}, "is an example without inputs"),
        ({"run": ["a"]}, "run is a list"),
        ({"stage_key": 7}, "stage_key is 7"),
        ({"task": {}}, "task is an object"),
        ({"time": 0}, "time is 0"),
        ({"variant": "MHA"}, 'variant is "MHA"'),
        ({"variant": {"seed": [0]}}, "variant.seed is a list"),
        ({"targets": []}, "has no targets"),
        ({"targets": ["a", 1]}, "targets is 1"),
        ({"replicates": [0.5, None]}, "replicates is null"),
        ({"replicates": 7}, "replicates is 7"),
        ({"parent_value": "x"}, 'parent_value is "x"'),
    ],
)
def test_a_field_of_a_wrong_type_is_named_with_its_line(tmp_path, changes, said):
    path = tmp_path / "results.jsonl"
    path.write_bytes(line() + line(**changes) + line())
    with pytest.raises(UserError) as refused:
        results.read(path)
    assert str(refused.value).startswith(f"{path}:2: ")
    assert said in str(refused.value)
    assert len(str(refused.value)) < len(str(path)) + 150


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    for name in ("run", "stage", "task", "metric", "value", "unit", "variant", "time"):
        path.write_text(json.dumps({k: v for k, v in record(1).items() if k != name}) + "\n")
        with pytest.raises(UserError, match=f"results.jsonl:1: has no field '{name}'"):
            results.read(path)


def test_a_huge_line_is_refused_before_it_is_read(tmp_path):
    """A sparse file of a terabyte, without an end of a line."""
    path = tmp_path / "results.jsonl"
    path.write_bytes(line())
    os.truncate(path, 2**40)
    with pytest.raises(UserError, match=r"results.jsonl:2: longer than 16,777,216 bytes"):
        results.read(path)
    with pytest.raises(UserError, match=r"results.jsonl: its last line has more than 16,777,216"):
        results.append(path, [record(1)])
    assert path.stat().st_size == 2**40


def test_records_are_read_as_regular_files_only(tmp_path):
    path = tmp_path / "results.jsonl"
    os.mkfifo(path)
    for use in (lambda: results.read(path), lambda: results.append(path, [record(1)])):
        with pytest.raises(UserError, match=r"results\.jsonl: (is a|not a)"):
            use()
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"results\.jsonl: not a regular file"):
        results.append(path, [record(1)])


def test_records_are_not_written_through_a_link(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    for to in (target, tmp_path / "absent"):
        path = tmp_path / f"link-{to.name}"
        path.symlink_to(to)
        with pytest.raises(UserError, match="is a link"):
            results.append(path, [record(1)])
    assert target.read_text() == "precious"
    assert not (tmp_path / "absent").exists()


def test_a_long_last_line_is_cut_off_or_ended_whole(tmp_path):
    """Longer than the pieces in which the end of the file is searched."""
    path = tmp_path / "results.jsonl"
    for count in (65_536, 200_000):
        long = line(unit="x" * count)
        for cut, kept in ((2, 1), (1, 2), (0, 2)):
            path.write_bytes(line() + long[: len(long) - cut])
            results.append(path, [record(3)])
            assert [r["value"] for r in results.read(path)] == [1] * kept + [3]


def test_only_the_last_publication_of_the_wanted_stages_is_kept():
    records = [record(1, time="1"), record(2, stage_key="b"), record(3, time="2")]
    records += [record(4, time="2"), record(5, stage_key=None)]
    assert [r["value"] for r in results.of_stages(records, {"k"})] == [3, 4]
    assert results.of_stages(records, {"c"}) == []
