"""Several devices give the numbers of one; batches that do not split are refused."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gqa.runtime import sharding
from gqa.runtime.errors import UserError
from gqa.runtime.mesh import check_batch, make_mesh

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import jax, numpy as np
from gqa.inference import generator as generation
from gqa.training import optimizer
from gqa.training import training_step
from gqa.runtime import sharding
from gqa.runtime.mesh import make_mesh
from gqa.inference.decoding import Beam, Sample
from gqa.inference.step import Inference
from gqa.model.config import Config
from tests.support.toy import replicated
counts = {"encoder": 4, "self_attention": 2, "cross_attention": 2}
heads = {f"num_kv_heads_{name}": count for name, count in counts.items()}
config = Config(32, 8, 8, 4, 4, 1, 1, **heads, dropout_rate=0.1)
rng = np.random.default_rng(0)
lengths = {"inputs": 6, "targets": 5}
batch = {n: rng.integers(3, 32, (16, t), dtype=np.int32) for n, t in lengths.items()}
batch["targets"][:7, 2:] = 0  # the devices have different numbers of real tokens
generation.SHORTEST, generation.EVERY = 8, 4  # rows are left out, caches grow

def train_and_generate(mesh):
    loss = training_step.make_loss(config, 1e-4)
    step = training_step.make_step(loss, optimizer.constant(1e-2), 0, num_microbatches=2)
    state = replicated(training_step.init(config, 0), mesh)
    for _ in range(3):
        state, metrics = step(state, sharding.place(batch, mesh))
    leaves = jax.tree.leaves(state.params)
    assert all(len(leaf.sharding.device_set) == mesh.size for leaf in leaves)
    split = jax.ShapeDtypeStruct((16, 3), np.float32, sharding=sharding.batch_sharding(mesh))
    assert sharding.local_bytes(split) == 16 * 3 * 4
    assert sharding.local_bytes(leaves[0]) == leaves[0].nbytes * mesh.size
    # Tokens are not compared after training: its last bits may decide between two of them.
    params = replicated(training_step.init(config, 0).params, mesh)
    arrays = dict(enumerate(leaves)) | {"loss": metrics["loss"]}
    for name, search in (("sample", Sample(temperature=1.5)), ("beam", Beam(2, 0.6))):
        generator = generation.Generator(Inference(config), search, 20, mesh=mesh)
        arrays[name] = generator(generator.prepare(params), batch["inputs"])
    return arrays

assert jax.device_count() == 8
one, eight = (train_and_generate(make_mesh(devices=d)) for d in (jax.devices()[:1], None))
assert len(one) > 10
for name in one:
    np.testing.assert_allclose(eight[name], one[name], atol=2e-5, err_msg=str(name))
"""


def test_eight_devices_train_and_generate_as_one():
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True)


def test_a_batch_is_placed_as_it_is():
    mesh = make_mesh()
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    placed = sharding.place({"inputs": rows}, mesh)["inputs"]
    assert isinstance(placed, jax.Array)
    np.testing.assert_array_equal(placed, rows)


@pytest.mark.parametrize("batch_size", [0, 6, 9])
def test_a_batch_that_does_not_split_is_refused(batch_size):
    unit = 4 * jax.device_count()
    check_batch(2 * unit, 4)
    with pytest.raises(UserError, match=f"^batch_size={batch_size} .* multiple of {unit}"):
        check_batch(batch_size, 4)
