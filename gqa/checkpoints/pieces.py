"""Parameters that are read and written block by block, because all at once would not fit memory.

A checkpoint of another program is a `Source`: the network, and for each parameter where its blocks
belong. `collect` makes arrays of it, `write` puts one parameter into a checkpoint's folder.
"""

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

Index = tuple[int | slice, ...]


class Source(NamedTuple):
    """A network's parameters elsewhere.

    `chunks` gives, by a parameter's name ("decoder/norm/scale"), the largest shape of a block;
    `blocks` its blocks in float32, each with its place, along that grid.
    """

    config: Config
    chunks: dict[str, tuple[int, ...]]
    blocks: Callable[[str], Iterator[tuple[Index, np.ndarray]]]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's parameters by name."""
    batch = {name: jnp.zeros((1, 1), jnp.int32) for name in ("inputs", "targets")}
    tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), batch)["params"]
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}


def collect(source: Source) -> dict:
    """All of a source's parameters as arrays."""
    params = {}
    for name, shape in shapes(source.config).items():
        array = np.empty(shape, np.float32)
        for index, block in source.blocks(name):
            array[index] = block
        params[name] = jnp.asarray(array)
    return unflatten_dict(params, sep="/")


def placeholders(source: Source) -> dict:
    """A tree of parameters with one number each, in whose place `write` puts them."""
    return unflatten_dict(dict.fromkeys(source.chunks, np.zeros(1, np.float32)), sep="/")


def write(source: Source, name: str, folder: Path) -> None:
    """Write one parameter into the folder of Orbax's `params`, each block a chunk of its own."""
    store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": name.replace("/", ".") + "/"}
    chunks = {"name": "regular", "configuration": {"chunk_shape": source.chunks[name]}}
    spec = {
        "driver": "zarr3",
        "kvstore": store,
        "metadata": {
            "shape": shapes(source.config)[name],
            "data_type": "float32",
            "chunk_grid": chunks,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,  # else reading takes zeros for lost
    }
    array = tensorstore.open(spec, create=True, delete_existing=True).result()
    for index, block in source.blocks(name):
        array[index].write(block).result()
