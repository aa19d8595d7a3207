"""Whole jobs in processes of their own, and what they leave: for the tests and the soak script."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from experiments.stages.folder import StageFolder
from gqa.checkpoints import checkpoint
from gqa.model.config import Config
from gqa.runtime.mesh import make_mesh
from gqa.training import training_step

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "model.d_model": 16,
    "model.d_ff": 16,
    "model.num_heads": 4,
    "model.head_dim": 4,
    "model.num_encoder_layers": 1,
    "model.num_decoder_layers": 1,
    "model.vocab_size": 512,
    "text.packages": "absl-py,opt_einsum,optax,rich",
    "compare": "",
    "pretrain.task": "docstrings",
    "pretrain.steps": 6,
    "pretrain.every": 2,
    "pretrain.validation_examples": 8,
    "uptrain.alpha": 0.5,
    "convert.num_kv_heads_encoder": 4,
    "convert.num_kv_heads_self_attention": 2,
    "convert.num_kv_heads_cross_attention": 2,
    "finetune.tasks": "docstring_summary,files",
    "finetune.steps": 4,
    "finetune.every": 2,
    "finetune.validation_examples": 8,
    "evaluate.examples": 8,
    "evaluate.batch_size": 8,
    "benchmark.inputs_length": 16,
    "benchmark.targets_length": 4,
    "benchmark.repetitions": 2,
}
for section in ("pretrain", "finetune"):
    TINY |= {f"{section}.batch_size": 4, f"{section}.num_microbatches": 2}
    TINY |= {f"{section}.inputs_length": 32, f"{section}.targets_length": 11}
# What one job compiled the next finds. Each worker of pytest has a folder of its own, because JAX
# does not write atomically.
CACHE = ROOT / ".pytest_cache" / f"jobs-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
ENVIRONMENT = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
# The job in a process of its own, which then says whether TensorFlow or PyTorch came along.
SCRIPT = """
import sys
import launch
from gqa.runtime import signals
signals.install()
status = launch.main(sys.argv)
assert not {name.split(".")[0] for name in sys.modules} & {"tensorflow", "torch"}
sys.exit(status)
"""


def command(workdir, settings, *more, config="configs/gqa8.py"):
    """The command line of a job with `settings` of its config."""
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    script = [sys.executable, "-c", SCRIPT, f"--config={config}", f"--workdir={workdir}"]
    return [*script, *overrides, *more]


def launch(workdir, settings, *more, config="configs/gqa8.py", status=0):
    """Run the job to its end; returns what it printed, on stderr if it is to fail."""
    done = subprocess.run(
        command(workdir, settings, *more, config=config),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def outputs(workdir, like=None):
    """Every stage's checkpoint arrays and timeless numbers, by its folder.

    Args:
        like: another workdir whose stages are the ones to take.
    """
    found = {}
    for path in sorted(((like or workdir) / "stages").iterdir()):
        folder = StageFolder(workdir / "stages" / path.name)
        outcome = folder.read_outcome()
        if folder.name.startswith("benchmark"):
            found[folder.name] = [r["metric"] for r in outcome.records]
        else:
            found[folder.name] = [r for r in outcome.records if r["unit"] != "s"]
        if outcome.checkpoint:
            path = folder.result()
            config = Config(**checkpoint.load_config(path)["model"])
            shapes = training_step.abstract(config, make_mesh())._asdict() | {"data": None}
            del shapes["step"]
            arrays = checkpoint.load(path, shapes)
            leaves = jax.tree_util.tree_leaves_with_path(arrays)
            found |= {f"{folder.name}{jax.tree_util.keystr(p)}": x for p, x in leaves}
    return found


def differences(found, expected):
    """The names of what two `outputs` do not share to the last bit."""

    def same(a, b):
        return np.array_equal(a, b) if hasattr(a, "shape") else a == b

    names = [*expected, *(found.keys() - expected.keys())]
    return [
        n for n in names if n not in found or n not in expected or not same(found[n], expected[n])
    ]
