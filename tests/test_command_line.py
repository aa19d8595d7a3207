"""The library's command line as a user runs it: help, mistakes and exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

from gqa.__main__ import COMMANDS, run_command
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
