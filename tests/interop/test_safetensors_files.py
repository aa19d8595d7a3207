"""Files of tensors in pieces: the layout on disk, parts of a tensor, and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gqa.interop import safetensors_files
from gqa.interop.safetensors_files import Tensors
from gqa.runtime.errors import UserError


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
    assert list(Tensors(tmp_path)) == ["b"]  # the others are not asked for
    for places, message in {
        "../one.safetensors": "'../one.safetensors' is not the name of a file",
        "two.safetensors": "two.safetensors: No such file",
    }.items():
        safetensors_files.write_index(tmp_path, {"b": places}, 60)
        with pytest.raises(UserError, match=message):
            Tensors(tmp_path)
    safetensors_files.write_index(tmp_path, {"z": "one.safetensors"}, 60)
    with pytest.raises(UserError, match=r"tensor z of model.safetensors.index.json is not there"):
        Tensors(tmp_path)
    safetensors_files.write_index(tmp_path, {}, 0)
    with pytest.raises(UserError, match="weight_map names no tensor"):
        Tensors(tmp_path)


def test_weights_in_another_format_alone_are_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not safetensors; save the model"):
        Tensors(tmp_path)


def test_shapes_and_dtypes_are_checked(tmp_path, arrays):
    save_file(arrays, tmp_path / safetensors_files.SINGLE)
    found = Tensors(tmp_path)
    with pytest.raises(UserError, match=r"tensor b has shape \(5, 3\), expected \(3, 5\)"):
        found.floats("b", (3, 5))
    with pytest.raises(UserError, match="tensor count has dtype I64; use one of F64, F32"):
        found.floats("count", (3,))
