"""Two real processes are one program: same checkpoints, and they end together."""

import signal

import jax
import pytest
from jax._src.clusters import ClusterEnv

from gqa.runtime import distributed
from gqa.runtime.errors import UserError
from tests.support import toy
from tests.support.several_processes import Processes, run

TOY = """
    from tests.support import toy
    def alive(step):
        print(step, file=sys.stderr, flush=True)
        time.sleep({pause})
    toy.fit(folder, 20, 4, alive=alive, apart={apart})
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A toy run of two processes that nothing interrupts, and what the processes printed."""
    folder = tmp_path_factory.mktemp("toy") / "whole"
    return folder, run(TOY.format(pause=0, apart=False), folder)


def test_whatever_ends_one_of_two_they_go_on_bit_for_bit(whole, tmp_path):
    folder = tmp_path / "parts"
    both = Processes(TOY.format(pause=0.05, apart=True), folder)
    both.wait_for(1, "5")
    both.processes[1].send_signal(signal.SIGTERM)
    statuses, _ = both.end()
    assert statuses == [128 + signal.SIGTERM] * 2
    saved = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
    assert 5 < int(saved.name) < 20
    ends = [f"interrupted by SIGTERM; the same command goes on from {saved}\n"] * 2
    assert [e[-len(end) :] for e, end in zip(both.errors, ends, strict=True)] == ends

    both = Processes(TOY.format(pause=0.05, apart=True), folder)
    both.wait_for(0, "14")
    both.processes[1].kill()
    statuses, _ = both.end()
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] != 0

    run(TOY.format(pause=0, apart=True), folder)
    found, expected = toy.outcome(folder), toy.outcome(whole[0])
    for step, saved in found["checkpoints"].items():
        each = [{"position": step, "process": [i] * (1 + i)} for i in (0, 1)]
        assert saved.pop("data") == {"processes": each}
        assert expected["checkpoints"][step].pop("data") == {"position": step}
    toy.assert_same(found, expected)
    with pytest.raises(UserError, match=r"2 processes each read .* go on with as many, not with 1"):
        toy.fit(folder, 24, 4)


def test_the_primary_alone_prints_and_writes(whole):
    folder, printed = whole
    assert "toy  step 20/20  validation loss" in printed[0]
    assert "toy" not in printed[1]
    assert len(list((folder / "events").iterdir())) == 1
    assert not list(folder.rglob("*tmp*"))


AGREE = """
    import psutil
    port = int(os.environ["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2])
    for place in psutil.Process().net_connections("tcp"):
        if place.status == psutil.CONN_LISTEN and place.laddr.port == port:
            print("listens on", place.laddr.ip, file=sys.stderr)
    distributed.wait_for_all("looked")
    import numpy as np
    from gqa.checkpoints import checkpoint, checksums
    from gqa.evaluation import scoring
    from gqa.model.special_tokens import T5_TOKENS
    from gqa.runtime import sharding
    from gqa.runtime.errors import DamagedCheckpoint, UserError
    from gqa.runtime.mesh import make_mesh
    def damaged():
        raise DamagedCheckpoint(Path("3"), "a file is missing")
    def refuse():
        raise UserError("not so")
    for read in (lambda: {"from": index}, lambda: None):
        print(distributed.by_primary(read), file=sys.stderr)
    for call, read in ((distributed.by_primary, refuse), (checkpoint._by_primary, damaged)):
        try:
            call(read)
        except UserError as error:
            print(type(error).__name__, str(error)[:40], file=sys.stderr)
    class Copy:  # a text generates itself
        length, calls, special = 8, 0, T5_TOKENS
        def __call__(self, weights, inputs, numbers):
            self.calls += 1
            return inputs[:, :8]
    texts = [np.arange(2, 3 + n % 6) for n in range(10)]
    tokens = scoring.predict(copy := Copy(), {}, texts, inputs_length=8, batch_size=2)
    same = [[*row[row > 0][:-1]] == [*text] for row, text in zip(tokens, texts)]
    print(all(same), copy.calls, file=sys.stderr)
    for local in (False, True):
        mesh = make_mesh(local=local)
        print(mesh.size, sharding.share(mesh), file=sys.stderr)
    with distributed.primary_first("file"):
        if index == 0:
            time.sleep(0.5)
            folder.mkdir()
        assert folder.exists()
"""


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    """The lines of two processes that look at their sockets and then agree on values and turns."""
    both = Processes(AGREE, tmp_path_factory.mktemp("agree") / "x")
    statuses, _ = both.end()
    assert statuses == [0, 0], both.errors
    return [said.splitlines() for said in both.errors]


def test_the_primary_listens_on_the_address_given_alone(agreed):
    listening = {line.split()[-1] for line in agreed[0] if line.startswith("listens on ")}
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_what_the_primary_reads_all_know_and_what_it_refuses_all_refuse(agreed):
    for i, (calls, said) in enumerate(zip((3, 2), agreed, strict=True)):
        assert [line for line in said if not line.startswith("listens on ")] == [
            "{'from': 0}",
            "None",
            "UserError not so",
            "DamagedCheckpoint checkpoint 3 is damaged: a file is missi",
            f"True {calls}",
            f"2 ({i}, 2)",
            "1 (0, 1)",
        ]


def test_an_error_of_one_ends_both(tmp_path):
    body = """
    from gqa.runtime.errors import UserError
    if index == 1:
        raise UserError("no more")
    distributed.wait_for_all("ever")
    """
    both = Processes("distributed.PATIENCE = 1.0" + body, tmp_path / "x")
    statuses, _ = both.end()
    assert statuses[1] == 2
    assert statuses[0] != 0
    assert "error: no more\n" in both.errors[1]


def test_one_that_fails_does_not_wait_for_one_that_is_busy(tmp_path):
    body = """
    from gqa.runtime.errors import UserError
    if index == 1:
        raise UserError("no more")
    time.sleep(600)
    """
    both = Processes("distributed.PATIENCE = 1.0" + body, tmp_path / "x")
    try:
        assert both.processes[1].wait(timeout=90) == 2  # JAX's own end waits for 300 s
    finally:
        both.processes[0].kill()
        both.end()


@pytest.mark.parametrize(
    ("address", "count", "index"),
    [
        ("host:1", "2", None),
        (None, "2", "0"),
        ("host:1", "two", "0"),
        ("host:1", "2", "2"),
        ("host", "2", "0"),
        ("host:x", "2", "0"),
        ("host:1", "9" * 5000, "0"),
    ],
)
def test_half_said_is_refused(monkeypatch, address, count, index):
    for name, value in zip(distributed.GIVEN, (address, count, index), strict=True):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES"):
        distributed.initialize()


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        # A task a node has all of the node's devices; of several a node each has JAX's share.
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, {"local_device_ids": []}),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, {}),
        ({"SLURM_NTASKS": "1"}, None),
        ({"SLURM_STEP_NODELIST": None}, None),  # in a batch script or on a login node
    ],
)
def test_tasks_of_slurm_are_found(monkeypatch, changed, expected):
    for name in distributed.GIVEN:
        monkeypatch.delenv(name, raising=False)
    for name, value in (SLURM | changed).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: joined.append(how))
    distributed.initialize()
    found = {"cluster_detection_method": "slurm"}
    assert joined == ([] if expected is None else [found | expected])


def test_clusters_are_named_as_jax_does():
    names = {cluster.name for cluster in ClusterEnv._cluster_types}
    assert distributed.CLUSTERS.keys() <= names
