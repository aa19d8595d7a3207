"""Real processes on this machine that are one program, and a small network that they train."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from gqa.checkpoints import checkpoint
from gqa.checkpoints.checkpoint import Checkpoints
from gqa.data import batching
from gqa.evaluation import scoring
from gqa.inference.decoding import Sample, beam_search
from gqa.inference.generator import Generator
from gqa.inference.step import Inference
from gqa.model.config import Config
from gqa.runtime import distributed, sharding
from gqa.runtime.mesh import Layout, make_mesh, resolve_layout
from gqa.training import loop, optimizer, training_step
from gqa.training.progress import Progress
from tests.support.jobs import ROOT

MAIN = """
import os, sys, time
from pathlib import Path
from gqa.runtime import distributed, signals
from experiments.run import process
folder = Path(sys.argv[1])
def main():
    distributed.initialize()
    import jax
    index = jax.process_index()
    {body}
signals.install()
sys.exit(process.status(main))
"""


class Processes:
    """The same program several times, each with its own CPU devices, joined by the environment.

    `errors` has what each said on stderr, once it has ended.
    """

    def __init__(self, body: str, folder: Path, count: int = 2, devices: int = 1):
        with socket.create_server(("localhost", 0)) as free:
            address = f"localhost:{free.getsockname()[1]}"
        self.errors = [folder.with_name(f"{folder.name}-{i}.txt") for i in range(count)]
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        environment["PYTHONPATH"] = str(ROOT)
        # Each compiles the same programs as the others and as those before them.
        environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self.processes = []
        for i, path in enumerate(self.errors):
            given = dict(zip(distributed.GIVEN, (address, str(count), str(i)), strict=True))
            with open(path, "w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", MAIN.format(body=body.strip()), str(folder)],
                        env=environment | given,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )

    def wait_for(self, index: int, line: str) -> None:
        """Return when a process has said a line on stderr."""
        while line not in self.errors[index].read_text().splitlines():
            assert self.processes[index].poll() is None, self.errors[index].read_text()

    def end(self) -> tuple[list[int], list[str]]:
        """Wait for all: (statuses, what they printed)."""
        printed = [process.communicate(timeout=400)[0] for process in self.processes]
        self.errors = [path.read_text() for path in self.errors]
        return [process.returncode for process in self.processes], printed


def run(body: str, folder: Path, count: int = 2, devices: int = 1) -> list[str]:
    """Run processes to a good end; returns what they printed."""
    processes = Processes(body, folder, count, devices)
    statuses, printed = processes.end()
    assert statuses == [0] * count, "\n".join(processes.errors)
    return printed


HEADS = {
    f"num_kv_heads_{name}": k
    for name, k in (("encoder", 4), ("self_attention", 1), ("cross_attention", 2))
}
CONFIG = Config(32, 128, 128, 4, 32, 2, 1, **HEADS, dropout_rate=0.3)  # moments are factored
EVERY = 2


def fit(folder: Path, steps: int, layout: Layout, alive=lambda step: None) -> None:
    """Train the network on packed rows, in microbatches, with dropout, validated and saved."""

    class Watched(Progress):
        def step(self, number, metrics):
            super().step(number, metrics)
            alive(number)

    mesh = make_mesh(layout)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 32, (2, 3 + i % 4)).astype(np.int32) for i in range(20)]
    pairs = [(row[0], row[1][:2]) for row in rows]
    shape = {"inputs_length": 8, "targets_length": 5, "batch_size": 8}
    shape["shard"] = sharding.share(mesh)
    events = folder / "events" if distributed.is_primary() else None
    with (
        jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext(),
        Watched("net", events, EVERY, 1.0, None) as progress,
    ):
        abstract = training_step.abstract(CONFIG, mesh, layout)
        at = training_step.shardings(abstract)
        validation = training_step.make_validation(CONFIG, mesh)
        computation = loop.Computation(
            start=lambda: sharding.put(training_step.init(CONFIG, 0), at),
            abstract_state=abstract,
            train_step=training_step.make_step(
                training_step.make_loss(CONFIG, 1e-4), optimizer.constant(1e-2), 0, 2, placed=at
            ),
            validate=lambda params: validation(params, batching.evaluation_batches(pairs, **shape)),
            mesh=mesh,
        )
        settings = loop.RunSettings(steps, EVERY, {"model": CONFIG.__dict__}, keep_last=10)
        batches = batching.finetuning_batches([pairs], [1.0], **shape, seed=0, pack=True)
        loop.fit(computation, settings, batches, folder / "checkpoints", progress)


def generate(folder: Path, layout: Layout) -> None:
    """Texts by two ways of searching from the last checkpoint of `fit`, into `texts.npz`."""
    mesh = make_mesh(layout)
    shapes = training_step.abstract(CONFIG, mesh, layout)
    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    rng = np.random.default_rng(1)
    inputs = [rng.integers(3, 32, 3 + i % 4).astype(np.int32) for i in range(11)]
    found = {}
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        params = checkpoint.load(last, {"params": shapes.params})["params"]
        for name, search in (("drawn", Sample(seed=1)), ("beams", beam_search(3, 0.6))):
            net = Inference(CONFIG, layout=resolve_layout(CONFIG, layout, mesh, 8, 8, 6))
            generator = Generator(net, search, 6, stop=False, mesh=mesh)
            shape = {"inputs_length": 8, "batch_size": 8, "together": mesh.is_multi_process}
            found[name] = scoring.predict(generator, generator.prepare(params), inputs, **shape)
    if distributed.is_primary():
        np.savez(folder / "texts.npz", **found)


def outcome(folder: Path) -> dict[int, dict]:
    """What every checkpoint holds, by its step, and its validation loss."""
    state = training_step.abstract(CONFIG, make_mesh())
    items = {"params": state.params, "opt_state": state.opt_state, "data": None}
    with Checkpoints(folder / "checkpoints", 10) as saved:
        steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
        return {
            step: jax.tree.map(np.asarray, saved.restore(step, items))
            | {"validation_loss": saved.metric(step)}
            for step in steps
        }
