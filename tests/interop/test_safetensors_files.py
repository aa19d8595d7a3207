"""Files of tensors in pieces: the layout on disk, parts of a tensor, and what is refused."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gqa.interop import safetensors_files
from gqa.interop.safetensors_files import Tensors
from gqa.runtime.errors import CheckpointError, UserError


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "b": rng.normal(size=(5, 3)).astype(np.float32),
        "a": rng.normal(size=(4, 2, 3)).astype(np.float64),
        "count": np.arange(3),
    }


def test_rows_of_a_tensor_are_read_alone(tmp_path, arrays):
    save_file(arrays, tmp_path / safetensors_files.SINGLE)
    found = Tensors(tmp_path)
    assert len(found) == 3
    for name in ("a", "b"):
        np.testing.assert_array_equal(found.read(name), arrays[name])
        np.testing.assert_array_equal(found.read(name, 1, 2), arrays[name][1:3])
        np.testing.assert_array_equal(found.read(name, 3), arrays[name][3:])
        assert found.floats(name, arrays[name].shape) == arrays[name].dtype


@pytest.mark.parametrize("piece", [7, 60, 2**20])
def test_pieces_are_the_bytes_of_a_tensor_of_any_dtype(tmp_path, arrays, monkeypatch, piece):
    monkeypatch.setattr(safetensors_files, "PIECE", piece)
    save_file(arrays, tmp_path / safetensors_files.SINGLE)
    found = Tensors(tmp_path)
    for name, x in arrays.items():
        pieces = list(found.pieces(name))
        assert b"".join(pieces) == x.tobytes()
        assert max(map(len, pieces)) <= piece


def test_what_is_written_safetensors_reads_and_data_is_aligned(tmp_path, arrays):
    described = {name: ({"f": f"F{8 * x.itemsize}", "i": "I64"}[x.dtype.kind], x.shape, x.nbytes)
                 for name, x in arrays.items()}  # fmt: skip
    path = tmp_path / "a.safetensors"
    size = safetensors_files.write(
        path, described, lambda name: [arrays[name][:1], arrays[name][1:]]
    )
    assert size == path.stat().st_size
    for name, x in load_file(path).items():
        np.testing.assert_array_equal(x, arrays[name])
    # Numbers of 8 bytes may be mapped into memory: the header fills whole multiples of 8.
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with pytest.raises(ValueError, match="bytes instead of"):
        safetensors_files.write(
            tmp_path / "b.safetensors", described, lambda name: [arrays[name][:1]]
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_was_cut_since_it_was_opened_is_noticed(tmp_path, arrays):
    path = tmp_path / safetensors_files.SINGLE
    save_file(arrays, path)
    found = Tensors(tmp_path)
    last = max(("a", "b"), key=lambda name: found[name].start)
    path.write_bytes(path.read_bytes()[: found[last].start + 5])
    with pytest.raises(UserError, match=f"ends inside tensor {last}"):
        found.read(last)


def test_an_index_names_files_of_its_own_folder_and_their_tensors(tmp_path, arrays):
    save_file(arrays, tmp_path / "one.safetensors")
    safetensors_files.write_index(tmp_path, {"b": "one.safetensors"}, 60)
    index = json.loads((tmp_path / safetensors_files.INDEX).read_text())
    assert index == {"metadata": {"total_size": 60}, "weight_map": {"b": "one.safetensors"}}
    message = r"one\.safetensors: tensor a is not in model\.safetensors\.index\.json for this file"
    with pytest.raises(UserError, match=message):
        Tensors(tmp_path)
    for places, message in {
        "../one.safetensors": "'../one.safetensors' is not the name of a file",
        "two.safetensors": "two.safetensors: No such file",
    }.items():
        safetensors_files.write_index(tmp_path, {"b": places}, 60)
        with pytest.raises(UserError, match=message):
            Tensors(tmp_path)
    places = dict.fromkeys([*arrays, "z"], "one.safetensors")
    safetensors_files.write_index(tmp_path, places, 60)
    with pytest.raises(UserError, match=r"tensor z of model.safetensors.index.json is not there"):
        Tensors(tmp_path)
    safetensors_files.write_index(tmp_path, {}, 0)
    with pytest.raises(UserError, match="weight_map names no tensor"):
        Tensors(tmp_path)


def test_the_single_file_comes_before_an_index_as_in_transformers(tmp_path, arrays):
    """An index of an earlier, larger model may have stayed beside it."""
    save_file({"b": arrays["b"] + 1, "old": arrays["b"]}, tmp_path / "one.safetensors")
    safetensors_files.write_index(tmp_path, dict.fromkeys(["b", "old"], "one.safetensors"), 120)
    assert set(Tensors(tmp_path)) == {"b", "old"}
    assert Tensors(tmp_path).files == ["model.safetensors.index.json", "one.safetensors"]
    save_file(arrays, tmp_path / safetensors_files.SINGLE)
    tensors = Tensors(tmp_path)
    assert (set(tensors), tensors.files) == (set(arrays), [safetensors_files.SINGLE])
    np.testing.assert_array_equal(tensors.read("b"), arrays["b"])


def test_a_tensor_in_a_file_that_the_index_gives_to_another_is_refused(tmp_path, arrays):
    save_file({"b": arrays["b"]}, tmp_path / "one.safetensors")
    save_file({"b": arrays["b"] + 1, "a": arrays["a"]}, tmp_path / "two.safetensors")
    places = {"b": "one.safetensors", "a": "two.safetensors"}
    safetensors_files.write_index(tmp_path, places, 120)
    with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor b is not in .* this file"):
        Tensors(tmp_path)


@pytest.mark.parametrize("name", safetensors_files.ADAPTERS)
def test_an_adapter_beside_the_model_is_refused(tmp_path, arrays, name):
    save_file(arrays, tmp_path / safetensors_files.SINGLE)
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name}: an adapter changes the model; merge"):
        Tensors(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.Q4.gguf", "consolidated.00.pth", "x.PT", "tf_model.h5"]
)
def test_weights_in_another_format_alone_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: is of a format that is not read; save"):
        Tensors(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model.fp16.safetensors", "rename it to model.safetensors"),
        ("pytorch_model.fp32.bin", "variant='fp32', and save the model again"),
        ("model.fp16-00001-of-00002.safetensors", "variant='fp16', and save the model again"),
    ],
)
def test_a_variant_of_the_weights_alone_is_named(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: is a variant of the weights, .*{advice}"):
        Tensors(tmp_path)


def test_shards_without_an_index_are_named(tmp_path, arrays):
    save_file(arrays, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002\.safetensors: is not read with"
    ):
        Tensors(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("google/t5-v1_1-small", "google/t5-v1_1-small: No such folder; name the folder with"),
        ("gs://bucket/model", "folder='gs://bucket/model' is a URL; mount the bucket"),
        ("/no/such/folder", "/no/such/folder: No such folder; name the folder with config.json"),
        (__file__, "is a file; name the folder with config.json"),
    ],
)
def test_what_is_no_folder_comes_with_advice(name, message):
    with pytest.raises(UserError, match=message):
        Tensors(name)


def test_a_pointer_of_git_lfs_is_known(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / safetensors_files.SINGLE).write_text(pointer)
    with pytest.raises(CheckpointError, match=r"is a pointer of Git LFS .*; run `git lfs pull`"):
        Tensors(tmp_path)


def test_pipes_and_devices_are_no_weights(tmp_path):
    path = tmp_path / safetensors_files.SINGLE
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        make(path)
        with pytest.raises(UserError, match="is a device, a pipe or a socket"):
            Tensors(tmp_path)
        path.unlink()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_numbers_that_are_not_finite_are_refused_by_tensor(tmp_path, bad, dtype):
    x = np.zeros((4, 3)).astype(jnp.dtype(dtype))
    x[2, 1] = bad
    save_file({"x": x, "y": np.zeros_like(x)}, tmp_path / safetensors_files.SINGLE)
    tensors = Tensors(tmp_path)
    tensors.read("y")
    tensors.read("x", 0, 2)
    message = r"model\.safetensors: tensor x has NaN or infinite numbers; use another checkpoint"
    with pytest.raises(CheckpointError, match=message):
        tensors.read("x", 2, 1)


def test_shapes_and_dtypes_are_checked(tmp_path, arrays):
    save_file(arrays, tmp_path / safetensors_files.SINGLE)
    found = Tensors(tmp_path)
    with pytest.raises(UserError, match=r"tensor b has shape \(5, 3\), expected \(3, 5\)"):
        found.floats("b", (3, 5))
    with pytest.raises(UserError, match="tensor count has dtype I64; use one of F64, F32"):
        found.floats("count", (3,))
