"""Every layout of a network over eight devices gives the numbers of one device."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from configs import base
from experiments.graph import validate as checks
from experiments.run import slurm
from gqa.model.config import Config
from gqa.runtime import sharding
from gqa.runtime.errors import UserError
from gqa.runtime.mesh import (
    Layout,
    bytes_moved,
    check_layout,
    check_rows,
)
from gqa.training import training_step

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import contextlib, re
import jax, numpy as np
from gqa.checkpoints import checkpoint
from gqa.inference import generator as generation
from gqa.training import optimizer
from gqa.training import training_step
from gqa.runtime import sharding
from gqa.inference.decoding import GREEDY, Beam
from gqa.inference.step import Inference
from gqa.model.config import Config
from gqa.runtime.mesh import WHOLE, Layout, make_mesh, resolve_layout
from pathlib import Path
import sys

generation.SHORTEST = 16
rng = np.random.default_rng(0)
shape = {"inputs": 12, "targets": 9}
batch = {n: rng.integers(3, 128, (16, t), dtype=np.int32) for n, t in shape.items()}
batch["targets"][:7, 2:] = 0


def network(K):
    counts = {"encoder": 8, "self_attention": K, "cross_attention": K}
    heads = {f"num_kv_heads_{name}": count for name, count in counts.items()}
    return Config(128, 128, 136, 8, 16, 1, 1, **heads, dropout_rate=0.1)


def run(K, layout, devices=None):
    config, mesh = network(K), make_mesh(layout, devices=devices)
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        abstract = training_step.abstract(config, mesh, layout)
        at = training_step.shardings(abstract)
        folder = Path(sys.argv[1]) / str(K)
        if devices:  # what the others start from, as uptraining does
            _, params, moments = sharding.put(training_step.init(config, 0), at)
            with checkpoint.Checkpoints(folder) as saved:
                items = {"params": params, "opt_state": moments, "config": {}}
                saved.save(0, items, {"validation_loss": 0.0})
        shapes = {"params": abstract.params, "opt_state": abstract.opt_state}
        loaded = checkpoint.load(folder, shapes)
        params = jax.tree.map(np.asarray, loaded["params"])
        state = training_step.State(sharding.put(np.int32(0), at.step), **loaded)
        loss = training_step.make_loss(config, 1e-4)
        step = training_step.make_step(loss, optimizer.constant(1e-2), 0, 2, placed=at)
        for _ in range(2):
            state, metrics = step(state, sharding.place(batch, mesh))
        jax.tree.map(lambda x, at: check(x.sharding.is_equivalent_to(at, x.ndim)), state, at)
        numbers = [np.asarray(x) for x in jax.tree.leaves((state, metrics["loss"]))]
        return numbers, texts(config, mesh, layout, sharding.put(params, at.params))


def texts(config, mesh, layout, params):
    layout = resolve_layout(config, layout, mesh, 16, 12, 16)
    found = []
    # Beams are more query rows, and more rows of a cache that may be split by its rows.
    beams = [Beam(2, 0.6)] if layout.kv_heads == "batch" or mesh.size == 1 else []
    for search in (GREEDY, *beams):
        generator = generation.Generator(Inference(config, layout=layout), search, 16, mesh=mesh)
        weights = generator.prepare(params)
        found.append(generator(weights, batch["inputs"]))
        if layout.model > 1 and search is GREEDY:
            check_collectives(generator, weights, layout)
    return found


def check_collectives(generator, weights, layout):
    \"\"\"A decoding step gathers nothing as large as a layer's weight or cache.\"\"\"
    memory = generator.prefill(weights, batch["inputs"])
    rows = generator._start(np.arange(16, dtype=np.int32))
    cache = generator._init_cache(16, 1, 16)
    program = generator._advance.lower(weights, rows, cache, memory, 0, 16).compile().as_text()
    gathered = re.findall(r"= \\S*\\[([\\d,]+)\\]\\S* all-gather", program)
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in gathered]
    smallest = 128 * 2 * 16  # of a layer's weights, and of its caches: the keys' kernel for K = 2
    check(max(sizes, default=0) < smallest, (layout, gathered))


def check(truth, what=""):
    assert truth, what


for K, layouts in LAYOUTS.items():
    one = run(K, WHOLE, jax.devices()[:1])
    for layout in layouts:
        numbers, found = run(K, layout)
        for a, b in zip(one[0], numbers, strict=True):
            np.testing.assert_allclose(b, a, atol=2e-5, err_msg=str(layout))
        for a, b in zip(one[1], found, strict=False):
            np.testing.assert_array_equal(b, a, err_msg=str(layout))
"""
# That the batch alone is split is in test_sharding, and parameters too in test_fsdp.
TENSOR = [Layout(model=8, kv_heads=how) for how in ("replicate", "batch")]
LAYOUTS = {
    8: [Layout(model=8)],
    2: [*TENSOR, Layout(model=2, slices=2, fsdp=True)],
}


def test_every_layout_gives_the_numbers_of_one_device(tmp_path):
    """Training from one device's checkpoint, and texts; decoding gathers no weight and no cache."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    script = SCRIPT.replace("LAYOUTS", repr(LAYOUTS))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def config_of(encoder=8, decoder=2, cross=2, **sizes):
    heads = {"num_kv_heads_encoder": encoder}
    heads |= {"num_kv_heads_self_attention": decoder, "num_kv_heads_cross_attention": cross}
    shape = {"vocab_size": 512, "d_model": 128, "d_ff": 256, "num_heads": 8, "head_dim": 64}
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    return Config(**(shape | sizes), **layers, **heads)


@pytest.mark.parametrize(
    ("layout", "sizes", "said"),
    [
        (Layout(model=3), {}, "model=3 .* use one of 1, 2, 4, 8"),
        (Layout(model=8), {"d_ff": 252}, "d_ff=252; use one of 1, 2, 4"),
        (Layout(model=0), {}, "model=0 "),
        (
            Layout(model=2),
            {"num_heads": 9, "decoder": 3, "encoder": 9, "cross": 3},
            "num_heads=9",
        ),
        (Layout(slices=3), {}, "slices=3 .* use one of 1, 2, 4, 8"),
        (Layout(fsdp=True), {"d_model": 100}, "d_model=100 .* use False, or 2, 4, 8 dev"),
        (Layout(kv_heads="tile"), {}, "kv_heads='tile'; use one of auto, replicate, batch"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(layout, sizes, said):
    check_layout(config_of(), Layout(model=8, fsdp=True, kv_heads="batch"), 8, 8)
    with pytest.raises(UserError, match=said):
        check_layout(config_of(**sizes), layout, 8, 8)


def test_processes_are_joined_whole():
    check_layout(config_of(), Layout(model=8), 16, 4)
    assert Layout(model=8).within(4).model == 4
    six = config_of(num_heads=12, encoder=12, d_ff=240, vocab_size=96)
    with pytest.raises(UserError, match=r"^model=6 .* 24 devices, 4 a process; .* 2, 4, 12$"):
        check_layout(six, Layout(model=6), 24, 4)


def test_moments_follow_their_parameters():
    """Without the axis that each is a mean over, whichever of the two optax takes."""
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    state = jax.eval_shape(lambda: training_step.init(config_of(), 0))
    layout = Layout(model=4, fsdp=True)
    found = sharding.param_shardings(state.opt_state, mesh, layout, state.params)
    attention = found["decoder"]["layers"]["cross_attention"]
    table, query, key = found["embedding"][0], attention["query"][0], attention["key"][0]
    assert (table.v_row.spec, table.v_col.spec) == (P("data"), P("model"))
    assert (query.v_row.spec, query.v_col.spec) == (P(None, "data"), P(None, "model"))
    assert (key.v_row.spec, key.v_col.spec) == (P(None, "data"), P(None, None))
    narrow = jax.eval_shape(
        lambda: training_step.init(config_of(d_model=512, num_heads=4, encoder=4), 0)
    )
    found = sharding.param_shardings(narrow.opt_state, mesh, layout, narrow.params)
    query = found["encoder"]["layers"]["attention"]["query"][0]  # 512 to 256: columns are fewer
    assert (query.v_row.spec, query.v_col.spec) == (P(None, "model"), P(None, "data"))


def test_bytes_moved_by_hand():
    """One head of 128, 2048 positions, 8 devices, 64 query heads, numbers of 2 bytes."""
    moved = bytes_moved(1, 64, 128, 2048, 8)
    assert moved["replicate"] == 2 * 2048 * 128 * 2
    assert moved["batch"] == 2 * 2048 * 128 * 2 / 8 + 2 * 8 * 128 * 2 * 7 / 8
    short = bytes_moved(1, 64, 128, 1, 8)
    assert short["replicate"] < short["batch"]


def test_a_batch_whose_cache_does_not_split_by_rows_is_refused():
    layout = Layout(model=8, kv_heads="batch")
    check_rows(24, config_of(), layout, 8)
    check_rows(20, config_of(), Layout(model=8), 8)
    whole = config_of(decoder=8, cross=8)
    check_rows(20, whole, layout, 8)
    with pytest.raises(UserError, match=r"^batch_size=20 does not split over the 8 dev"):
        check_rows(20, config_of(), layout, 8)


def test_layouts_are_of_the_devices_that_jobs_will_have():
    """The machine that submits has one; its own number says nothing of the nodes."""
    config = base.get_config("nano", 8)
    config.mesh.model = 8
    with pytest.raises(UserError, match=r"mesh\.model=8 does not divide the 1 devices"):
        checks.check(config, slurm.devices(config))
    config.slurm.gpus_per_node, config.slurm.nodes = 8, 2
    assert slurm.devices(config) == (16, 8)
    checks.check(config, slurm.devices(config))
    config.slurm.nodes = 16
    with pytest.raises(UserError, match=r"pretrain\.batch_size=8 does not split over 16 devices"):
        checks.check(config, slurm.devices(config))
