"""What a program says, and its exit status, when it ends by an error."""

import errno
import signal
from pathlib import Path

import pytest

from experiments.run import process
from gqa.runtime.errors import DamagedCheckpoint, DivergedError, UserError
from gqa.runtime.signals import Interrupted

DAMAGED = DamagedCheckpoint(Path("/runs/3"), "params/a is missing")
ON_DAMAGE = "--config.checkpoint.on_damage=previous"
ON_DIVERGENCE = "--config.train.on_divergence=rollback"


def diverged(*, rollback_allowed):
    return DivergedError("the loss is nan", 5, Path("/runs/3"), rollback_allowed=rollback_allowed)


def end_by(error, capsys):
    """Exit status and the line on stderr of a program that raises `error`."""

    def run():
        raise error

    code = process.status(run)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return code, printed.removesuffix("\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("size=9; use 1"), 2, "error: size=9; use 1"),
        (Interrupted(signal.SIGTERM, "at step 3"), 128 + signal.SIGTERM, "stopped: at step 3"),
    ],
)
def test_an_error_of_the_user_and_a_signal_are_one_line(error, code, line, capsys):
    assert end_by(error, capsys) == (code, line)


def test_a_full_disk_is_one_line_with_its_file(capsys):
    code, line = end_by(OSError(errno.ENOSPC, "No space left on device", "/runs/x"), capsys)
    assert code == 2
    assert line.startswith("error: no space left on device for /runs/x; free some")


def test_a_defect_keeps_its_traceback():
    def run():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        process.status(run)


@pytest.mark.parametrize(
    ("error", "flag"), [(DAMAGED, ON_DAMAGE), (diverged(rollback_allowed=True), ON_DIVERGENCE)]
)
def test_launch_names_the_command_that_goes_on(error, flag, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch.py", "--config=configs/gqa8.py", "--workdir=my runs"])
    code, line = end_by(error, capsys)
    assert code == 2
    assert line.startswith(f"error: {error}; {flag} ")
    assert line.endswith(f"python launch.py --config=configs/gqa8.py '--workdir=my runs' {flag}")


@pytest.mark.parametrize(
    ("error", "flag"), [(DAMAGED, ON_DAMAGE), (diverged(rollback_allowed=True), ON_DIVERGENCE)]
)
def test_a_worker_names_the_flag_alone(error, flag, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["worker.py", "runs/stages/pretrain-1"])
    _, line = end_by(error, capsys)
    assert line.startswith(f"error: {error}; {flag} ")
    assert "python" not in line


def test_a_summary_of_failures_names_the_flag_for_the_first(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch.py"])
    summary = UserError("2 stages failed")
    summary.__cause__ = DAMAGED
    _, line = end_by(summary, capsys)
    assert line.startswith(f"error: 2 stages failed; {ON_DAMAGE} ")


def test_without_a_rollback_left_the_flag_for_more_is_named(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch.py"])
    _, line = end_by(diverged(rollback_allowed=False), capsys)
    assert line == "error: the loss is nan (--config.train.max_rollbacks=N)"
