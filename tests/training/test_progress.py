"""Test that rates count training alone, and that the terminal, TensorBoard and W&B agree."""

import json
import os
import struct
import sys

import pytest

from gqa.runtime.errors import UserError
from gqa.training import progress
from gqa.training.progress import Progress

METRICS = {"loss": 2.0, "accuracy": 0.25, "learning_rate": 0.1, "input_tokens": 60, "tokens": 12}


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now

    def time_ns(self):
        return int(self.now * 1e9)


class Terminal:
    """Standard error that takes itself for a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Scalars:
    """What TensorBoard gets: `values` by (name, step), and the steps it begins at."""

    def __init__(self, *_):
        self.values, self.begins, self.flushed = {}, [], 0

    def __call__(self, *_):
        return self

    def write_event(self, event):
        if event.HasField("session_log"):
            self.begins.append(event.step)
            for key in [key for key in self.values if key[1] >= event.step]:
                del self.values[key]
        for value in event.summary.value:
            self.values[value.tag, event.step] = value.simple_value

    def flush(self):
        self.flushed = len(self.values)

    def close(self):
        self.flush()


@pytest.fixture
def events(monkeypatch) -> Scalars:
    events = Scalars()
    monkeypatch.setattr(progress, "EventsWriter", events)
    return events


@pytest.fixture
def scalars(events) -> dict:
    return events.values


def run(clock, folder, steps, every, first=0, peak=100.0):
    """Steps of 2 s, and of 2 s more after each line; the first of 50 s; validations of 30 s."""
    with Progress("test", folder, every, 50.0, peak) as bar:
        bar.start(first, first + steps)
        seconds = 2
        for step in range(first + 1, first + steps + 1):
            clock.now += 50 if step == first + 1 else seconds
            bar.step(step, METRICS)
            if step % every == 0:
                seconds += 2
                with bar.pause():
                    clock.now += 30


@pytest.mark.parametrize(("every", "first"), [(3, 0), (1, 0), (3, 5)])
def test_rates_are_of_training_since_the_last_line(clock, scalars, tmp_path, every, first):
    run(clock, tmp_path, 7, every, first)
    last = first + 7
    lines = [step for name, step in scalars if name == "loss"]
    assert lines == [s for s in range(first + 1, last + 1) if s % every == 0 or s == last]
    for line, step in enumerate(lines):
        if step == first + 1:  # of a step that was compiled there is no rate
            assert ("mfu", step) not in scalars
            continue
        seconds = 2 * (line + 1)
        assert scalars["input_tokens_per_second", step] == pytest.approx(60 / seconds)
        assert scalars["target_tokens_per_second", step] == pytest.approx(12 / seconds)
        assert scalars["mfu", step] == pytest.approx(50 / seconds / 100)


def test_a_line_says_all(clock, scalars, tmp_path, capsys):
    run(clock, tmp_path, 4, every=2)
    assert capsys.readouterr().out.splitlines() == [
        "test  step 2/4  loss 2.000  accuracy 0.250  30 input + 6 target tokens/s  MFU 25.0%  "
        "52 s left",
        "test  step 4/4  loss 2.000  accuracy 0.250  15 input + 3 target tokens/s  MFU 12.5%  "
        "0 s left",
    ]


def test_the_bar_says_all(clock, scalars, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(clock, tmp_path, 4, every=2)
    expected = "loss 2.000  accuracy 0.250  30 input + 6 target tokens/s  MFU 25.0%"
    assert expected.replace("  ", "") in sys.stderr.text.replace("  ", "")


def test_without_a_known_peak_there_is_no_mfu(clock, scalars, tmp_path, capsys):
    run(clock, tmp_path, 4, every=2, peak=None)
    assert "3 target tokens/s  0 s left" in capsys.readouterr().out
    assert not [name for name, _ in scalars if name == "mfu"]
    assert scalars["target_tokens_per_second", 4] == pytest.approx(3)


def test_every_line_is_flushed_and_what_is_done_again_replaces_what_was_lost(
    clock, events, tmp_path
):
    with Progress("test", tmp_path, 1, 50.0, None) as bar:
        bar.start(0, 4)
        for step in range(1, 4):
            clock.now += 1
            bar.step(step, METRICS)
            assert events.flushed == len(events.values)
        bar.start(1, 4)
        bar.step(2, METRICS | {"loss": 3.0})
    assert events.begins == [1, 2]
    losses = {step: value for (name, step), value in events.values.items() if name == "loss"}
    assert losses == {1: 2.0, 2: 3.0}


def test_a_curve_has_every_validation_once(clock, events, tmp_path):
    """Of a step that was done again the last; half a line is what a kill leaves."""
    curve = tmp_path / "curve.jsonl"
    for first, losses in ((0, (3.0, 2.0)), (1, (2.5, 1.0))):
        with Progress("test", tmp_path / "events", 1, 50.0, None, curve=curve) as bar:
            bar.start(first, 4)
            bar.scalars(first + 1, {"mfu": 0.5})
            for step, loss in enumerate(losses, first + 1):
                bar.scalars(step, {"validation_loss": loss})
        with open(curve, "a") as file:
            file.write("\n[7, 3." if first == 0 else "\n[8")
    assert progress.read_curve(curve) == [(1, 3.0), (2, 2.5), (3, 1.0)]


def test_a_curve_is_not_written_through_a_link_nor_into_a_pipe(clock, events, tmp_path):
    curve, other = tmp_path / "curve.jsonl", tmp_path / "other"
    other.write_text("precious")
    for make, said in (
        (lambda: curve.symlink_to(other), "is a link"),
        (lambda: os.mkfifo(curve), "not a regular file"),
    ):
        make()
        with Progress("test", tmp_path / "events", 1, 50.0, None, curve=curve) as bar:
            bar.start(0, 4)
            with pytest.raises(UserError, match=f"{curve}: {said}"):
                bar.scalars(1, {"validation_loss": 2.0})
        curve.unlink()
    assert other.read_text() == "precious"


@pytest.mark.parametrize(
    "line",
    [b"[" * 10**5, b'["x", 1.0]', b'[3, "x"]', b"[3, [1]]", b"[true, 1]", b"[3, NaN]", b"\xff\xfe"],
)
def test_what_is_no_point_of_a_curve_is_passed_over(tmp_path, line):
    curve = tmp_path / "curve.jsonl"
    curve.write_bytes(b"\n[1, 3.0]\n" + line + b"\n[2, 2.5]")
    assert progress.read_curve(curve) == [(1, 3.0), (2, 2.5)]


def test_a_curve_is_a_regular_file_of_a_bounded_size(tmp_path):
    curve = tmp_path / "curve.jsonl"
    os.mkfifo(curve)
    with pytest.raises(UserError, match=f"{curve}: is a device, a pipe"):
        progress.read_curve(curve)
    curve.unlink()
    with open(curve, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=f"{curve}: has more than"):
        progress.read_curve(curve)


def test_a_full_disk_is_told(clock, events, tmp_path, monkeypatch):
    def fail():
        raise OSError(28, "No space left on device")

    with Progress("test", tmp_path, 1, 50.0, None) as bar:
        bar.start(0, 4)
        clock.now += 1
        monkeypatch.setattr(events, "flush", fail)
        with pytest.raises(UserError, match=f"no space left on device while .*{tmp_path}; free"):
            bar.step(1, METRICS)
        monkeypatch.undo()


def test_event_files_are_read_back(tmp_path):
    """Two runs in the same second have files of their own."""
    for first in (0, 2):
        with Progress("test", tmp_path / "a title", 1, 50.0, None) as bar:
            bar.start(first, first + 2)
            for step in (first + 1, first + 2):
                bar.step(step, METRICS)
    files = sorted((tmp_path / "a title").iterdir())
    assert len(files) == 2
    assert all("tfevents" in file.name and b"learning_rate" in file.read_bytes() for file in files)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_tracking_without_its_package_is_refused(monkeypatch, mode):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=f"wandb.mode={mode} .*: pip install wandb$"):
        progress.check(mode)
    progress.check("off")


def read_tracked(file):
    """(rows of metrics, the run as W&B has it) of an offline run's file.

    It is a LevelDB log: blocks of 32 KiB with pieces of records, each behind 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, data, rows, run = file.read_bytes(), 7, b"", [], None
    while place < len(content):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # the only piece, the last piece
            continue
        record, data = Record.FromString(data), b""
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows, run


@pytest.mark.filterwarnings("ignore")  # its own
def test_tracked_offline_it_gets_the_same_numbers(tmp_path):
    pytest.importorskip("wandb")
    progress.check("offline")
    tracking = progress.Tracking(
        "offline", "gqa", "gqa8-nano", "finetune a (8 KV heads)", "finetune-abc-123", tmp_path
    )
    for first in (0, 2):
        with Progress("test", tmp_path / "events", 2, 50.0, None, tracking) as bar:
            bar.start(first, first + 2)
            for step in (first + 1, first + 2):
                bar.step(step, METRICS | {"loss": 1.0 / step})
            bar.scalars(first + 2, {"validation_loss": 5.0 + step})
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-finetune-abc-123.wandb"))
    assert len(files) == 2
    rows, run = read_tracked(files[1])
    assert (run.project, run.run_group) == ("gqa", "gqa8-nano")
    assert (run.run_id, run.display_name) == ("finetune-abc-123", "finetune a (8 KV heads)")
    assert [(row["step"], row.get("loss")) for row in rows] == [(4, 0.25), (4, None)]
    assert rows[1]["validation_loss"] == 9.0
