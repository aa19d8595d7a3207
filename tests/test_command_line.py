"""The library's command line as a user runs it: help, mistakes and exit status."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gqa.__main__ import COMMANDS, run_command
from gqa.runtime import command_line
from gqa.runtime.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_one_screen(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m gqa {command} ")
    assert COMMANDS[command][1] in " ".join(text.split())
    assert text.count("\n") <= 24


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        run_command(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert text.count("\n") <= 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["konvert"], "argument COMMAND: invalid choice: 'konvert'"),
        (["kv-cache"], "the following arguments are required: model"),
        (
            ["convert", "a", "b", "--heads=2"],
            "the following arguments are required: --num-kv-heads",
        ),
        (["convert", "a", "b", "--num-kv-heads=x"], "argument --num-kv-heads: invalid int value"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        run_command(arguments)
    assert str(error.value).startswith(message)
    assert "--help lists" in str(error.value)


def test_the_exit_status_of_a_mistake_is_2():
    done = subprocess.run(
        [sys.executable, "-m", "gqa", "konvert"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: argument COMMAND: invalid choice: 'konvert'")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_ends_the_program_quietly():
    """As in `python -m gqa kv-cache T5-XL | head -0`: the status is that of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "gqa", "kv-cache", "T5-XL"]
    done = subprocess.run(line, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("value", ["1", "True"])
def test_64_bits_are_refused(value, monkeypatch, capsys):
    monkeypatch.setenv("JAX_ENABLE_X64", value)
    assert command_line.status(lambda: print("ran")) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: JAX_ENABLE_X64={value} makes JAX compute in 64 bits")
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    assert command_line.status(lambda: print("ran")) == 0


def in_a_process(call, **variables):
    """Run a call, as Python's text, as a command with further environment variables."""
    code = f"import sys; from gqa.runtime import command_line;sys.exit(command_line.status({call}))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_told_in_one_line(platform):
    done = in_a_process("lambda: __import__('jax').devices()", JAX_PLATFORMS=platform)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"error: JAX_PLATFORMS={platform}: JAX has no such device here; install JAX for it, or"
    )
    assert "Traceback" not in done.stderr


def test_an_assertion_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for error in (AssertionError(), RuntimeError("x"), OSError(errno.ENOENT, "x", "y"), KeyError()):
        assert command_line.describe_failure(error) is None


@pytest.mark.parametrize("number", command_line.ADVICE)
def test_what_the_system_refuses_is_told_with_its_path(number):
    error = OSError(number, os.strerror(number), "/some\nwhere")
    code, line = command_line.describe_failure(error)
    assert code == 2
    assert line.startswith(f"error: /some where: {os.strerror(number)}; ")
    assert "\n" not in line
    error.filename = None
    assert command_line.describe_failure(error)[1].startswith(f"error: {os.strerror(number)}; ")


def test_links_in_a_circle_are_told_in_one_line(tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert command_line.status((loop / "x").resolve) == 2
    said = capsys.readouterr().err
    assert said == f"error: {loop / 'x'}: its links lead in a circle; choose another path\n"


@pytest.mark.parametrize("name", ["JAX_ENABLE_X64", "JAX_DISABLE_JIT", "JAX_DEBUG_NANS"])
def test_a_variable_that_jax_does_not_understand_is_named(name):
    done = in_a_process("lambda: __import__('jax')", **{name: "maybe"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: invalid truth value 'maybe' for environment")
    assert done.stderr.endswith(f"'{name}'; unset it or correct it\n")
    assert done.stderr.count("\n") == 1


def test_a_folder_that_was_deleted_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert command_line.status(lambda: Path("x").absolute()) == 2
    said = capsys.readouterr().err
    assert said == "error: the current folder has been deleted; change to another one\n"
    os.chdir(ROOT)


def test_ctrl_c_during_imports_has_its_status():
    assert command_line.describe_failure(KeyboardInterrupt())[0] == 130


def test_no_output_is_no_error(monkeypatch):
    """As in `python -m gqa kv-cache T5-XL >&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    assert command_line.status(lambda: print("nobody reads this")) == 0
