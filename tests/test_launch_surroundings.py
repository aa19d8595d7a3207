"""Where a job may not lie, and what surrounds it: each trouble is one line with what to do."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

import launch
from experiments.run import process
from experiments.workdir import make_workdir
from gqa.runtime.errors import UserError
from tests.support.jobs import ENVIRONMENT, ROOT, TINY

PLACES = ("gs://bucket/runs", "s3://bucket/a", "https://host/a", "file:///runs", "gs:/bucket")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "flag",
    [
        "--workdir",
        "--config.files.train",
        "--config.documents.validation",
        "--config.text.vocabulary",
        "--config.text.data_dir",
        "--config.init.huggingface",
        "--config.init.t5x",
    ],
)
def test_a_url_is_refused_with_what_to_do(flag, place, capsys, tmp_path, monkeypatch):
    arguments = ["--config=configs/gqa8.py", f"--workdir={tmp_path / 'runs'}", f"{flag}={place}"]
    assert launch.main(["launch.py", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    key = flag.removeprefix("--config.")
    assert f"error: {key}='{place}' is a URL; mount the bucket or copy its files" in said
    assert not (tmp_path / "runs").exists()


def test_a_url_as_a_checkpoint_is_refused(capsys):
    arguments = ["--config=configs/gqa8.py", "--stage=evaluate", "--checkpoint=gs://a/b"]
    assert launch.main(["launch.py", *arguments]) == 2
    assert "--checkpoint='gs://a/b' is a URL; mount the bucket" in capsys.readouterr().err


def run(workdir, *arguments, limit="", **environment):
    """Exit status and stderr of a pretraining that would take two steps of a tiny network."""
    settings = TINY | {"pretrain.steps": 2, "finetune.tasks": ""}
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    words = [sys.executable, "launch.py", "--config=configs/mha.py", *words, *arguments]
    script = f"{limit} exec {shlex.join([*words, f'--workdir={workdir}'])}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def assert_one_line(code, said, word):
    assert code == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert word in said


def make_places(tmp_path):
    """Workdirs that cannot be used, each with a word of what is said of it."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "stages").symlink_to(tmp_path / "nowhere")
    return {
        "file": "file",
        "file/runs": "Not a directory",
        "dangling": "dangling",
        "loop": "loop",
        "x" * 300: "too long",
        "a/" * 3000: "too long",
        "inside": "stages: a link that leads nowhere; delete it",
    }


def test_a_place_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    for place, word in make_places(tmp_path).items():
        with pytest.raises(UserError, match=word):
            make_workdir(tmp_path / place)


def test_launch_says_it_in_one_line():
    assert_one_line(*run("/proc/runs"), "/proc/runs")


def test_a_limit_on_files_is_one_line(tmp_path):
    code, said = run(tmp_path / "runs", "--stage=pretrain", limit="ulimit -f 40;")
    assert_one_line(code, said, "ulimit -f")


def test_what_a_notebook_sets_does_not_matter(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    assert process.status(lambda: None) == 0
    script = (
        "import matplotlib.figure; matplotlib.figure.Figure().savefig('/dev/null', format='png')"
    )
    subprocess.run([sys.executable, "-c", script], env=os.environ, check=True)


@pytest.mark.parametrize(("name", "value"), [("JAX_ENABLE_X64", "1"), ("JAX_PLATFORMS", "cuda")])
def test_an_environment_that_does_not_do_is_named(name, value, tmp_path):
    assert_one_line(*run(tmp_path / "runs", **{name: value}), f"{name}={value}")


def test_a_reader_that_goes_away_ends_the_run_quietly(tmp_path):
    command = [sys.executable, "launch.py", "--config=configs/mha.py", "--dry-run"]
    words = shlex.join([*command, f"--workdir={tmp_path / 'runs'}"])
    script = f"set -o pipefail; {words} | true"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE
