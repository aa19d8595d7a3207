"""T5 checkpoints of Hugging Face Transformers: T5 1.0 (ReLU, tied and scaled logits), 1.1, mT5.

`open_folder` gives a folder's parameters block by block, `load` all at once; `save` writes one.
`state_dict` and `from_config` give what Transformers' own model takes.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from gqa.checkpoints import pieces
from gqa.checkpoints.pieces import Index, Source
from gqa.interop import safetensors_files
from gqa.interop.huggingface import names
from gqa.interop.huggingface.config import KV_HEADS, from_config, to_config
from gqa.interop.huggingface.names import COPIES, UNUSED
from gqa.interop.safetensors_files import Tensors
from gqa.model.config import Config
from gqa.runtime.errors import UserError

__all__ = [
    *("COPIES", "UNUSED", "from_config", "from_state_dict", "load", "open_folder", "read_config"),
    *("save", "state_dict", "to_config"),
]

VOCABULARY = "spiece.model"
SHARD = 5 * 10**9  # bytes of a file at most, as Transformers has it


def read_config(folder: str | os.PathLike) -> Config:
    """Our config of a folder's config.json.

    Raises:
        UserError: if it cannot be read or is of another network.
    """
    return _read_config(Path(folder) / "config.json")[0]


def _read_config(path: Path) -> tuple[Config, dict]:
    hf_config = safetensors_files.read_json(path)
    with safetensors_files.told_of(path):
        return to_config(hf_config), hf_config


def open_folder(folder: str | os.PathLike) -> Source:
    """The parameters of a folder's config.json and model.safetensors, whole or in shards.

    The vocabulary has the rows of the file. Dropout is left at our default: it belongs to training.

    Raises:
        UserError: if a file cannot be read, for another network than T5, and for a tensor that is
            missing, not expected, or of another shape than config.json says.
    """
    _, hf_config = _read_config(Path(folder) / "config.json")
    state = Tensors(folder)
    with safetensors_files.told_of(state.path):
        return _source(state, hf_config)


def load(folder: str | os.PathLike) -> tuple[dict, Config]:
    """Parameters in float32, and their config, of what `open_folder` opens."""
    source = open_folder(folder)
    return pieces.collect(source), source.config


def from_state_dict(state: Mapping[str, np.ndarray], hf_config: dict) -> tuple[dict, Config]:
    """The same of a state dict and its config.json, both in memory."""
    source = _source(_InMemory(state), hf_config)
    return pieces.collect(source), source.config


class _InMemory(dict):
    """A state dict read like `Tensors`."""

    def floats(self, name: str, shape: tuple[int, ...]) -> np.dtype:
        dtype = self[name].dtype
        known = {np.dtype(x): name for name, x in safetensors_files.FLOATS.items()}
        safetensors_files.check(name, self[name].shape, shape, known.get(dtype, dtype.name))
        return dtype

    def read(self, name: str, first: int, count: int) -> np.ndarray:
        return self[name][first : first + count]


def _source(state: Tensors | _InMemory, hf_config: dict) -> Source:
    config = to_config(hf_config)
    layers = config.num_encoder_layers + config.num_decoder_layers
    if layers > len(state):  # before tracing so many
        raise UserError(f"{len(state)} tensors are too few for the {layers} layers of config.json")
    shapes = pieces.shapes(config)
    found = {name: names.theirs(name, shape, config) for name, shape in shapes.items()}
    if names.LOGITS not in state and hf_config.get("tie_word_embeddings") is True:
        found |= {"logits": [names.EMBEDDING]} if "logits" in found else {}  # tied, not scaled
    _check_names(state, {theirs for group in found.values() for theirs in group})
    chunks = {}
    for name, shape in shapes.items():
        inner = shape[1:] if names.is_stacked(name) else shape
        itemsize = max(
            state.floats(tensor, names.their_shape(name, inner)).itemsize for tensor in found[name]
        )
        axis, places = _places(name, inner, itemsize)
        chunk = (*inner[:axis], places, *inner[axis + 1 :])
        chunks[name] = (1, *chunk) if names.is_stacked(name) else chunk
    read = functools.partial(_blocks, state, found, shapes, chunks)
    return Source(config, chunks, read)


def _places(name: str, inner: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """The axis that a layer is cut along, and how much of it is read at a time."""
    axis, _ = names.rows(name, inner)
    per_place = int(np.prod(inner)) // inner[axis] * max(itemsize, 4)
    return axis, min(inner[axis], max(1, safetensors_files.PIECE // per_place))


def _check_names(state: Tensors | _InMemory, expected: set[str]) -> None:
    present = set(state)
    if missing := sorted(expected - present):
        raise UserError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(present - expected - {*COPIES, UNUSED}):
        raise UserError(f"tensor {extra[0]} is not one of T5's ({len(extra)} in all)")
    for name in COPIES:
        if name in present - expected and not _equal(state, name, names.EMBEDDING):
            raise UserError(f"tensor {name} differs from {names.EMBEDDING}, which it should repeat")


def _equal(state: Tensors | _InMemory, name: str, other: str) -> bool:
    rows, *rest = shape = tuple(state[other].shape)
    if tuple(state[name].shape) != shape or state[name].dtype != state[other].dtype:
        return False
    state.floats(name, shape)
    step = max(1, safetensors_files.PIECE // (8 * int(np.prod(rest))))
    return all(
        np.array_equal(*(state.read(x, first, min(step, rows - first)) for x in (name, other)))
        for first in range(0, rows, step)
    )


def _blocks(
    state: Tensors | _InMemory, found: dict, shapes: dict, chunks: dict, name: str
) -> Iterator[tuple[Index, np.ndarray]]:
    stacked = names.is_stacked(name)
    inner = shapes[name][1:] if stacked else shapes[name]
    axis, unit = names.rows(name, inner)
    step = chunks[name][axis + stacked]
    for layer, tensor in enumerate(found[name]):
        for first in range(0, inner[axis], step):
            count = min(step, inner[axis] - first)
            rows = state.read(tensor, first * unit, count * unit).astype(np.float32, copy=False)
            rows = rows.T if names.is_transposed(name, inner) else rows
            index = (slice(None),) * axis + (slice(first, first + count),)
            block = rows.reshape(*inner[:axis], count, *inner[axis + 1 :])
            yield ((layer, *index) if stacked else index), block


def state_dict(params: dict, config: Config, expand: bool = False) -> dict[str, np.ndarray]:
    """The parameters in float32 under Transformers' names; `from_state_dict` is the way back.

    Args:
        expand: repeat each KV head for its query heads, which gives a multi-head network.
    """
    lazy = _tensors(params, config, expand)
    return {name: np.ascontiguousarray(make()) for name, (_, make) in lazy.items()}


def save(
    params: dict,
    config: Config,
    folder: str | os.PathLike,
    expand: bool = False,
    vocabulary: str | os.PathLike | None = None,
) -> None:
    """Write config.json and model.safetensors, in shards if larger than 5 GB, in float32.

    Transformers reads what is multi-head or expanded; a grouped network's config.json has
    num_key_value_heads, and `load` reads it.

    Args:
        expand: repeat each KV head for its query heads.
        vocabulary: a SentencePiece file to put beside it as spiece.model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lazy = _tensors(params, config, expand)
    shards = [[]]
    for name, (shape, _) in lazy.items():
        size = sum(4 * int(np.prod(lazy[other][0])) for other in shards[-1])
        if shards[-1] and size + 4 * int(np.prod(shape)) > SHARD:
            shards.append([])
        shards[-1].append(name)
    files = {}
    for number, shard in enumerate(shards, 1):
        file = safetensors_files.SINGLE
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shapes = {name: ("F32", lazy[name][0], 4 * int(np.prod(lazy[name][0]))) for name in shard}
        safetensors_files.write(folder / file, shapes, lambda name: [lazy[name][1]()])
        files |= dict.fromkeys(shard, file)
    (folder / safetensors_files.INDEX).unlink(missing_ok=True)
    if len(shards) > 1:
        safetensors_files.write_index(
            folder, files, sum(4 * int(np.prod(s)) for s, _ in lazy.values())
        )
    if vocabulary:
        shutil.copyfile(vocabulary, folder / VOCABULARY)
    if expand:
        config = dataclasses.replace(config, **dict.fromkeys(KV_HEADS, config.num_heads))
    safetensors_files.write_json(folder / "config.json", from_config(config))


def _tensors(params: dict, config: Config, expand: bool) -> dict[str, tuple]:
    """By Transformers' names, the shape of a tensor and what makes it."""
    made = {}
    for ours, leaf in flatten_dict(params, sep="/").items():
        inner = list(leaf.shape[1:] if names.is_stacked(ours) else leaf.shape)
        repeat = 1
        if expand and ours.endswith(("/key", "/value")):
            repeat = config.num_heads // inner[1]
            inner[1] = config.num_heads
        shape = names.their_shape(ours, tuple(inner))
        for i, name in enumerate(names.theirs(ours, leaf.shape, config)):
            part = functools.partial(_tensor, leaf, i, ours, repeat, shape)
            made[name] = shape, part
    return made


def _tensor(leaf, i: int, ours: str, repeat: int, shape: tuple[int, ...]) -> np.ndarray:
    """Layer i of a parameter as Transformers has it."""
    layer = np.asarray(leaf[i] if names.is_stacked(ours) else leaf, np.float32)
    if repeat > 1:
        layer = np.repeat(layer, repeat, axis=1)
    turned = names.is_transposed(ours, layer.shape)
    return layer.reshape(shape[::-1]).T if turned else layer
