"""Files of weights as PyTorch and Flax write them, and pickles instruction by instruction."""

import pickle
import zipfile

import numpy as np
from flax import serialization
from flax.traverse_util import unflatten_dict

STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage"}
STORAGES |= {"bfloat16": "BFloat16Storage", "int64": "LongStorage"}
REBUILD = "torch._utils._rebuild_tensor_v2"
ORDERED_DICT = "collections.OrderedDict"


def constant(value):
    """The instructions that put a constant on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def name(text):
    """The instruction that puts the function or class MODULE.NAME on the stack."""
    module, _, last = text.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def storage(kind="FloatStorage", key="0", numel=6, extra=b""):
    pieces = [
        constant("storage"),
        name(f"torch.{kind}"),
        *map(constant, (key, "cpu", numel)),
        extra,
    ]
    return b"(" + b"".join(pieces) + b"tQ"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, stored=None):
    """The instructions that rebuild a tensor."""
    place = [stored or storage(), *map(constant, (offset, shape, strides, False))]
    hooks = name(ORDERED_DICT) + b")R"
    return name(REBUILD) + b"(" + b"".join(place) + hooks + b"tR"


def state(**entries):
    """The pickle of a dict, from the instructions for its values."""
    items = b"".join(constant(key) + value for key, value in entries.items())
    return b"\x80\x02}(" + items + b"u."


def write_archive(path, pickled, storages, prefix="archive", **members):
    """Write a zip file as torch.save does: the pickle, and the bytes of storages by their keys."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{prefix}/data.pkl", pickled)
        for key, content in {"byteorder": b"little", **members}.items():
            archive.writestr(f"{prefix}/{key}", content)
        for key, content in storages.items():
            archive.writestr(f"{prefix}/data/{key}", content)


def write_torch(path, arrays):
    """Write a state dict of NumPy's arrays as pytorch_model.bin."""
    entries, storages = {}, {}
    for key, (entry, array) in enumerate(arrays.items()):
        strides = tuple(step // array.itemsize for step in np.zeros_like(array, order="C").strides)
        stored = storage(STORAGES[array.dtype.name], str(key), array.size)
        entries[entry] = tensor(array.shape, strides, 0, stored)
        storages[str(key)] = array.tobytes()
    write_archive(path, state(**entries), storages)


def flax_names(arrays):
    """Flax's nested dict of a state dict of T5: kernels are transposed, and have other names."""

    def renamed(key, array):
        *path, last = key.split(".")
        if array.ndim == 1:
            return (*path, last), array
        is_table = path[-1] in ("shared", "relative_attention_bias")
        return (*path, "embedding" if is_table else "kernel"), array if is_table else array.T

    return unflatten_dict(dict(renamed(key, array) for key, array in arrays.items()))


def write_flax(path, arrays):
    """Write a state dict of NumPy's arrays as flax_model.msgpack."""
    path.write_bytes(serialization.msgpack_serialize(flax_names(arrays)))
