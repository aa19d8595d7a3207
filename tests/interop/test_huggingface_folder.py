"""Saving replaces the model that a folder has, or leaves it as it is; odd folders are refused."""

import dataclasses
import errno
import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gqa.data import tokenizer
from gqa.interop import huggingface, safetensors_files
from gqa.interop.huggingface import writing
from gqa.runtime.errors import CheckpointError, ConfigError, UserError


@pytest.fixture
def network(tiny, random_params):
    return random_params(tiny), tiny


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def check_equal(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_nothing_of_an_older_model_stays(network, tmp_path, monkeypatch):
    params, config = network
    other = jax.tree.map(lambda x: x + 1, params)
    with monkeypatch.context() as patched:
        patched.setattr(writing, "MAX_SHARD_BYTES", 20_000)
        huggingface.save(params, config, tmp_path)
    shards = [name for name in names(tmp_path) if "-of-" in name]
    assert len(shards) > 2
    for name in ("generation_config.json", "README.md", "model-is-good.txt", "modeling_t5_gqa.py"):
        (tmp_path / name).write_text("{}")
    kept = ["README.md", "config.json", "model-is-good.txt", "model.safetensors"]
    huggingface.save(other, config, tmp_path)
    assert names(tmp_path) == kept
    check_equal(huggingface.load(tmp_path)[0], other)

    # The other way: many files in the place of one, and then fewer.
    for limit in (20_000, 40_000):
        monkeypatch.setattr(writing, "MAX_SHARD_BYTES", limit)
        huggingface.save(params, config, tmp_path)
        assert "model.safetensors" not in names(tmp_path)
        index = json.loads((tmp_path / safetensors_files.INDEX).read_text())["weight_map"]
        assert {n for n in names(tmp_path) if "-of-" in n} == set(index.values())
        check_equal(huggingface.load(tmp_path)[0], params)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "flax_model.msgpack",
     "adapter_config.json", "adapter_model.safetensors"],
)  # fmt: skip
def test_weights_that_others_wrote_are_not_deleted_and_not_left_beside_ours(
    network, tmp_path, name
):
    (tmp_path / name).write_text("x")
    with pytest.raises(CheckpointError, match=rf"{name}: is in the folder already"):
        huggingface.save(*network, tmp_path)
    assert names(tmp_path) == [name]


def test_a_failure_leaves_the_model_that_was_there(network, tmp_path, monkeypatch):
    params, config = network
    huggingface.save(params, config, tmp_path)
    before = names(tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_files, "write", fail)
        with pytest.raises(OSError, match="No space left"):
            huggingface.save(jax.tree.map(lambda x: x + 1, params), config, tmp_path)
    assert names(tmp_path) == before
    check_equal(huggingface.load(tmp_path)[0], params)


def test_what_a_kill_left_is_no_model_and_goes_at_the_next_save(network, tmp_path, monkeypatch):
    params, config = network
    huggingface.save(params, config, tmp_path)
    stale = tmp_path / f"{writing.UNFINISHED}abc"
    stale.mkdir()
    (stale / "model.safetensors").write_text("x")
    with monkeypatch.context() as patched:
        renamed = []
        rename = type(tmp_path).rename
        patched.setattr(
            type(tmp_path), "rename",
            lambda self, to: rename(self, to) if not renamed.append(to) and len(renamed) < 2
            else (_ for _ in ()).throw(KeyboardInterrupt),
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            huggingface.save(jax.tree.map(lambda x: x + 1, params), config, tmp_path)
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        huggingface.load(tmp_path)
    huggingface.save(params, config, tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors"]
    check_equal(huggingface.load(tmp_path)[0], params)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(network, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied; name a folder that can be"):
        huggingface.save(*network, tmp_path / "a")


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_folder_that_cannot_be_made_is_one_line(network, tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"; name a folder that can be written$"):
        huggingface.save(*network, tmp_path / "file" / below)
    with pytest.raises(ConfigError, match="is a URL; mount the bucket"):
        huggingface.save(*network, "gs://bucket/folder")


def test_another_file_of_weights_that_the_config_chooses_is_refused(network, tmp_path):
    huggingface.save(*network, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"transformers_weights": "other.safetensors"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: transformers_weights chooses a file"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_in_files_and_in_memory(network, tmp_path, bad):
    params, config = network
    name = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    state = huggingface.state_dict(params, config)
    state[name][1, 2] = bad
    hf_config = huggingface.from_config(config)
    with pytest.raises(CheckpointError, match=f"tensor {name} has NaN or infinite numbers"):
        huggingface.from_state_dict(state, hf_config)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} has NaN"):
        huggingface.load(tmp_path)


def test_a_number_that_is_infinite_in_32_bits_is_refused(network):
    params, config = network
    state = huggingface.state_dict(params, dataclasses.replace(config))
    name = "encoder.final_layer_norm.weight"
    state[name] = state[name].astype(np.float64)
    state[name][0] = 1e300
    with pytest.raises(CheckpointError, match=f"tensor {name}, in float32, has NaN or infinite"):
        huggingface.from_state_dict(state, huggingface.from_config(config))


def test_files_of_the_source_are_those_that_are_read(network, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 20_000)
    huggingface.save(*network, tmp_path)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "other.safetensors").write_text("x")
    files = huggingface.open_folder(tmp_path).files
    assert {path.name for path in files} == set(names(tmp_path)) - {
        "README.md",
        "other.safetensors",
    }


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_known(network, tmp_path, name):
    huggingface.save(*network, tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(CheckpointError, match=rf"{name}: is a pointer of Git LFS"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json"])
def test_another_tokenizer_does_not_stay_beside_a_new_vocabulary(network, tmp_path, name):
    """Transformers would add its tokens to ours."""
    tokenizer.train(["some words to learn from"] * 20, 455, tmp_path / "a.model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name}: .* place of the new spiece\.model or"):
        huggingface.save(*network, tmp_path / "model", vocabulary=tmp_path / "a.model")
    assert names(tmp_path / "model") == [name]
    huggingface.save(*network, tmp_path / "model")


def test_a_new_vocabulary_replaces_the_old_one(network, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model"):
        (folder / name).write_text("{}")
    tokenizer.train(["some words to learn from"] * 20, 455, tmp_path / "a.model")
    huggingface.save(*network, folder, vocabulary=tmp_path / "a.model")
    for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model"):
        assert (folder / name).stat().st_size > 2
