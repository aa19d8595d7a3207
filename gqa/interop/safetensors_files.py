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
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gqa.checkpoints import pieces
from gqa.runtime import atomic_files, checks, regular_files
from gqa.runtime.errors import CheckpointError, UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights beside the model that change it. Transformers loads them too, so they are never ignored.
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Endings of weights in other formats.
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx")
# Weights in another precision beside the usual ones, such as model.fp16.safetensors.
VARIANT = re.compile(
    r"(?:model|pytorch_model)\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)", re.ASCII
)
# The first bytes of the small file that Git LFS leaves in the place of a file not downloaded yet.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
PIECE = 2**25  # bytes that are read or copied at a time
MAX_INDEX_BYTES = 2**26  # the index of 100,000 tensors has 10 MB


class Tensor(NamedTuple):
    """The place of a tensor in a folder.

    Attributes:
        file: name of the file in the folder.
        dtype: safetensors' name of it, such as "BF16".
        start: offset of the tensor's first byte in the file.
        strides: numbers from one index of an axis to the next; None for a tensor whose numbers lie
            one behind the other, the last axis fastest.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    strides: tuple[int, ...] | None = None


class Format(NamedTuple):
    """A format of files with tensors.

    Attributes:
        single_file, index_file: names of a file with all tensors, and of the JSON file that says
            which of several files has which tensor.
        header: returns the tensors of a file in the order of their bytes.
        their_name: returns the name that `header` gives to a tensor of the index.
    """

    single_file: str
    index_file: str
    header: Callable[[Path], dict[str, Tensor]]
    their_name: Callable[[str], str] = str


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put `path` in front of the message of a UserError that is raised inside."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check(name: str, shape: tuple[int, ...], expected: tuple[int, ...], dtype: str) -> None:
    """Refuse a tensor of another shape than expected, or whose dtype is not a floating one."""
    if tuple(shape) != tuple(expected):
        raise CheckpointError(f"tensor {name} has shape {tuple(shape)}, expected {tuple(expected)}")
    if dtype not in FLOATS:
        raise CheckpointError(f"tensor {name} has dtype {dtype}; use one of {', '.join(FLOATS)}")


def check_folder(folder: Path) -> None:
    """Refuse a path that is no folder.

    Raises:
        CheckpointError: naming the path.
        ConfigError: if the path is an address.
    """
    checks.check_local_path("folder", folder)
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "No such folder"
        raise CheckpointError(f"{folder}: {fault}; name the folder with config.json")


def check_is_downloaded(path: Path) -> None:
    """Refuse a pointer of Git LFS, which stands in the place of a file not downloaded yet.

    Raises:
        CheckpointError: naming the path.
    """
    with regular_files.open_regular(path) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                f"{path}: is a pointer of Git LFS and not the file itself; run `git lfs pull` in "
                "its folder"
            )


def check_default_weights(config: dict, path: Path) -> None:
    """Refuse a config.json, read from `path`, that chooses another file of weights by its name.

    Raises:
        CheckpointError: naming the path.
    """
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{path}: transformers_weights chooses a file of weights by name, which is not "
            f"supported; rename the file to {SINGLE} and remove the key"
        )


def _find(folder: Path, formats: Sequence[Format]) -> Format:
    """Return the first of the formats of which a folder has a single file or an index."""
    for known in formats:
        if any(os.path.lexists(folder / name) for name in (known.single_file, known.index_file)):
            return known
    raise CheckpointError(_no_weights(folder, formats))


def _no_weights(folder: Path, formats: Sequence[Format]) -> str:
    """Return the message for a folder without weights that can be read."""
    single = formats[0].single_file
    for path in sorted(folder.iterdir()):
        # Transformers reads a variant only if its argument `variant` names it.
        if variant := VARIANT.fullmatch(path.name):
            is_whole = path.name == f"model.{variant[1]}.safetensors"
            rename = f"rename it to {SINGLE}"
            save = f"load it with Transformers' variant={variant[1]!r}, and save the model again"
            return f"{path}: is a variant of the weights, which is not read under this name; " + (
                rename if is_whole else save
            )
    for path in sorted(folder.iterdir()):
        for known in formats:
            if path.suffix == Path(known.single_file).suffix:
                return f"{path}: is not read without {known.index_file}; save the model as {single}"
        if path.suffix.lower() in OTHER_FORMATS:
            return f"{path}: is of a format that is not read; save the model as {single} first"
    names = " or ".join(known.single_file for known in formats)
    return f"{folder / single}: No such file; name a folder with {names}, or the index of several"


class Tensors:
    """The tensors of a folder by name, in the order of their files.

    A single file comes before an index of several, as in Transformers. Weights that Transformers
    would use besides, and tensors that an index leaves out, are refused and never ignored.

    Attributes:
        files: the names of the files that are read, the index among them.

    Args:
        formats: those that may be read. The first one that the folder has is read.

    Raises:
        CheckpointError: naming a file that is missing or that cannot be used.
    """

    def __init__(self, folder: str | os.PathLike, formats: Sequence[Format] | None = None):
        self.folder = Path(folder)
        check_folder(self.folder)
        for name in ADAPTERS:
            if (self.folder / name).exists():
                raise CheckpointError(
                    f"{self.folder / name}: an adapter changes the model; merge the adapter into "
                    "the weights (merge_and_unload of peft), or remove its files"
                )

        found = _find(self.folder, formats or (SAFETENSORS,))
        self._tensors: dict[str, Tensor] = {}
        self.path = self.folder / found.single_file
        if os.path.lexists(self.path):
            self.files = [found.single_file]
            self._tensors = found.header(self.path)
            return

        self.path = self.folder / found.index_file
        names_of = self._index(found.their_name)
        self.files = [found.index_file, *names_of]
        for file, names in names_of.items():
            in_file = found.header(self.folder / file)
            # Index and files must name the same tensors: a missing tensor cannot be read, and one
            # that the index leaves out would silently be ignored.
            for name in sorted(names ^ in_file.keys()):
                lacks = f"tensor {name} of {found.index_file} is not there"
                more = f"tensor {name} is not in {found.index_file} for this file"
                raise CheckpointError(
                    f"{self.folder / file}: {lacks if name in names else more}; "
                    "save the model again"
                )
            self._tensors |= in_file

    def _index(self, their_name: Callable[[str], str]) -> dict[str, set[str]]:
        """Return the names of the tensors of each file of the index."""
        files: dict[str, set[str]] = {}
        places = regular_files.read_json(self.path, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"{self.path}: weight_map names no tensor; save the model again")
        for name, file in places.items():
            # A path such as "../weights" would lead out of the folder.
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{self.path}: {file!r:.100} is not the name of a file")
            files.setdefault(file, set()).add(their_name(name))
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
        """Return a floating tensor in its dtype, or `count` of its rows from row `first`.

        Raises:
            CheckpointError: naming file and tensor, if the file has been cut since it was opened,
                or if a number is NaN or infinite.
        """
        tensor = self._tensors[name]
        dtype, (rows, *rest) = np.dtype(FLOATS[tensor.dtype]), tensor.shape
        shape = (rows - first if count is None else count, *rest)
        strides = tensor.strides or [math.prod(rest[axis:]) for axis in range(len(shape))]

        # Read all that lies between the first number of these rows and the last one. Contiguous
        # rows are one stretch of the file without gaps.
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        nbytes = span * dtype.itemsize if math.prod(shape) else 0
        with regular_files.open_regular(self.folder / tensor.file) as file:
            file.seek(tensor.start + first * strides[0] * dtype.itemsize)
            data = np.fromfile(file, np.uint8, nbytes)

        if data.size != nbytes:
            raise CheckpointError(f"{self.folder / tensor.file}: ends inside tensor {name}")

        steps = [stride * dtype.itemsize for stride in strides]
        array = np.lib.stride_tricks.as_strided(data.view(dtype), shape, steps)
        pieces.check_finite(array, f"{self.folder / tensor.file}: tensor {name}")
        return array

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
    # Transformers looks for this key; "pt" stands for PyTorch.
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
    """Return the tensors of a file in the order of their bytes."""
    check_is_downloaded(path)
    try:
        # The package compares all sizes with the size of the file before it takes memory.
        with safe_open(path, "np"):
            pass
    except (OSError, ValueError, SafetensorError, MemoryError) as error:
        text = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: {text}; copy the file again") from error

    with regular_files.open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: its header has more than {MAX_INDEX_BYTES:,} bytes")
        header = json.loads(file.read(length))

    header.pop("__metadata__", None)

    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        place = (8 + length + start, end - start)
        tensors[name] = Tensor(path.name, entry["dtype"], tuple(entry["shape"]), *place)
    return tensors


def _bytes(array: np.ndarray) -> memoryview:
    # As bytes, because Python's buffers have no bfloat16; as a vector, because NumPy cannot view a
    # single number as bytes.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


SAFETENSORS = Format(SINGLE, INDEX, _header)
