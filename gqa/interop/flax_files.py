"""Files flax_model.msgpack: the places of their tensors, under the names of PyTorch.

Flax writes a nested dict as msgpack. An array is an extension that holds its shape, the name of its
dtype and its numbers. Only the bytes before the numbers are parsed here, because the package
msgpack would hold a whole array in memory; safetensors_files.py reads the numbers.
"""

import math
import os
from pathlib import Path
from typing import BinaryIO

from gqa.interop.safetensors_files import Tensor, check_is_downloaded, naming
from gqa.runtime import regular_files
from gqa.runtime.errors import CheckpointError

SINGLE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
# Flax's names of dtypes: those of safetensors, and the bytes of a number.
DTYPES = {"float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2)}
DTYPES |= {"bfloat16": ("BF16", 2), "int64": ("I64", 8), "int32": ("I32", 4)}
# The last part of Flax's name of a parameter, and PyTorch's. Kernels are transposed besides.
LAST_PARTS = {"kernel": "weight", "embedding": "weight"}
ARRAY = 1  # Flax's code of an extension that is an array
CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH = 32
MAX_KEYS = 2**18  # of all dicts together
MAX_NAME = 2**10  # bytes of a key
MAX_AXES = 8

# By the first byte of a value, how many bytes of its length come next, for each kind of value that
# msgpack has. A short value has its length in the first byte: which one stands for a length of 0,
# and how many lengths there are.
DICTS, SHORT_DICTS = {0xDE: 2, 0xDF: 4}, (0x80, 16)
TUPLES, SHORT_TUPLES = {0xDC: 2, 0xDD: 4}, (0x90, 16)
TEXTS, SHORT_TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}, (0xA0, 32)
SIZES, SHORT_SIZES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}, (0, 128)
BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}


def header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by PyTorch's names, in the order of their numbers in the file.

    Raises:
        CheckpointError: naming the file, and what in it is damaged or is no array.
    """
    check_is_downloaded(path)
    with naming(path), regular_files.open_regular(path) as file:
        reader = _Reader(file, path.name)
        reader.read_dict(())
        return reader.found


def torch_name(name: str) -> str:
    """Return PyTorch's name of a parameter, such as shared.weight for shared/embedding."""
    *path, last = name.split("/")
    return ".".join([*path, LAST_PARTS.get(last, last)])


class _Reader:
    """Reads a file from its beginning to its end, without the numbers of its arrays.

    Attributes:
        found: the tensors so far, by PyTorch's names.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name
        self.found: dict[str, Tensor] = {}
        self.keys = 0

    def read_dict(self, path: tuple[str, ...]) -> None:
        """Read the dict that begins here, whose keys in the dicts around it are `path`."""
        for _ in range(self._length(DICTS, SHORT_DICTS, path)):
            size = self._length(TEXTS, SHORT_TEXTS, path)
            self.keys += 1
            if self.keys > MAX_KEYS or size > MAX_NAME or len(path) > MAX_DEPTH:
                raise CheckpointError("has too many or too long names, or nests them too deeply")
            key = self._bytes(size).decode("utf-8", "replace")
            if key == CHUNKED:
                raise CheckpointError(
                    f"array {'/'.join(path)!r:.100} has more than 1 GB and is stored in chunks, "
                    "which are not read; save the model as safetensors"
                )

            inner = (*path, key)
            first = self._bytes(1)[0]
            self.file.seek(-1, os.SEEK_CUR)
            if first in DICTS or first - SHORT_DICTS[0] in range(SHORT_DICTS[1]):
                self.read_dict(inner)
                continue
            name = torch_name("/".join(inner))
            if name in self.found:
                raise CheckpointError(f"has two arrays {name!r:.100}; save the model again")
            self.found[name] = self._array(inner)

    def _array(self, path: tuple[str, ...]) -> Tensor:
        """Return the place of the array that begins here, and go on behind it."""
        name = "/".join(path)
        nbytes = self._length(EXTENSIONS, None, path)
        if self._bytes(1)[0] != ARRAY:
            raise CheckpointError(f"{name!r:.100} is no array; save the parameters alone")
        end = self.file.tell() + nbytes

        # The extension is a tuple of the shape, the name of the dtype, and the numbers.
        parts = self._length(TUPLES, SHORT_TUPLES, path)
        axes = self._length(TUPLES, SHORT_TUPLES, path)
        if parts != 3 or axes > MAX_AXES:
            raise CheckpointError(f"array {name!r:.100} is damaged; copy the file again")
        shape = tuple(self._length(SIZES, SHORT_SIZES, path) for _ in range(axes))
        dtype = self._bytes(min(self._length(TEXTS, SHORT_TEXTS, path), MAX_NAME)).decode("latin-1")
        if dtype not in DTYPES:
            raise CheckpointError(
                f"array {name!r:.100} has dtype {dtype!r:.30}; use one of {', '.join(DTYPES)}"
            )
        kind, itemsize = DTYPES[dtype]
        size = self._length(BYTES, None, path)
        start = self.file.tell()
        is_inside = start + size == end <= os.fstat(self.file.fileno()).st_size
        if size != math.prod(shape) * itemsize or not is_inside:
            raise CheckpointError(
                f"array {name!r:.100} of shape {shape} has {size:,} bytes, or is cut off; copy the "
                "file again"
            )
        self.file.seek(end)

        # PyTorch's weight of a linear layer is the transpose of Flax's kernel.
        if path[-1] == "kernel" and len(shape) == 2:
            return Tensor(self.name, kind, shape[::-1], start, size, (1, shape[1]))
        return Tensor(self.name, kind, shape, start, size)

    def _length(
        self, long: dict[int, int], short: tuple[int, int] | None, path: tuple[str, ...]
    ) -> int:
        """Read the length before a value of one kind, or a whole number."""
        first = self._bytes(1)[0]
        if first in long:
            return int.from_bytes(self._bytes(long[first]), "big")
        if short is not None and first - short[0] in range(short[1]):
            return first - short[0]
        place = "/".join(path) or "its beginning"
        raise CheckpointError(f"has no array or dict at {place!r:.100}; save the parameters alone")

    def _bytes(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise CheckpointError("ends too early; copy the file again")
        return data
