"""The tour runs from its first cell to its last, and its two forms say the same."""

import copy
import os
import subprocess
import sys

import pytest

from tests import make_tour

ROOT = make_tour.DOCS.parent


def test_the_page_and_the_notebook_have_the_same_text_code_and_outputs():
    page = (make_tour.DOCS / "tour.md").read_text(encoding="utf-8")
    assert page == make_tour.markdown(make_tour.read())


def test_every_cell_was_executed_in_order():
    cells = make_tour.code_cells(make_tour.read())
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


def test_changed_code_is_noticed():
    notebook = copy.deepcopy(make_tour.read())
    make_tour.code_cells(notebook)[0]["source"].append("\nprint('more')")
    assert make_tour.markdown(notebook) != make_tour.markdown(make_tour.read())


@pytest.mark.slow
def test_it_runs_in_three_minutes():
    """Its cells assert what they claim. In a process of its own, without the tests' settings."""
    script = "from tests import make_tour; make_tour.run(make_tour.read())"
    command = [sys.executable, "-c", script]
    # The flags with which the tests compile faster would make its training slow.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
