"""Measure stored arrays before TensorStore decodes them, so that a file cannot take all memory.

TensorStore decompresses a chunk as a whole and compares its size afterwards. A file of 200 KB can
so take gigabytes of memory. This file decompresses the same bytes piece by piece, keeps none of
them, and raises a CheckpointError at the first byte too many. Formats of arrays are zarr 2 (T5X)
and zarr 3 (Orbax); checkpoint.py and gqa/interop/t5x.py call it. The database that Orbax keeps
arrays in is checked by ocdbt_nodes.py.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (gives NumPy the names bfloat16, float8_e4m3fn ...)
import numpy as np
import pyarrow
import tensorstore

from gqa.checkpoints import ocdbt_nodes
from gqa.runtime.errors import CheckpointError

# The file that describes an array, by TensorStore's name of the format.
HEADERS = {"zarr": ".zarray", "zarr3": "zarr.json"}
# What a compressor, an index and a checksum add to a value that cannot be compressed, at most.
ENCODING_SLACK = 2**20
PIECE = 2**20  # bytes that are decompressed at a time
MAX_AXIS = 2**31 - 1
TOO_DEEP_OR_LARGE = (RecursionError, ArithmeticError)


class Header(NamedTuple):
    """The layout of a stored array.

    Attributes:
        shape: of the array.
        dtype: NumPy's or ml_dtypes' name, such as "float32" or "bfloat16".
        values: how many values the array is stored in.
        value_bytes: of a stored value, once decoded: a chunk, or a shard of several chunks.
        chunk_bytes: of a chunk, once decoded.
        compressor: name of the compression of a chunk; None for none.
        is_sharded: whether stored values are shards.
    """

    shape: tuple[int, ...]
    dtype: str
    values: int
    value_bytes: int
    chunk_bytes: int
    compressor: str | None
    is_sharded: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def kvstore(folder: Path) -> dict[str, Any]:
    """Return TensorStore's spec of the store in a folder: an OCDBT database, or plain files.

    The path is given as it is. In a URL, TensorStore would take "%20" or "#" for something else.
    """
    files = {"driver": "file", "path": f"{folder}/"}
    if (folder / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": files}
    return files


def read_header(store: tensorstore.KvStore, name: str, driver: str) -> Header:
    """Return how an array is stored.

    Args:
        store: the store with the array's folder.
        name: of that folder, without the last slash.
        driver: TensorStore's name of the format, "zarr" or "zarr3".

    Raises:
        CheckpointError: naming the array, if its header says what is not supported.
    """
    try:
        fields = json.loads(store.read(f"{name}/{HEADERS[driver]}").result().value)
        header = _zarr_header(fields) if driver == "zarr" else _zarr3_header(fields)
    except (LookupError, TypeError, AttributeError, ValueError, *TOO_DEEP_OR_LARGE) as error:
        raise _refused(name, f"its {HEADERS[driver]} is not understood: {error!r:.100}") from error

    # A chunk may be larger than a small array, but no array is far smaller than a chunk of it.
    if header.value_bytes > max(2**20, 2 * header.nbytes):
        raise _refused(name, f"a chunk of {header.value_bytes:,} bytes is larger than the array")
    return header


def check_chunks(store: tensorstore.KvStore, name: str, header: Header) -> None:
    """Check that every chunk of an array is there and has the size that its header says.

    Raises:
        CheckpointError: naming the array.
    """
    # "0" is the character after the slash: all keys from "name/" on.
    keys = store.list(tensorstore.KvStore.KeyRange(f"{name}/", f"{name}0")).result()
    chunks = [key for key in keys if not key.endswith((b".zarray", b".zattrs", b"zarr.json"))]
    if len(chunks) < header.values:
        raise _refused(name, f"{header.values - len(chunks)} of {header.values} chunks are missing")

    # Threads, because TensorStore, zlib and Arrow release Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault in pool.map(lambda key: _chunk_fault(store, key, header), chunks):
            if fault:
                raise _refused(name, fault)


def check_headers(folder: Path) -> None:
    """Check how every array is stored, as `read_headers` does."""
    read_headers(folder)


def read_headers(folder: Path) -> dict[str, Header]:
    """Return the headers of the arrays of an OCDBT database in zarr 3, as Orbax writes it.

    Raises:
        CheckpointError: naming the array or the file that is not as Orbax writes it.
    """
    ocdbt_nodes.check(folder)
    spec = kvstore(folder)
    store = tensorstore.KvStore.open(spec).result()
    ending = f"/{HEADERS['zarr3']}"
    keys = [key.decode("utf-8", "replace") for key in store.list().result()]

    headers = {}
    for name in (key.removesuffix(ending) for key in keys if key.endswith(ending)):
        headers[name] = read_header(store, name, "zarr3")
        # TensorStore knows more fields. Its error is clearer than the one that Orbax makes of it.
        try:
            tensorstore.open({"driver": "zarr3", "kvstore": spec | {"path": f"{name}/"}}).result()
        except ValueError as error:
            raise _refused(name, f"{error}") from error
    return headers


def check_all(folder: Path, most: int) -> None:
    """Check the chunks of every array of an OCDBT database in zarr 3.

    Args:
        most: bytes that all arrays together should have. No array may have more.

    Raises:
        CheckpointError: naming the array or the file that is not as Orbax writes it.
    """
    headers = read_headers(folder)
    store = tensorstore.KvStore.open(kvstore(folder)).result()
    for name, header in headers.items():
        if header.nbytes > most:
            raise _refused(name, f"shape {header.shape} is larger than that of all parameters")
        check_chunks(store, name, header)


def _refused(name: str, fault: str) -> CheckpointError:
    return CheckpointError(f"array {name}: {fault}; use another checkpoint")


def _zarr_header(fields: dict) -> Header:
    """Return the header of zarr 2."""
    if fields.get("filters"):
        raise ValueError("filters")

    dtype = np.dtype(fields["dtype"])
    compressor = _known(fields["compressor"]["id"]) if fields["compressor"] else None
    shape, chunk = _sizes(fields["shape"]), _sizes(fields["chunks"])
    nbytes = math.prod(chunk) * dtype.itemsize
    return Header(shape, dtype.name, _values(shape, chunk), nbytes, nbytes, compressor, False)


def _zarr3_header(fields: dict) -> Header:
    """Return the header of zarr 3; chunks may be gathered in shards, as Orbax does."""
    if fields.get("storage_transformers"):
        raise ValueError("storage_transformers")
    keys = fields["chunk_key_encoding"]
    if keys["name"] != "default" or keys.get("configuration", {}).get("separator", "/") != "/":
        raise ValueError("chunk_key_encoding")

    dtype = np.dtype(fields["data_type"])
    value = chunk = _sizes(fields["chunk_grid"]["configuration"]["chunk_shape"])
    codecs = fields["codecs"]

    is_sharded = codecs[0]["name"] == "sharding_indexed"
    if is_sharded:
        settings = codecs[0]["configuration"]
        if len(codecs) > 1 or settings.get("index_location", "end") != "end":
            raise ValueError("sharding_indexed with other codecs")
        if [codec["name"] for codec in settings["index_codecs"]] != ["bytes", "crc32c"]:
            raise ValueError("index_codecs")

        # From here on `value` is the shape of a shard, and `chunk` that of a chunk in it.
        chunk, codecs = _sizes(settings["chunk_shape"]), settings["codecs"]

    names = [codec["name"] for codec in codecs]
    if names[:1] != ["bytes"] or len(names) > 2:
        raise ValueError(f"codecs {names}")
    return Header(
        _sizes(fields["shape"]),
        dtype.name,
        _values(_sizes(fields["shape"]), value),
        math.prod(value) * dtype.itemsize,
        math.prod(chunk) * dtype.itemsize,
        _known(names[1]) if len(names) == 2 else None,
        is_sharded,
    )


def _values(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    # Rounded up for each axis: 10 rows in chunks of 4 are 3 chunks, of which the last is not full.
    return math.prod(-(-size // step) for size, step in zip(shape, chunk, strict=True))


def _sizes(value: list) -> tuple[int, ...]:
    if not all(type(size) is int and 0 <= size <= MAX_AXIS for size in value):
        raise ValueError(f"sizes {value}")
    return tuple(value)


def _known(compressor: str | None) -> str | None:
    if compressor is not None and compressor not in DECOMPRESSORS:
        raise ValueError(f"compression {compressor}")
    return compressor


def _chunk_fault(store: tensorstore.KvStore, key: bytes, header: Header) -> str | None:
    """Return what is wrong with a stored value, if anything."""
    # The index of a shard has 16 bytes for each chunk. A chunk has one byte or more, so the index
    # has at most 16 times the bytes of the shard.
    most = (17 if header.is_sharded else 1) * header.value_bytes + ENCODING_SLACK
    value = store.read(key).result().value
    chunk = key.decode("utf-8", "replace").rpartition("/")[2]
    if len(value) > most:
        return f"chunk {chunk} has more bytes than the header says"
    try:
        for encoded in _inner(value, header) if header.is_sharded else [value]:
            decompress = DECOMPRESSORS[header.compressor]
            total = _total(decompress(encoded), header.chunk_bytes)
            if total != header.chunk_bytes:
                than = "more" if total > header.chunk_bytes else "less"
                return (
                    f"chunk {chunk} has {than} than the {header.chunk_bytes:,} bytes that the "
                    "header says when it is decompressed"
                )
    except (OSError, ValueError, zlib.error) as error:
        return f"chunk {chunk} cannot be decompressed: {error}"
    return None


def _inner(value: bytes, header: Header) -> Iterator[bytes]:
    """Yield the chunks of a shard: an index of offsets and sizes is at its end, then a checksum."""
    count = header.value_bytes // max(header.chunk_bytes, 1)
    end = len(value) - 4 - 16 * count
    if end < 0:
        raise ValueError("no index")

    # Each entry of the index is an offset and a size; both have all bits set for a chunk that was
    # never written.
    for start, size in np.frombuffer(value[end:-4], "<u8").reshape(-1, 2).tolist():
        if start == size == 2**64 - 1:
            raise ValueError("a part of it is missing")
        yield value[start : start + size]


def _total(pieces: Iterable[int], most: int) -> int:
    """Return the sum of sizes; stop asking for more of them when it is larger than `most`."""
    total = 0
    for size in pieces:
        total += size
        if total > most:
            break
    return total


def _zstd(content: bytes) -> Iterator[int]:
    """Decompress zstd piece by piece, and yield the sizes of the pieces."""
    stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd")
    while size := stream.read_buffer(PIECE).size:
        yield size


def _zlib(content: bytes) -> Iterator[int]:
    """Decompress gzip or zlib piece by piece, and yield the sizes of the pieces."""
    while content:
        # A gzip file may consist of several streams in a row.
        decoder = zlib.decompressobj(wbits=47)  # either format
        while content and not decoder.eof:
            yield len(decoder.decompress(content, PIECE))
            content = decoder.unconsumed_tail
        content = decoder.unused_data


def _blosc(content: bytes) -> Iterator[int]:
    """Yield the size in Blosc's header, because its decoder allocates that size at once."""
    yield int.from_bytes(content[4:8], "little")


DECOMPRESSORS: dict[str | None, Callable[[bytes], Iterator[int]]] = {
    None: lambda content: iter([len(content)]),
    "zstd": _zstd,
    "gzip": _zlib,
    "zlib": _zlib,
    "blosc": _blosc,
}
