"""Folders of safetensors files, as Hugging Face keeps weights: read and written in pieces.

A file is the length of a header, the header (JSON with the dtype, shape and offsets of each
tensor), and the bytes of the tensors. The package `safetensors` checks the header. After that only
the rows that are asked for are read, so neither a file nor a large tensor is ever in memory as a
whole. Names of T5's tensors are in huggingface/names.py, those of decoder-only networks in
gqa/decoder_only/layout.py.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gqa.runtime import atomic_files, regular_files
from gqa.runtime.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
PIECE = 2**25  # bytes that are read or copied at a time
MAX_INDEX_BYTES = 2**26  # the index of 100,000 tensors has 10 MB


class Tensor(NamedTuple):
    """Where a tensor is in a folder.

    Attributes:
        file: name of the file in the folder.
        dtype: safetensors' name of it, such as "BF16".
        start: offset of the tensor's first byte in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put `path` in front of the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check(name: str, shape: tuple[int, ...], expected: tuple[int, ...], dtype: str) -> None:
    """Refuse a tensor of another shape than expected, or whose dtype is not a floating one."""
    if tuple(shape) != tuple(expected):
        raise UserError(f"tensor {name} has shape {tuple(shape)}, expected {tuple(expected)}")
    if dtype not in FLOATS:
        raise UserError(f"tensor {name} has dtype {dtype}; use one of {', '.join(FLOATS)}")


class Tensors:
    """The tensors of a folder by name, in the order of their files.

    Raises:
        UserError: when a file cannot be read, naming it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        index = self.folder / INDEX
        self.path = index if index.exists() else self.folder / SINGLE
        self._tensors: dict[str, Tensor] = {}
        for file, names in self._files().items():
            in_file = _header(self.folder / file)
            for name in names or in_file:
                if name not in in_file:
                    raise UserError(f"{self.folder / file}: tensor {name} of {INDEX} is not there")
                self._tensors[name] = in_file[name]

    def _files(self) -> dict[str, list[str]]:
        """Return the names of the tensors to read by file; an empty list means all."""
        if self.path.name == SINGLE:
            other = next(self.folder.glob("*.bin"), None)
            if other and not self.path.exists():
                raise UserError(f"{other}: not safetensors; save the model as {SINGLE} first")
            return {SINGLE: []}
        files: dict[str, list[str]] = {}
        places = regular_files.read_json(self.path, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{self.path}: weight_map names no tensor")
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{self.path}: {file!r} is not the name of a file")
            files.setdefault(file, []).append(name)
        return files

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def floats(self, name: str, shape: tuple[int, ...]) -> np.dtype:
        """Return the dtype of a tensor, which must be a floating one.

        Raises:
            UserError: naming the tensor, if its shape is not `shape` or its dtype not floating.
        """
        tensor = self._tensors[name]
        check(name, tensor.shape, shape, tensor.dtype)
        return np.dtype(FLOATS[tensor.dtype])

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return a floating tensor in its dtype, or `count` of its rows from row `first`."""
        tensor = self._tensors[name]
        dtype, (rows, *rest) = np.dtype(FLOATS[tensor.dtype]), tensor.shape
        count = rows - first if count is None else count
        row = math.prod(rest) * dtype.itemsize
        with regular_files.open_regular(self.folder / tensor.file) as file:
            file.seek(tensor.start + first * row)
            data = np.fromfile(file, np.uint8, count * row)
        if data.size != count * row:
            raise UserError(f"{self.folder / tensor.file}: ends inside tensor {name}")
        return data.view(dtype).reshape(count, *rest)

    def pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor of any dtype, at most PIECE at a time."""
        tensor = self._tensors[name]
        with regular_files.open_regular(self.folder / tensor.file) as file:
            file.seek(tensor.start)
            for done in range(0, tensor.nbytes, PIECE):
                yield file.read(min(PIECE, tensor.nbytes - done))


def write(
    path: Path,
    tensors: dict[str, tuple[str, tuple[int, ...], int]],
    data: Callable[[str], Iterable[bytes | np.ndarray]],
) -> int:
    """Write a whole safetensors file or none; return its size in bytes.

    Args:
        tensors: by name, safetensors' dtype, the shape and the number of bytes.
        data: returns the contents of the tensor with a name as bytes or arrays, in order.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        end = start + nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end

    # Data start at a multiple of 8 bytes, because readers map numbers of 8 bytes into memory.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_files.writing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            for piece in data(name):
                file.write(piece if isinstance(piece, bytes) else _bytes(piece))
        size = file.tell()
        if size != 8 + len(text) + start:
            # Our own mistake: the header would not describe the data.
            raise ValueError(f"{path}: {size} bytes instead of {8 + len(text) + start}")
    return size


def write_index(folder: Path, files: dict[str, str], nbytes: int) -> None:
    """Write the index of a folder: the file of every tensor, and the bytes of all tensors."""
    write_json(folder / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": files})


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, indented; a kill leaves the whole old file or the whole new one."""
    atomic_files.write(path, json.dumps(value, indent=2) + "\n")


def _header(path: Path) -> dict[str, Tensor]:
    regular_files.open_regular(path).close()
    try:
        with safe_open(path, "np"):  # compares sizes with the file's before it takes memory
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    with regular_files.open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        place = (8 + length + start, end - start)
        tensors[name] = Tensor(path.name, entry["dtype"], tuple(entry["shape"]), *place)
    return tensors


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
