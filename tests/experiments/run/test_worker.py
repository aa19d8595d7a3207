"""A stage is run from its folder: once, by one process, and published whole."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base
from experiments.graph.plan import plan
from experiments.graph.stage import Stage
from experiments.run import worker
from experiments.stages.folder import Outcome, StageFolder, record
from experiments.stages.inputs import Job
from experiments.stages.settings import CheckpointOptions, Setup, TextSettings, UptrainSettings
from experiments.stages.text import Text
from experiments.stages.typed_json import to_json
from experiments.workdir import lock
from gqa.evaluation import results
from gqa.runtime.errors import DamagedCheckpoint, UserError
from gqa.runtime.mesh import WHOLE, make_mesh
from tests.support import variants

VARIANT = variants.grouped()
SETUP = Setup("r", TextSettings((), "", "unigram", 512, "docstrings", (), {}))
PLANNED = plan(base.get_config(), None)[0]
PLANNED = dataclasses.replace(PLANNED, setup=SETUP)
ORIGIN = {"commit": "c", "device": "d", "time": "t"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A described stage whose work is two numbers, counted in the file `runs`."""

    def outcome(folder, description):
        with open(tmp_path / "runs", "a") as file:
            file.write(description.label + "\n")
        return Outcome([record("a", 1.0, "s"), record("b", 2.0, "s")])

    monkeypatch.setattr(worker, "_run_module", outcome)
    return worker.describe(PLANNED, tmp_path)


def published(folder):
    return [r["metric"] for r in results.read(folder.workdir / "results.jsonl")]


def test_a_stage_is_done_once_and_published_once(folder, tmp_path):
    for _ in range(2):
        worker.run(folder)
    assert (tmp_path / "runs").read_text().count("\n") == 1
    assert published(folder) == ["a", "b"]
    (line, _) = results.read(tmp_path / "results.jsonl")
    assert line["run"] == "r"
    assert line["stage_key"] == PLANNED.key
    assert line["variant"] == to_json(PLANNED.variant)
    assert folder.read_outcome().seconds >= 0


def test_what_a_kill_kept_from_being_published_is_published_later(folder, tmp_path):
    folder.write_outcome(Outcome([record("a", 1.0, "s"), record("b", 2.0, "s")], None, ORIGIN, 1.0))
    worker.run(folder)
    assert published(folder) == ["a", "b"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text(lines[0])
    worker.run(folder)
    assert published(folder) == ["a", "a", "b"]  # `results.latest` takes the last of each
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_was_interrupted_has_no_duration(folder):
    folder.checkpoints.mkdir()
    worker.run(folder)
    assert folder.read_outcome().seconds is None


def test_two_processes_do_not_share_a_stage(folder):
    with lock(folder.lock, "x"), pytest.raises(UserError, match=r"stage in .* is in use"):
        worker.run(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "launch"}, "stage.kind is 'launch'; use one of pretrain, convert"),
        ({"kind": "convert"}, "stage.settings.cache_lengths is missing"),
        ({"parents": ["../x"]}, "stage.parents has '../x', which is no name of a folder"),
        ({"parents": [".."]}, "stage.parents has '..', which is no name of a folder"),
        ({"parents": ["."]}, "stage.parents has '.', which is no name of a folder"),
        ({"parents": [""]}, "stage.parents has '', which is no name of a folder"),
        ({"parents": ["a\0"]}, "stage.parents has "),
        ({"title": "../../x"}, "stage.title has '../../x', which is no name of a folder"),
        ({"more": 1}, "stage.more is unknown"),
    ],
)
def test_only_a_stage_is_run(folder, change, problem):
    path = folder.path / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"stage.json: not the description of a stage: {problem}"):
        worker.run(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**6, '{"kind": ' * 10**5])
def test_a_description_that_is_no_json_object_is_refused(folder, text):
    (folder.path / "stage.json").write_text(text)
    with pytest.raises(UserError, match=r"stage.json: .* should be the description of a stage"):
        worker.run(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"records": []}', "\xff", "[" * 10**6, '{"records": ' * 10**5]
)
def test_a_damaged_result_is_named(folder, text):
    (folder.path / "done.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"done.json is damaged; remove it"):
        worker.run(folder)


def test_a_parent_that_is_not_finished_is_named(tmp_path):
    parent = tmp_path / "stages" / "pretrain-1"
    parent.mkdir(parents=True)
    with pytest.raises(UserError, match="pretrain-1 is not finished"):
        StageFolder(parent).result()
    StageFolder(parent).write_outcome(Outcome([], "12", ORIGIN, 1.0))
    assert StageFolder(parent).result() == parent / "checkpoints" / "12"


@pytest.mark.parametrize(
    "change",
    [
        *({"checkpoint": name} for name in ("../../elsewhere/12", "..", "", "x", "1/..", "²")),
        *({"seconds": seconds} for seconds in (math.nan, math.inf, -1.0)),
        *({"records": [record]} for record in ({}, {"metric": "a"}, {"value": "b"})),
        {"records": [{"metric": "a", "value": "b", "unit": "s"}]},
        {"records": [{"metric": 1, "value": 2, "unit": "s"}]},
    ],
)
def test_an_outcome_that_no_stage_leaves_is_refused(tmp_path, change):
    outcome = Outcome([record("a", 1.0, "s")], "12", ORIGIN, 1.0)
    StageFolder(tmp_path).write_outcome(outcome)
    assert StageFolder(tmp_path).read_outcome() == outcome
    StageFolder(tmp_path).write_outcome(dataclasses.replace(outcome, **change))
    with pytest.raises(UserError, match=r"done.json is damaged; remove it"):
        StageFolder(tmp_path).read_outcome()


def test_files_of_a_stage_are_read_only_where_they_are_regular(folder):
    for name in ("stage.json", "done.json"):
        (folder.path / name).unlink(missing_ok=True)
        os.mkfifo(folder.path / name)
    with pytest.raises(UserError, match=r"stage.json: .*pipe"):
        folder.read_description()
    with pytest.raises(UserError, match=r"done.json is damaged"):
        folder.read_outcome()


def parents_of(checkpoints):
    return [path.parent.parent for path in checkpoints]


class Module:
    """Stands for a stage's module: needs its parent's checkpoint, and its own, undamaged."""

    def __init__(self, *damaged):
        self.damaged, self.done = list(damaged), []

    def run(self, label, settings, folder, parents, job):
        self.done.append(folder.name.partition("-")[0])
        for step in [
            d for d in self.damaged if d.parent.parent in (folder.path, *parents_of(parents))
        ]:
            self.damaged.remove(step)
            raise DamagedCheckpoint(step, "x is missing")
        (folder.checkpoints / "4" / "params").mkdir(parents=True, exist_ok=True)
        return Outcome([record("a", 1.0, "s")], "4")


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A function of on_damage: the folders of a finished parent and of a child that is not."""

    def make(on_damage):
        setup = dataclasses.replace(SETUP, checkpoint=CheckpointOptions(1, on_damage))
        parent = dataclasses.replace(PLANNED, setup=setup)
        child = Stage("uptrain", UptrainSettings(VARIANT), (parent,), setup)
        folders = [worker.describe(stage, tmp_path) for stage in (parent, child)]
        for folder in folders:
            for step in "246":
                (folder.checkpoints / step / "params").mkdir(parents=True)
        folders[0].write_outcome(Outcome([record("a", 1.0, "s")], "4", ORIGIN, 1.0))
        return folders

    def use(module):
        monkeypatch.setattr(worker.importlib, "import_module", lambda _: module)
        job = Job(tmp_path, SETUP, Text(None, None, {}, tmp_path), make_mesh(), WHOLE)
        monkeypatch.setattr(worker, "_make_job", lambda *_: job)
        return module

    make.use = use
    return make


def test_damage_stops_a_stage_unless_the_user_said_otherwise(family):
    _, child = family("stop")
    module = family.use(Module(child.checkpoints / "4"))
    with pytest.raises(DamagedCheckpoint, match="x is missing"):
        worker.run(child)
    assert module.done == ["uptrain"]
    assert {p.name for p in child.checkpoints.iterdir()} == {"2", "4", "6"}


def test_a_stage_goes_on_from_before_the_damage(family):
    _, child = family("previous")
    module = family.use(Module(child.checkpoints / "4"))
    worker.run(child)
    assert module.done == ["uptrain", "uptrain"]
    names = {p.name for p in child.checkpoints.iterdir()}
    assert names == {"2", "4.damaged", "6.later", "4"}
    assert child.read_outcome().checkpoint == "4"


def test_a_damaged_parent_is_done_again_first(family):
    parent, child = family("previous")
    module = family.use(Module(parent.checkpoints / "4"))
    worker.run(child)
    assert module.done == ["uptrain", "pretrain", "uptrain"]
    assert (parent.checkpoints / "4.damaged").exists()
    assert parent.read_outcome().seconds is None  # not of all of it


def test_what_others_left_is_not_set_aside(family, tmp_path):
    _, child = family("previous")
    theirs = tmp_path / "theirs" / "checkpoints" / "4"
    theirs.mkdir(parents=True)

    class Foreign(Module):
        def run(self, *_):
            raise DamagedCheckpoint(theirs, "x is missing")

    family.use(Foreign())
    with pytest.raises(DamagedCheckpoint):
        worker.run(child)
    assert theirs.exists()


def test_the_process_says_what_is_wrong_in_one_line(tmp_path):
    root = Path(worker.__file__).parent.parent.parent
    command = [sys.executable, "-m", "experiments.run.worker", str(tmp_path / "stages" / "x")]
    for argv in (command, command[:-1]):
        done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_what_is_written_down_is_what_was_planned(folder):
    description = folder.read_description()
    assert description.settings == PLANNED.settings
    assert description.setup == SETUP
    values = json.loads((folder.path / "stage.json").read_text())
    assert values["settings"]["recipe"]["task"] == "pronounce"
