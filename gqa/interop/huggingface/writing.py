"""Write parameters of our network as a Hugging Face T5 folder, or as a state dict in memory.

Each tensor is made when it is written, so that the folder never lies in memory as a whole. Reading
is in reading.py.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

from gqa.interop import safetensors_files
from gqa.interop.huggingface import names
from gqa.interop.huggingface.config import KV_HEADS, from_config
from gqa.model.config import Config

VOCABULARY = "spiece.model"
MAX_SHARD_BYTES = 5 * 10**9  # of one safetensors file, as Transformers has it


class _LazyTensor(NamedTuple):
    """The shape of a tensor, and the function that makes its array in float32."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return 4 * int(np.prod(self.shape))


def state_dict(params: dict, config: Config, expand: bool = False) -> dict[str, np.ndarray]:
    """Return the parameters in float32 under Transformers' names; `from_state_dict` reads them.

    Args:
        expand: repeat each KV head for its query heads, which gives a multi-head network.
    """
    tensors = _lazy_tensors(params, config, expand)
    return {name: np.ascontiguousarray(tensor.make()) for name, tensor in tensors.items()}


def save(
    params: dict,
    config: Config,
    folder: str | os.PathLike,
    expand: bool = False,
    vocabulary: str | os.PathLike | None = None,
) -> None:
    """Write config.json and model.safetensors in float32, in shards if larger than 5 GB.

    Transformers' T5 reads a folder that is multi-head or expanded. The config.json of a grouped
    network has num_key_value_heads, which Transformers' T5 does not know and `load` reads.

    Args:
        expand: repeat each KV head for its query heads.
        vocabulary: a SentencePiece file, copied into the folder as spiece.model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _lazy_tensors(params, config, expand)
    _write_weights(tensors, folder)
    if vocabulary:
        shutil.copyfile(vocabulary, folder / VOCABULARY)
    if expand:
        # Any, because a type checker does not match the keys of ** with the types of the fields.
        multi_head: dict[str, Any] = dict.fromkeys(KV_HEADS, config.num_heads)
        config = dataclasses.replace(config, **multi_head)
    safetensors_files.write_json(folder / "config.json", from_config(config))


def _write_weights(tensors: dict[str, _LazyTensor], folder: Path) -> None:
    """Write the shards, and the index that says which of them has which tensor."""
    shards = _shards(tensors)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = safetensors_files.SINGLE
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shapes = {name: ("F32", tensors[name].shape, tensors[name].nbytes) for name in shard}
        safetensors_files.write(folder / file, shapes, lambda name: [tensors[name].make()])
        files |= dict.fromkeys(shard, file)

    # An index of an earlier, larger network in the same folder would be read before the one file.
    (folder / safetensors_files.INDEX).unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        safetensors_files.write_index(folder, files, total)


def _shards(tensors: dict[str, _LazyTensor]) -> list[list[str]]:
    """Cut the names into lists of at most MAX_SHARD_BYTES, or of one larger tensor."""
    shards: list[list[str]] = [[]]
    for name, tensor in tensors.items():
        size = sum(tensors[other].nbytes for other in shards[-1])
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    return shards


def _lazy_tensors(params: dict, config: Config, expand: bool) -> dict[str, _LazyTensor]:
    """Return every tensor of Transformers' state dict by its name."""
    tensors = {}
    for ours, leaf in flatten_dict(params, sep="/").items():
        layer_shape = list(leaf.shape[1:] if names.is_stacked(ours) else leaf.shape)
        repeats = 1
        if expand and ours.endswith(("/key", "/value")):
            repeats = config.num_heads // layer_shape[1]
            layer_shape[1] = config.num_heads
        shape = names.their_shape(ours, tuple(layer_shape))
        for layer, name in enumerate(names.theirs(ours, leaf.shape, config)):
            make = functools.partial(_tensor, leaf, layer, ours, repeats, shape)
            tensors[name] = _LazyTensor(shape, make)
    return tensors


def _tensor(
    leaf: Array | np.ndarray, layer: int, name: str, repeats: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Return one layer of the parameter `name` as Transformers stores it, KV heads repeated."""
    array = np.asarray(leaf[layer] if names.is_stacked(name) else leaf, np.float32)
    if repeats > 1:
        array = np.repeat(array, repeats, axis=1)
    return array.reshape(shape[::-1]).T if names.is_transposed(name, array.shape) else array
