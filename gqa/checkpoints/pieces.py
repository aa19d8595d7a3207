"""Parameters that are read and written block by block, because all at once would not fit memory.

A checkpoint of another program is a `Source`: the network, and for each parameter its blocks and
where they belong. `collect` makes arrays of them; `write` puts one parameter into a checkpoint's
folder. Readers that make sources are in gqa/interop; checkpoint.py calls `write`.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from gqa.model.config import Config
from gqa.model.transformer import Transformer
from gqa.runtime import hardware
from gqa.runtime.errors import CheckpointError

# Where a block belongs in its array.
Index = tuple[int | slice, ...]


class Source(NamedTuple):
    """The parameters of a network in files of another program.

    Attributes:
        config: the network.
        shapes: of its parameters, by name ("decoder/norm/scale").
        chunks: the largest shape of a block, by the parameter's name.
        blocks: yields the blocks of the parameter with a name, in float32, each with its index.
            Blocks lie on the grid of the parameter's chunk shape. Raises a CheckpointError for
            numbers that are not finite.
        files: all files that the parameters and the config come from.
    """

    config: Config
    shapes: dict[str, tuple[int, ...]]
    chunks: dict[str, tuple[int, ...]]
    blocks: Callable[[str], Iterator[tuple[Index, np.ndarray]]]
    files: tuple[Path, ...] = ()


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's parameters by name."""
    # The shapes of parameters do not depend on the batch, so the smallest one does.
    batch = {name: jnp.zeros((1, 1), jnp.int32) for name in ("inputs", "targets")}
    tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), batch)["params"]
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}


def check_finite(array: np.ndarray, name: str) -> None:
    """Refuse NaN and infinite numbers in a floating array.

    Args:
        name: of the file and the tensor, for the message.

    Raises:
        CheckpointError: beginning with `name`.
    """
    if not np.isfinite(array).all():
        raise CheckpointError(f"{name} has NaN or infinite numbers; use another checkpoint")


def collect(source: Source) -> dict:
    """Return all parameters of a source as a tree of arrays."""
    params = {}
    nbytes = 4 * sum(math.prod(shape) for shape in source.shapes.values())
    hardware.check_memory(nbytes, "a network of these parameters")

    for name, shape in source.shapes.items():
        array = np.empty(shape, np.float32)
        for index, block in source.blocks(name):
            array[index] = block
        params[name] = jnp.asarray(array)
    return unflatten_dict(params, sep="/")


def placeholders(source: Source) -> dict:
    """Return a tree of parameters of one number each, which `write` replaces on disk."""
    return unflatten_dict(dict.fromkeys(source.chunks, np.zeros(1, np.float32)), sep="/")


def write(source: Source, name: str, folder: Path) -> None:
    """Write one parameter into the folder of Orbax's `params`, each block as one chunk."""
    # Orbax keeps "decoder/norm/scale" as "decoder.norm.scale" in its database. The path is given as
    # it is: in a URL, "%20" or "#" would mean something else.
    files = {"driver": "file", "path": f"{folder}/"}
    store = {"driver": "ocdbt", "base": files, "path": name.replace("/", ".") + "/"}
    chunks = {"name": "regular", "configuration": {"chunk_shape": source.chunks[name]}}

    spec = {
        "driver": "zarr3",
        "kvstore": store,
        "metadata": {
            "shape": source.shapes[name],
            "data_type": "float32",
            "chunk_grid": chunks,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        # Otherwise a chunk of zeros would not be stored, and Orbax would take it for lost.
        "store_data_equal_to_fill_value": True,
    }

    array = tensorstore.open(spec, create=True, delete_existing=True).result()
    for index, block in source.blocks(name):
        array[index].write(block).result()
