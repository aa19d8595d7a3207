"""Files of Flax are read as PyTorch's tensors, damaged ones are refused; the order of formats."""

import json
import os
import struct

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict

from gqa.interop import flax_files, huggingface, weights
from gqa.runtime.errors import CheckpointError, UserError
from tests.support.foreign_weights import flax_names, write_flax, write_torch


@pytest.fixture
def path(tmp_path):
    return tmp_path / flax_files.SINGLE


def test_arrays_are_those_of_flax_and_kernels_are_transposed(path):
    rng = np.random.default_rng(0)
    arrays = {
        "shared": {"embedding": rng.normal(size=(40, 3))},
        "block": {
            str(i): {"q": {"kernel": rng.normal(size=(2, 300)).astype(dtype)}, "n": {}}
            for i, dtype in enumerate(("float32", "float16", ml_dtypes.bfloat16))
        },
        "norm": {"weight": np.ones(70000, np.float32)},
    }
    path.write_bytes(serialization.msgpack_serialize(arrays))
    found = weights.open_folder(path.parent)
    np.testing.assert_array_equal(found.read("shared.weight"), arrays["shared"]["embedding"])
    np.testing.assert_array_equal(found.read("norm.weight", 5, 9), np.ones(9))
    for i, block in arrays["block"].items():
        expected = block["q"]["kernel"].T
        array = found.read(f"block.{i}.q.weight")
        assert array.dtype == found.floats(f"block.{i}.q.weight", (300, 2)) == expected.dtype
        np.testing.assert_array_equal(array, expected)
        np.testing.assert_array_equal(found.read(f"block.{i}.q.weight", 7, 2), expected[7:9])
    assert len(found) == 5


def test_a_t5_is_the_same_in_every_format_and_in_parts(tiny, random_params, tmp_path):
    state = huggingface.state_dict(random_params(tiny), tiny)
    halves = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
    for stem, ending, write in (
        ("pytorch_model", ".bin", write_torch),
        ("flax_model", ".msgpack", write_flax),
    ):
        whole, index = f"{stem}{ending}", f"{stem}{ending}.index.json"
        parts = {f"{stem}-{i}{ending}": half for i, half in enumerate(halves)}
        for files in ({whole: state}, parts):
            folder = tmp_path / f"{stem}-{len(files)}"
            folder.mkdir()
            places = {}
            for file, tensors in files.items():
                write(folder / file, tensors)
                names = (
                    flatten_dict(flax_names(tensors), sep="/") if write is write_flax else tensors
                )
                places |= dict.fromkeys(names, file)
            if files is parts:
                (folder / index).write_text(json.dumps({"weight_map": places}))
            found = weights.open_folder(folder)
            assert found.files == ([index, *parts] if files is parts else [whole])
            assert set(found) == set(state)
            for name, array in state.items():
                np.testing.assert_array_equal(found.read(name), array)


def test_the_order_of_formats_is_that_of_transformers(tmp_path):
    array = np.ones((2, 2), np.float32)
    write_flax(tmp_path / "flax_model.msgpack", {"a.weight": array})
    assert weights.open_folder(tmp_path).files == ["flax_model.msgpack"]
    write_torch(tmp_path / "one.bin", {"a.weight": 2 * array})
    index = {"weight_map": {"a.weight": "one.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    tensors = weights.open_folder(tmp_path)
    assert tensors.files == ["pytorch_model.bin.index.json", "one.bin"]
    np.testing.assert_array_equal(tensors.read("a.weight"), 2 * array)
    write_torch(tmp_path / "pytorch_model.bin", {"a.weight": 3 * array})
    assert weights.open_folder(tmp_path).files == ["pytorch_model.bin"]
    (tmp_path / "model.safetensors").write_bytes(b"x")  # damaged, and still the one that is meant
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        weights.open_folder(tmp_path)


def array(shape=(2, 3), dtype="float32", numbers=bytes(24)):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, numbers)))


FILES = {
    "no dict": ([1], "no array or dict at 'its beginning'"),
    "a number": ({"a": {"step": 3}}, "no array or dict at 'a/step'"),
    "a text": ({"a": "x"}, "no array or dict at 'a'"),
    "a key that is no text": ({3: array()}, "no array or dict at"),
    "another extension": ({"a": msgpack.ExtType(2, bytes(20))}, "'a' is no array; save the"),
    "an unknown dtype": ({"a": array(dtype="object")}, "'a' has dtype 'object'; use one of"),
    "too few numbers": ({"a": array((2, 4))}, r"'a' of shape \(2, 4\) has 24 bytes, or is cut"),
    "a size that overflows": ({"a": array((2**40, 2**60))}, "'a' of shape .* has 24 bytes"),
    "a negative size": ({"a": array((-2, -3))}, "no array or dict at 'a'"),
    "many axes": ({"a": array((1,) * 200)}, "array 'a' is damaged"),
    "two of one name": ({"a": {"kernel": array(), "weight": array()}}, r"two arrays 'a\.weight'"),
    "chunks": ({"a": {flax_files.CHUNKED: True}}, "array 'a' has more than 1 GB and is stored in"),
    "a long name": ({"a" * 2000: array()}, "too long names"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_array_is_refused(path, case):
    content, message = FILES[case]
    path.write_bytes(msgpack.packb(content))
    with pytest.raises(CheckpointError, match=rf"flax_model\.msgpack: .*{message}"):
        weights.open_folder(path.parent)


def test_nesting_and_numbers_of_names_are_bounded(path, monkeypatch):
    path.write_bytes(b"\x81\xa1a" * 10_000)
    with pytest.raises(CheckpointError, match="nests them too deeply"):
        weights.open_folder(path.parent)
    monkeypatch.setattr(flax_files, "MAX_KEYS", 100)
    path.write_bytes(struct.pack(">BL", 0xDF, 2**32 - 1) + b"\xa1a\x80" * 101)
    with pytest.raises(CheckpointError, match="has too many"):
        weights.open_folder(path.parent)


def test_every_cut_is_noticed(path):
    content = msgpack.packb({"a": array(), "b": {"kernel": array()}})
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="copy the file again"):
            weights.open_folder(path.parent)


def test_pipes_are_no_weights(path):
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a device, a pipe or a socket"):
        weights.open_folder(path.parent)
