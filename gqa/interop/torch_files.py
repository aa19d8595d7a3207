"""Files of torch.save: the places of their tensors, found without torch and without running code.

Since torch 1.6 a file is a zip file: data.pkl describes the tensors, data/0, data/1 ... hold their
numbers. Older files are five pickles, of which the fourth describes the tensors, and the numbers
behind them. torch_pickles.py reads pickles, zip_members.py finds the members of a zip file, and
safetensors_files.py reads the tensors from their places.
"""

import io
import math
import os
from pathlib import Path
from typing import BinaryIO

from gqa.interop import torch_pickles, zip_members
from gqa.interop.safetensors_files import PIECE, Tensor, check_is_downloaded, naming
from gqa.interop.torch_pickles import View
from gqa.runtime import regular_files
from gqa.runtime.errors import CheckpointError

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MAX_PICKLE_BYTES = 2**24  # the pickle of 50,000 tensors has 10 MB
# The first two values of a file that is older than torch 1.6.
OLD_MAGIC, OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001
# A tensor that is not contiguous is read with all that lies between its numbers.
MAX_SPAN = 4  # times the bytes of the tensor


def header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, in the order of their numbers in the file.

    Raises:
        CheckpointError: naming the file, and what in it is damaged, or is more than a state dict.
    """
    check_is_downloaded(path)
    with naming(path), regular_files.open_regular(path) as file:
        is_zip = file.read(len(zip_members.LOCAL)) == zip_members.LOCAL
        views, storages = (_read_zip if is_zip else _read_old)(file)
        tensors = {name: _tensor(path.name, name, views[name], storages) for name in views}
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def _read_zip(file: BinaryIO) -> tuple[dict[str, View], dict[str, tuple[int, int]]]:
    """Return the tensors of a zip file, and the place and the bytes of each storage by its key."""
    members = zip_members.members(file)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"has {len(pickles)} members data.pkl instead of one; save model.state_dict()"
        )
    (prefix,) = (name.removesuffix("data.pkl") for name in pickles)
    if f"{prefix}constants.pkl" in members:
        raise CheckpointError("is a program of TorchScript; save model.state_dict()")
    order = members.get(f"{prefix}byteorder")
    if order is not None and zip_members.read(file, order, 16) != b"little":
        raise CheckpointError("its numbers are not little-endian; save the model as safetensors")

    pickle = zip_members.read(file, members[pickles[0]], MAX_PICKLE_BYTES)
    views = torch_pickles.views(torch_pickles.read(io.BytesIO(pickle)))
    storages = {}
    for key in {view.storage.key for view in views.values()}:
        member = members.get(f"{prefix}data/{key}")
        if member is None:
            raise CheckpointError(f"has no member data/{key!r:.100}; copy the file again")
        storages[key] = (zip_members.start(file, member), member.nbytes)
    return views, storages


def _read_old(file: BinaryIO) -> tuple[dict[str, View], dict[str, tuple[int, int]]]:
    """Return the tensors of a file older than torch 1.6, and each storage as `_read_zip` does."""
    file.seek(0)
    pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    for expected in (OLD_MAGIC, OLD_VERSION):
        if torch_pickles.read(pickles) != expected:
            raise CheckpointError("is not a file that torch.save has written")
    system = torch_pickles.read(pickles)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("its numbers are not little-endian; save the model as safetensors")
    views = torch_pickles.views(torch_pickles.read(pickles))
    keys = torch_pickles.read(pickles)

    # Each storage is the number of its numbers in 8 bytes, and then the numbers.
    itemsizes = {view.storage.key: view.storage.itemsize for view in views.values()}
    storages, start, size = {}, pickles.tell(), os.fstat(file.fileno()).st_size
    for key in keys if isinstance(keys, list) else ():
        file.seek(start)
        count = int.from_bytes(file.read(8), "little")
        nbytes = count * itemsizes[key] if isinstance(key, str) and key in itemsizes else size
        if start + 8 + nbytes > size:
            raise CheckpointError("its list of storages is damaged; copy the file again")
        storages[key] = (start + 8, nbytes)
        start += 8 + nbytes
    return views, storages


def _tensor(file: str, name: str, view: View, storages: dict[str, tuple[int, int]]) -> Tensor:
    """Return the place of a tensor in the file, from its place in its storage."""
    storage = view.storage
    start, nbytes = storages.get(storage.key, (0, 0))
    if nbytes != storage.numel * storage.itemsize:
        raise CheckpointError(
            f"the storage of tensor {name!r:.100} has {nbytes:,} bytes instead of "
            f"{storage.numel * storage.itemsize:,}; copy the file again"
        )

    nbytes = math.prod(view.shape) * storage.itemsize
    if view.span * storage.itemsize > MAX_SPAN * nbytes + PIECE:
        raise CheckpointError(
            f"tensor {name!r:.100} is a small part of a large storage; save a contiguous copy of it"
        )
    start += view.offset * storage.itemsize
    return Tensor(file, storage.dtype, view.shape, start, nbytes, view.strides)
