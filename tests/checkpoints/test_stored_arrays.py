"""What is stored is measured before it is decoded: no chunk or node is larger than it may be."""

import gzip
import json
import zlib

import ml_dtypes
import numpy as np
import pytest
import tensorstore

from gqa.checkpoints import stored_arrays
from gqa.runtime.errors import CheckpointError
from tests.support import memory
from tests.support.orbax_files import crc32c, load, open_store, replace, save

GIB, MIB = 2**30, 2**20


def zstd_bomb(nbytes):
    """Zeros compressed by zstd: blocks that say "this byte, 128 KiB times", of 4 bytes each."""
    count = nbytes // 2**17
    blocks = [(2**17 << 3 | 1 << 1 | (i == count - 1)).to_bytes(3, "little") for i in range(count)]
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"\x00".join(blocks) + b"\x00"


def shard(*chunks):
    """A shard of zarr 3: chunks, an index of their offsets and sizes, its checksum."""
    offsets = np.cumsum([0, *map(len, chunks)]).tolist()
    index = np.array([(o, len(x)) for o, x in zip(offsets, chunks, strict=False)], "<u8").tobytes()
    return b"".join(chunks) + index + crc32c(index)


@pytest.fixture
def step(tmp_path):
    """A checkpoint with an array of 6 numbers and one of 2 x 3."""
    return save(tmp_path / "run")


def test_a_chunk_far_larger_than_its_array_is_refused_before_it_is_decoded(step):
    replace(step, "a/c/0", shard(zstd_bomb(3 * GIB)))
    assert sum(p.stat().st_size for p in step.rglob("*") if p.is_file()) < MIB
    with memory.peak() as used, pytest.raises(CheckpointError, match="array a: chunk 0 has more"):
        load(step)
    assert used.nbytes < 256 * MIB


def test_a_chunk_of_the_size_that_was_saved_comes_back(step):
    np.testing.assert_array_equal(load(step)["a"], np.arange(6))
    chunk = np.full(6, 2, np.float32).tobytes()
    frame = b"\x28\xb5\x2f\xfd\x20" + bytes([len(chunk)]) + (24 << 3 | 1).to_bytes(3, "little")
    replace(step, "a/c/0", shard(frame + chunk))
    np.testing.assert_array_equal(load(step)["a"], np.full(6, 2))


def test_a_header_that_describes_something_else_is_refused(step):
    header = json.loads(open_store(step / "params").read("a/zarr.json").result().value)
    codec = header["codecs"][0]["configuration"]
    cases = [
        (header | {"shape": [7]}, r"- a \(7,\)"),
        (header | {"data_type": "int32"}, r"- a \(6,\) int32"),
        (header | {"codecs": [{"name": "bytes"}, {"name": "bz2"}]}, "array a"),
        (header | {"codecs": [{"name": "sharding_indexed"}] * 2}, "array a"),
        (header | {"node_type": "group"}, "array a"),
        (header | {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**40]}}},
         "array a"),
        (header | {"codecs": [{"name": "sharding_indexed",
                               "configuration": codec | {"index_location": "start"}}]},
         "array a: its zarr.json is not understood"),
    ]  # fmt: skip
    for content, message in cases:
        replace(step, "a/zarr.json", json.dumps(content))
        with pytest.raises(CheckpointError, match=message) as caught:
            load(step)
        assert "\n" not in str(caught.value)
    for content in (b"[" * 10**5, b"7", b"", b"\xff"):
        replace(step, "a/zarr.json", content)
        with pytest.raises(CheckpointError, match=r"array a: its zarr\.json is not understood"):
            load(step)


@pytest.mark.parametrize(
    ("compressor", "encode"),
    [
        ("gzip", gzip.compress),
        ("zlib", zlib.compress),
        ("gzip", lambda x: gzip.compress(x[:-1]) + gzip.compress(x[-1:])),
        (None, lambda x: x),
        ("blosc", lambda x: bytes(4) + len(x).to_bytes(4, "little") + bytes(8)),
    ],
)
def test_every_compression_is_measured(tmp_path, compressor, encode):
    header = {"shape": [8], "chunks": [8], "dtype": "<f4", "filters": None,
              "compressor": compressor and {"id": compressor}}  # fmt: skip
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result()
    store.write("x/.zarray", json.dumps(header)).result()
    store.write("x/0", encode(bytes(32))).result()
    described = stored_arrays.read_header(store, "x", "zarr")
    assert described[:4] == ((8,), "float32", 1, 32)
    stored_arrays.check_chunks(store, "x", described)
    store.write("x/0", encode(bytes(33))).result()
    with pytest.raises(CheckpointError, match="array x: chunk 0 has more than the 32 bytes that"):
        stored_arrays.check_chunks(store, "x", described)
    store.write("x/0", encode(bytes(31))).result()
    with pytest.raises(CheckpointError, match="array x: chunk 0 has less than the 32 bytes that"):
        stored_arrays.check_chunks(store, "x", described)
    store.write("x/0", None).result()
    with pytest.raises(CheckpointError, match="array x: 1 of 1 chunks are missing"):
        stored_arrays.check_chunks(store, "x", described)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compressor": {"id": "bz2"}}, "compression bz2"),
        ({"filters": [{"id": "delta"}]}, "filters"),
        ({"shape": [-1]}, "sizes"),
        ({"shape": [2**31]}, "sizes"),
        ({"shape": "8"}, "sizes"),
        ({"chunks": [2**20]}, "a chunk of 4,194,304 bytes is larger than the array"),
        ({"dtype": "no"}, "not understood"),
        ({"dtype": None, "compressor": 7}, "not understood"),
    ],
)
def test_a_header_of_zarr_2_that_is_not_supported_names_the_array(tmp_path, change, message):
    header = {"shape": [8], "chunks": [8], "dtype": "<f4", "filters": None, "compressor": None}
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result()
    store.write("x/.zarray", json.dumps(header | change)).result()
    with pytest.raises(CheckpointError, match=f"array x: .*{message}"):
        stored_arrays.read_header(store, "x", "zarr")


def test_arrays_of_every_dtype_and_many_chunks_pass(tmp_path):
    """What TensorStore writes is never taken for too large, in chunks that do not divide it."""
    for dtype in ("float32", "bfloat16", "int32", "bool"):
        x = np.arange(7 * 11).reshape(7, 11).astype(getattr(ml_dtypes, dtype, dtype))
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/{dtype}/"}}
        inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]
        sharding = {"chunk_shape": [2, 3], "codecs": inner}
        spec["metadata"] = {
            "shape": x.shape, "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 6]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }  # fmt: skip
        tensorstore.open(spec, create=True).result().write(x).result()
        store = tensorstore.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result()
        header = stored_arrays.read_header(store, dtype, "zarr3")
        assert header.nbytes == x.nbytes
        stored_arrays.check_chunks(store, dtype, header)


def test_arrays_on_several_shapes_are_bounded_by_what_is_expected(step):
    """An array that nobody asked for may not be larger than all that were."""
    header = json.loads(open_store(step / "params").read("a/zarr.json").result().value)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [2**28]}}
    big = header | {"shape": [2**30], "codecs": codecs, "chunk_grid": grid}
    replace(step, "z/zarr.json", json.dumps(big))
    with pytest.raises(CheckpointError, match=r"array z: shape \(1073741824,\) is larger than"):
        load(step)
