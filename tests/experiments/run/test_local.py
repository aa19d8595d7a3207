"""A graph of stages runs in order, each once, and a failure costs only what builds on it."""

import json
import os
import sys
import time
from dataclasses import dataclass, replace

import pytest

from configs import base
from experiments.graph.plan import plan
from experiments.graph.stage import Stage
from experiments.run import local, worker
from experiments.stages.folder import Outcome
from experiments.stages.settings import Setup, TextSettings
from experiments.stages.variant import Variant
from gqa.runtime.errors import UserError
from tests.support import variants

# Stands for the worker: says when it began and ended, and does what the stage's settings say.
SCRIPT = """
import json, os, pathlib, signal, sys, time
def say(event):
    log = folder.parent.parent / "log"
    with open(log, "a") as file:
        print(time.monotonic(), event, settings["name"], os.getpid(), file=file)
def stop(*_):
    say("stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
for folder in map(pathlib.Path, sys.argv[1:]):
    settings = json.loads((folder / "stage.json").read_text())["settings"]
    say("begins")
    if hasattr(os, "sched_getaffinity"):
        (folder / "cores").write_text(json.dumps([*os.sched_getaffinity(0)]))
    time.sleep(settings["sleep"])
    if settings["fails"]:
        print("error: " + settings["fails"], file=sys.stderr)
        sys.exit(2)
    done = {"records": [], "checkpoint": None, "provenance": {}, "seconds": 1.0}
    (folder / "done.json").write_text(json.dumps(done))
    say("ends")
"""
VARIANT = variants.grouped()


SETUP = Setup("r", TextSettings((), "", "unigram", 512, "docstrings", (), {}))


@dataclass(frozen=True)
class Settings:
    """Stands for the settings of a stage: what the script is to do."""

    name: str
    sleep: float = 0.2
    fails: str = ""
    variant: Variant = VARIANT


def stage(name, *parents, kind="pretrain", **settings):
    return Stage(kind, Settings(name, **settings), parents, SETUP)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run stages with the script; returns what it logged, in order."""
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(local, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(worker, "run", lambda folder: None)  # of a stage that is done: publishes

    def run(stages, jobs):
        local.run(stages, tmp_path, jobs)
        return seen()

    def seen():
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [tuple(line.split()[1:3]) for line in lines]

    run.seen = seen
    run.processes = lambda: [x.split()[2:] for x in (tmp_path / "log").read_text().splitlines()]
    return run


def most_at_once(events):
    counts = [0]
    for event, _ in events:
        counts.append(counts[-1] + (1 if event == "begins" else -1))
    return max(counts)


def test_stages_run_in_order_and_beside_each_other(run):
    a = stage("a")
    b, c = stage("b", a, sleep=1.0), stage("c", a, sleep=1.0)
    d, e = stage("d", b, c), stage("e", c)
    events = run([a, b, c, d, e], jobs=2)
    assert len(events) == 10
    for child in (b, c, d, e):
        for parent in child.parents:
            ended = events.index(("ends", parent.settings.name))
            assert ended < events.index(("begins", child.settings.name))
    assert most_at_once(events) == 2


def test_timings_run_alone_and_last(run):
    timings = [stage(f"t{i}", kind="benchmark") for i in range(2)]
    others = [stage(name) for name in "ab"]
    events = run([timings[0], *others, timings[1]], jobs=3)
    first = events.index(("begins", "t0"))
    assert {name for _, name in events[:first]} == {"a", "b"}
    assert most_at_once(events[first:]) == 1
    assert most_at_once(events[:first]) == 2


def test_a_failure_costs_what_builds_on_it(run, tmp_path, capfd):
    a = stage("a")
    bad, good = stage("bad", a, fails="no such file"), stage("good", a)
    child, grandchild = stage("child", bad), stage("grandchild", good)
    graph = [a, bad, child, stage("orphan", child), good, grandchild]
    with pytest.raises(UserError, match=r"3 stages failed or .* the first: no such file"):
        run(graph, jobs=2)
    assert ("ends", "grandchild") in run.seen()
    assert not {"child", "orphan"} & {name for _, name in run.seen()}
    with pytest.raises(UserError, match="3 stages failed"):
        run(graph, jobs=2)
    again = [event for event in run.seen() if event[0] == "begins"]
    assert len(again) == 4 + 1  # only what failed is tried again


def test_stages_share_a_process_and_every_job_has_some(run, monkeypatch):
    monkeypatch.setattr(local, "CHAIN", 8)
    parents = [stage("a"), stage("b")]
    short = [stage(f"s{i}", parents[0], kind="convert", sleep=0.05) for i in range(19)]
    other, long = stage("t", parents[1], kind="convert"), stage("long", parents[1])
    events = run([*parents, *short[:3], other, *short[3:], long], jobs=2)
    assert [event for event, _ in events].count("ends") == 23
    assert most_at_once(events) == 2
    used = {}
    for name, process in run.processes():
        used.setdefault(process, []).append(name)
    assert ["long", "long"] in used.values()
    chains = [names[::2] for names in used.values() if names[0][0] in "st"]
    assert sum(len(names) for names in chains) == 20
    assert max(len(names) for names in chains) == local.CHAIN
    assert len(chains) < 7
    # Those of the same parents come together.
    (shared,) = [names for names in chains if "t" in names]
    assert shared.index("t") in (0, len(shared) - 1)


def test_jobs_share_no_cores_and_timings_have_all(run, tmp_path):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("the system does not say what cores a process has")
    every = os.sched_getaffinity(0)
    apart = [stage(name, sleep=0.5) for name in "abcd"]
    timed = stage("t", kind="benchmark")
    run([*apart, timed], jobs=2)
    a, b, c, d, t = (
        {*json.loads((each.folder(tmp_path).path / "cores").read_text())}
        for each in (*apart, timed)
    )
    assert t == every
    if len(every) > 1:
        assert a | b == c | d == every
        assert not a & b
        assert not c & d


def test_more_jobs_than_cores_have_all_of_them():
    assert {*local._shares(10_000)} == {frozenset()}
    assert len(local._shares(10_000)) == 10_000


def test_a_failure_in_a_shared_process_costs_that_stage(run, capfd):
    a = stage("a")
    fails = {"s1": {"fails": "no luck"}}
    short = [
        stage(f"s{i}", a, kind="convert", sleep=0.05, **fails.get(f"s{i}", {})) for i in range(4)
    ]
    child = stage("child", short[3], kind="convert")
    orphan = stage("orphan", short[1], kind="convert")
    with pytest.raises(UserError, match=r"2 stages failed or .* the first: no luck"):
        run([a, *short, child, orphan], jobs=2)
    ended = {name for event, name in run.seen() if event == "ends"}
    assert ended == {"a", "s0", "s2", "s3", "child"}


def test_a_defect_is_no_mistake_of_the_users(run, capfd):
    with pytest.raises(RuntimeError, match="ended with status 1"):
        run([stage("a", sleep="long")], jobs=2)
    assert "TypeError" in capfd.readouterr().err


def test_the_end_of_the_program_ends_its_stages(run, monkeypatch):
    def stopped(seconds):
        sleep(seconds)
        if [event for event, _ in run.seen()].count("begins") == 2:
            monkeypatch.setattr(local.time, "sleep", sleep)
            raise KeyboardInterrupt

    sleep = time.sleep
    monkeypatch.setattr(local.time, "sleep", stopped)
    with pytest.raises(KeyboardInterrupt):
        run([stage("a", sleep=60), stage("b", sleep=60)], jobs=2)
    assert [event for event, _ in run.seen()].count("stopped") == 2


def test_one_job_runs_here_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    seen = []

    def fake(folder):
        settings = json.loads((folder.path / "stage.json").read_text())["settings"]
        seen.append(settings["name"])
        if settings["fails"]:
            raise UserError(settings["fails"])

    monkeypatch.setattr(worker, "run", fake)
    bad = stage("bad", fails="no luck")
    with pytest.raises(UserError, match="2 stages failed or build on one that did"):
        local.run([bad, stage("child", bad), stage("good")], tmp_path, jobs=1)
    assert seen == ["bad", "good"]
    with pytest.raises(UserError, match=r"^no luck$"):
        local.run([bad], tmp_path, jobs=1)
    assert "failed: no luck" in capsys.readouterr().out


def done(stage, folder, seconds):
    worker.describe(stage, folder).write_outcome(Outcome([], None, {}, seconds))


def test_what_is_left_is_reckoned_from_what_is_done(tmp_path):
    planned = plan(base.get_config(), None)

    def pretraining(steps):
        settings = planned[0].settings
        recipe = replace(settings.recipe, steps=steps)
        return replace(planned[0], settings=replace(settings, recipe=recipe))

    parent = pretraining(steps=100)
    short = stage("s", parent, kind="uptrain", variant=replace(VARIANT, alpha=0.5))
    (tuned, *_) = [s for s in planned if s.kind == "finetune"]
    graph = [parent, short, tuned]

    def left(*stages, jobs=1):
        return local.remaining(list(stages), graph, tmp_path, jobs)

    assert left(*graph) == "3 of 3 stages left"
    done(parent, tmp_path, 200.0)
    assert left(short) == "1 of 3 stages left, about 2 min"
    assert left(short, tuned) == "2 of 3 stages left, about 2 min and 1 of a kind not timed yet"
    done(short, tmp_path, 50.0)  # 250 s for 150 steps together
    assert left(pretraining(steps=50)) == "1 of 3 stages left, about 83 s"
    done(tuned, tmp_path, None)  # it was interrupted: not to be counted
    assert left(tuned) == "1 of 3 stages left"
    assert left(pretraining(steps=12000), jobs=2) == "1 of 3 stages left, about 2 h 47 min"


def test_a_graph_is_shown_with_what_is_done(tmp_path):
    parent = stage("a")
    child = stage("b", parent, kind="convert")
    done(parent, tmp_path, 1.0)
    shown = local.describe([parent, child], tmp_path).splitlines()
    assert len(shown) == 3
    assert shown[0].split()[:3] == ["1", "done", "pretrain"]
    assert shown[1].split()[:4] == ["2", "to", "do", "convert"]
    assert ", after 1" in shown[1]
    assert child.folder(tmp_path).name in shown[1]
    child.folder(tmp_path).checkpoints.mkdir(parents=True)
    assert " begun " in local.describe([parent, child], tmp_path)
    unnamed = plan(base.get_config(), None)[0]  # its text is not prepared
    assert unnamed.key not in local.describe([unnamed], tmp_path)
