"""What is submitted to SLURM, and what waits for what; `test_slurm_cluster.py` has a real SLURM."""

import contextlib
import hashlib
import importlib.util
import json
from typing import NamedTuple

import pytest

from configs import base
from experiments.run import slurm
from experiments.stages.folder import StageFolder
from gqa.runtime.errors import UserError

with contextlib.suppress(ImportError):  # optional, and it resets logging: not while pytest captures
    importlib.import_module("submitit")


class Stage(NamedTuple):
    """As experiments.graph.stage.Stage, with what `submit` looks at."""

    kind: str
    settings: dict
    parents: tuple = ()

    @property
    def key(self):
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    @property
    def label(self):
        return f"{self.kind} {self.settings}"

    @property
    def settings_json(self):
        return self.settings

    def folder(self, workdir):
        return StageFolder.of(workdir, self.kind, self.key)


def stage(kind, seed, *parents, **settings):
    return Stage(kind, settings | {"variant": {"seed": seed}, "seed": seed}, parents)


def chains(seeds):
    """pretrain -> finetune -> evaluate for each seed, seed by seed as plans list them."""
    stages = []
    for seed in seeds:
        pretrain = stage("pretrain", seed)
        finetune = stage("finetune", seed, pretrain)
        stages += [pretrain, finetune, stage("evaluate", seed, finetune)]
    return stages


def planned(stages, done=(), ids=None):
    """Jobs as (kind, seeds, dependency), with ids given from 100 as `submit` would."""
    ids = dict(ids or {})
    jobs = []
    for n, job in enumerate(slurm.plan_jobs(stages, {s.key for s in done}, ids), start=100):
        seeds = [s.settings["seed"] for s in job.stages]
        jobs.append((job.stages[0].kind, seeds, slurm.dependency(job, ids)))
        tasks = [f"{n}_{i}" for i in range(len(seeds))] if len(seeds) > 1 else [str(n)]
        ids |= {s.key: i for s, i in zip(job.stages, tasks, strict=True)}
    return jobs


def test_a_chain_is_a_job_each():
    assert planned(chains([0])) == [
        ("pretrain", [0], ""),
        ("finetune", [0], "afterok:100"),
        ("evaluate", [0], "afterok:101"),
    ]


def test_seeds_are_arrays_that_wait_for_their_counterparts():
    assert planned(chains([0, 1, 2])) == [
        ("pretrain", [0, 1, 2], ""),
        ("finetune", [0, 1, 2], "aftercorr:100"),
        ("evaluate", [0, 1, 2], "aftercorr:101"),
    ]


def test_other_settings_are_other_jobs_even_upstream():
    a, b = (stage("pretrain", seed=0, steps=steps) for steps in (1, 2))
    stages = [a, b, stage("finetune", 0, a), stage("finetune", 1, b)]
    assert [job[1:] for job in planned(stages)] == [
        ([0], ""),
        ([0], ""),
        ([0], "afterok:100"),
        ([1], "afterok:101"),
    ]
    assert [job[1:] for job in planned(stages, done=[a, b])] == [([0], ""), ([1], "")]


def test_a_parent_that_seeds_share():
    parent = stage("pretrain", 0)
    stages = [parent, *(stage("convert", seed, parent) for seed in (0, 1))]
    assert planned(stages)[1] == ("convert", [0, 1], "afterok:100")


def test_seeds_in_another_order_wait_for_all():
    first, second = (stage("pretrain", seed) for seed in (0, 1))
    stages = [first, second, stage("finetune", 1, second), stage("finetune", 0, first)]
    assert planned(stages)[1] == ("finetune", [1, 0], "afterok:100_1:100_0")


def test_several_parents():
    parents = [stage(kind, seed) for kind in ("pretrain", "uptrain") for seed in (0, 1)]
    children = [stage("compare", seed, *parents[seed::2]) for seed in (0, 1)]
    assert planned([*parents, *children])[2] == (
        "compare",
        [0, 1],
        "aftercorr:100,aftercorr:101",
    )


def test_what_is_done_is_not_submitted_nor_waited_for():
    stages = chains([0, 1])
    assert planned(stages, done=stages) == []
    assert planned(stages, done=stages[:3]) == [
        ("pretrain", [1], ""),
        ("finetune", [1], "afterok:100"),
        ("evaluate", [1], "afterok:101"),
    ]
    # Seed 1 of finetune need not wait for seed 0 of pretrain.
    assert planned(stages, done=stages[3:4])[:3] == [
        ("pretrain", [0], ""),
        ("finetune", [0], "afterok:100"),
        ("evaluate", [0], "afterok:101"),
    ]


def test_what_is_queued_is_waited_for_but_not_submitted_again():
    stages = chains([0, 1])
    queued = {stages[0].key: "7_0", stages[3].key: "7_1"}
    assert planned(stages, ids=queued)[0] == ("finetune", [0, 1], "aftercorr:7")
    swapped = {stages[0].key: "7_1", stages[3].key: "7_0"}
    assert planned(stages, ids=swapped)[0] == ("finetune", [0, 1], "afterok:7_1:7_0")
    apart = {stages[0].key: "7", stages[3].key: "8"}
    assert planned(stages, ids=apart)[:1] == [("finetune", [0], "afterok:7")]
    assert planned(stages, ids={s.key: "7" for s in stages}) == []


def test_without_slurm_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        slurm.submit(chains([0]), tmp_path / "runs", {}, ["true"])
    assert list(tmp_path.iterdir()) == []


def test_nodes_are_for_stages_that_share_the_work(monkeypatch, tmp_path):
    asked = {}

    class Queue:
        folder = tmp_path

        def __init__(self, workdir):
            del workdir

        def find(self, name):
            del name

        def submit(self, names, calls, options):
            del calls
            asked[names[0].split("-")[0]] = options["nodes"]
            return ["1"]

    monkeypatch.setattr(slurm, "_Queue", Queue)
    monkeypatch.setattr(slurm, "check", lambda: None)
    kinds = ("pretrain", "convert", "uptrain", "finetune", "evaluate", "benchmark")
    settings = base.get_config().slurm.to_dict() | {"nodes": 4}
    slurm.submit([stage(kind, 0) for kind in kinds], tmp_path, settings, ["true"])
    assert asked == dict(zip((*kinds, "gqa"), (4, 1, 4, 4, 4, 1, 1), strict=True))


def test_a_damaged_outcome_does_not_pass_for_a_finished_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "_Queue", lambda workdir: None)
    monkeypatch.setattr(slurm, "check", lambda: None)
    (each,) = stages = [stage("pretrain", 0)]
    each.folder(tmp_path).path.mkdir(parents=True)
    (each.folder(tmp_path).path / "done.json").write_text('{"records": [')
    with pytest.raises(UserError, match=r"pretrain-\w+/done\.json is damaged; remove it to do"):
        slurm.submit(stages, tmp_path, base.get_config().slurm.to_dict(), ["true"])


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{", "[" * 10**6, '{"a": 1}', '{"a": {"id": "1"}}', '{"a": {"name": "b"}}'),
        '{"a": {"id": "1:2", "name": "b"}}',
        '{"a": {"id": "1", "name": "--version"}, "b": {"id": 7, "name": " "}}',
        '{"a": {"id": "1", "name": "b\\n"}}',
    ],
)
def test_jobs_that_nobody_submitted_are_refused(tmp_path, text):
    (tmp_path / "jobs.json").write_text(text)
    with pytest.raises(UserError, match=r"jobs\.json: "):
        slurm.read_jobs(tmp_path / "jobs.json")


def test_jobs_that_were_submitted_are_read(tmp_path):
    assert slurm.read_jobs(tmp_path / "jobs.json") == {}
    jobs = {"pretrain-0a": {"id": "12_0", "name": "pretrain-0a"}, "x": {"id": "7", "name": "x-y.z"}}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    assert slurm.read_jobs(tmp_path / "jobs.json") == jobs


def test_pickles_are_not_kept_where_others_can_write(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm").chmod(0o775)
    with pytest.raises(UserError, match="slurm: others can write to it"):
        slurm._Queue(tmp_path)
    (tmp_path / "slurm").chmod(0o755)
    slurm._Queue(tmp_path)
