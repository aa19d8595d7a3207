"""Checkpoints of other programs are written block by block: what arrives, and what memory it takes.

GQA_LARGE_TESTS=1 runs the same at 5.5 GiB: pytest -n 0 -s tests/test_blocks.py
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gqa.__main__ import run_command
from gqa.checkpoints import checkpoint, checksums, pieces, step_folders
from gqa.data import tokenizer
from gqa.interop import huggingface, safetensors_files
from gqa.interop.huggingface import names
from gqa.model.config import Config
from gqa.runtime.errors import UserError
from gqa.runtime.mesh import make_mesh
from gqa.training import optimizer, training_step

ROOT = Path(__file__).parent.parent.parent
HEADS = ("num_kv_heads_encoder", "num_kv_heads_self_attention", "num_kv_heads_cross_attention")
LARGE = Config(32128, 2048, 5120, 32, 64, 12, 12, **dict.fromkeys(HEADS, 32))
SMALL = Config(16384, 512, 1024, 8, 64, 8, 8, **dict.fromkeys(HEADS, 8))

CHILD = """
import json, resource, sys
from pathlib import Path
from gqa.checkpoints import pieces, checkpoint
from gqa.__main__ import run_command
from gqa.interop import huggingface
peaks = []
for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
    source = huggingface.open_folder(source)
    with checkpoint.Checkpoints(Path(target)) as checkpoints:
        checkpoints.write(7, source, {"config": {"model": source.config.__dict__}})
    peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""


def write_folder(folder, config, shard):
    """A random checkpoint of Hugging Face in files of `shard` bytes; returns its sizes."""
    folder.mkdir()
    noise = np.random.default_rng(0).normal(size=2**20).astype(np.float32)
    tensor_shapes = {
        tensor: names.their_shape(name, shape[1:] if names.is_stacked(name) else shape)
        for name, shape in pieces.shapes(config).items()
        for tensor in names.theirs(name, shape, config)
    }
    shards, room = [], 0
    for tensor, shape in tensor_shapes.items():
        nbytes = 4 * int(np.prod(shape))
        if room < nbytes:
            shards, room = [*shards, {}], shard
        shards[-1][tensor], room = ("F32", shape, nbytes), room - nbytes

    def data(tensor):
        left = int(np.prod(tensor_shapes[tensor]))
        while left > 0:
            yield noise[:left]
            left -= noise.size

    files = {}
    for i, part in enumerate(shards):
        safetensors_files.write(folder / f"model-{i}.safetensors", part, data)
        files |= dict.fromkeys(part, f"model-{i}.safetensors")
    sizes = [nbytes for part in shards for _, _, nbytes in part.values()]
    safetensors_files.write_index(folder, files, sum(sizes))
    (folder / "config.json").write_text(json.dumps(huggingface.from_config(config)))
    return {"total": sum(sizes), "largest": max(sizes), "files": len(shards)}


def peaks(*folders):
    """Peak RSS in bytes of a process that writes the checkpoints of folders, after each."""
    pairs = [str(path) for folder in folders for path in (folder, folder.with_suffix(".written"))]
    command = [sys.executable, "-c", CHILD, *pairs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_does_not_grow_with_the_checkpoint(tmp_path, tiny):
    """The small one first shows what the libraries take."""
    write_folder(tmp_path / "tiny", tiny, 2**30)
    sizes = write_folder(tmp_path / "a", SMALL, 80 * 2**20)
    assert sizes["files"] > 3
    before, after = peaks(tmp_path / "tiny", tmp_path / "a")
    room = 2 * sizes["largest"] + 2**26
    assert after - before < room < sizes["total"] / 1.5, (sizes, before, after)


@pytest.mark.skipif(not os.environ.get("GQA_LARGE_TESTS"), reason="writes 11 GiB")
def test_more_than_4_gib_take_twice_the_largest_tensor_and_one_gib(tmp_path):
    sizes = write_folder(tmp_path / "a", LARGE, 2**30)
    (peak,) = peaks(tmp_path / "a")
    print(json.dumps(sizes | {"peak": peak}))
    assert sizes["total"] >= 4 * 2**30
    assert peak < 2 * sizes["largest"] + 2**30


@pytest.fixture
def folder(tiny, random_params, tmp_path, monkeypatch):
    """A checkpoint whose blocks are smaller than its tensors."""
    monkeypatch.setattr(safetensors_files, "PIECE", 700)
    config = dataclasses.replace(
        tiny, num_kv_heads_self_attention=2, num_kv_heads_cross_attention=1
    )
    huggingface.save(random_params(config), config, tmp_path / "hf")
    return tmp_path / "hf", random_params(config), config


def test_blocks_make_the_checkpoint_that_arrays_make(folder, tmp_path):
    path, params, config = folder
    source = huggingface.open_folder(path)
    assert source.config == config
    assert len(list(source.blocks("decoder/layers/mlp/wi_0"))) > 2 * config.num_decoder_layers
    assert len(list(source.blocks("embedding"))) > 2
    jax.tree.map(np.testing.assert_array_equal, pieces.collect(source), params)
    opt_state = optimizer.adafactor().init(params)
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.write(5, source, {"opt_state": opt_state, "config": {"a": 1}, "data": {"b": 2}})
        assert (checkpoints.latest, checkpoints.measured) == (5, None)
        checkpoints.measure(5, {"validation_loss": 1.5})
    checksums.verify(tmp_path / "c" / "5", ["params", "opt_state"])
    state = training_step.abstract(config, make_mesh())
    items = {"params": state.params, "opt_state": state.opt_state, "data": None}
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.measured == 5
        back = checkpoints.restore(5, items)
    jax.tree.map(np.testing.assert_array_equal, back["params"], params)
    jax.tree.map(np.testing.assert_array_equal, back["opt_state"], opt_state)
    assert back["data"] == {"b": 2}
    assert checkpoint.load_config(tmp_path / "c") == {"a": 1}


def test_a_kill_while_writing_leaves_no_checkpoint(folder, tmp_path, monkeypatch):
    source = huggingface.open_folder(folder[0])

    class Killed(BaseException):
        pass

    def kill(source, name, folder):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(pieces, "write", kill)
        with (
            checkpoint.Checkpoints(tmp_path / "c") as checkpoints,
            pytest.raises(Killed),
        ):
            checkpoints.write(5, source, {"config": {}})
    with pytest.raises(UserError, match="no checkpoint in"):
        step_folders.find(tmp_path / "c")
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest is None
        assert not list((tmp_path / "c").iterdir())
        checkpoints.write(5, source, {"config": {}})
        assert checkpoints.latest == 5


def test_a_checkpoint_becomes_a_folder_of_hugging_face(folder, tmp_path):
    path, params, config = folder
    info = {"config": {"model": config.__dict__, "vocabulary": "another"}}
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.write(5, huggingface.open_folder(path), info)
        checkpoints.write(6, huggingface.open_folder(path), {"config": {"model": {"d_ff": 1}}})
    step = str(tmp_path / "c" / "5")
    run_command(["export", step, str(tmp_path / "a")])
    back, back_config = huggingface.load(tmp_path / "a")
    assert back_config == config
    jax.tree.map(np.testing.assert_array_equal, back, params)
    run_command(["export", step, str(tmp_path / "b"), "--expand"])
    assert huggingface.load(tmp_path / "b")[1].num_kv_heads_cross_attention == config.num_heads
    with pytest.raises(UserError, match="its config has no network"):
        run_command(["export", str(tmp_path / "c"), str(tmp_path / "d")])
    tokenizer.train(["some words to learn from"] * 20, 455, tmp_path / "x.model")
    with pytest.raises(UserError, match=r"x\.model is not the vocabulary that .*c/5 was trained"):
        run_command(["export", step, str(tmp_path / "d"), f"--vocabulary={tmp_path / 'x.model'}"])
