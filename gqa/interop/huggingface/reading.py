"""Read a Hugging Face T5 folder, or a state dict in memory, as parameters of our network.

Tensors are checked by name, shape and dtype before any is read. They are then read in blocks, so
that a checkpoint larger than memory can be put on devices block by block. Writing is in writing.py.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gqa.checkpoints import pieces
from gqa.checkpoints.pieces import Index, Source
from gqa.interop import hub, safetensors_files, weights
from gqa.interop.huggingface import names
from gqa.interop.huggingface.config import to_config
from gqa.interop.huggingface.names import COPIES, UNUSED
from gqa.interop.safetensors_files import Tensors
from gqa.model.config import Config
from gqa.runtime import regular_files
from gqa.runtime.errors import CheckpointError

GENERATION = "generation_config.json"


def open_folder(folder: str | os.PathLike) -> Source:
    """Open config.json and the weights, whole or in shards; blocks are read when asked for.

    The vocabulary has as many rows as the file. Dropout keeps our default, because it belongs to
    training and not to the network. The ids of special tokens in generation_config.json, if there
    is one, win over those in config.json.

    Raises:
        UserError: if a file cannot be read, for another network than T5, and for a tensor that is
            missing, not expected, or of another shape than config.json says.
    """
    path = Path(folder) / "config.json"
    safetensors_files.check_folder(path.parent)
    hf_config = _read_json(path)
    with safetensors_files.naming(path):
        to_config(hf_config)  # before the weights, so that another model is refused by its type
    safetensors_files.check_default_weights(hf_config, path)

    other = path.with_name(GENERATION)
    generation = _read_json(other) if other.exists() else {}
    with safetensors_files.naming(other):
        to_config(hf_config, generation)

    tensors = weights.open_folder(folder)
    with safetensors_files.naming(tensors.path):
        source = _source(tensors, hf_config, generation)
    own = (path, other) if generation else (path,)
    return source._replace(files=(*own, *(tensors.folder / file for file in tensors.files)))


def _read_json(path: Path) -> dict:
    safetensors_files.check_is_downloaded(path)
    return regular_files.read_json(path)


def load(folder: str | os.PathLike) -> tuple[dict, Config]:
    """Read a folder into memory: parameters in float32, and their config.

    Args:
        folder: its path, or the name of a model on the Hub such as google/t5-v1_1-large.

    Raises:
        UserError: as `open_folder` and `hub.local_folder` do.
    """
    source = open_folder(hub.local_folder(folder))
    return pieces.collect(source), source.config


def from_state_dict(state: Mapping[str, np.ndarray], hf_config: dict) -> tuple[dict, Config]:
    """Return parameters in float32 and their config from a state dict and the config.json of it."""
    source = _source(_InMemory(state), hf_config)
    return pieces.collect(source), source.config


class _InMemory(dict):
    """A state dict with the methods of `Tensors` that this file uses."""

    def floats(self, name: str, shape: tuple[int, ...]) -> np.dtype:
        dtype = self[name].dtype
        # Messages name dtypes as safetensors does, such as "BF16".
        known = {np.dtype(x): name for name, x in safetensors_files.FLOATS.items()}
        safetensors_files.check(name, self[name].shape, shape, known.get(dtype, dtype.name))
        return dtype

    def read(self, name: str, first: int, count: int) -> np.ndarray:
        rows = self[name][first : first + count]
        pieces.check_finite(rows, f"tensor {name}")
        return rows


def _source(
    tensors: Tensors | _InMemory, hf_config: dict, generation: dict | None = None
) -> Source:
    """Check every tensor that the config asks for, and return the parameters as blocks to read."""
    config = to_config(hf_config, generation)
    config = to_config(hf_config | _kv_heads(hf_config, config, tensors), generation)

    # Tracing the shapes of a network takes time per layer, so an absurd number is refused first.
    num_layers = config.num_encoder_layers + config.num_decoder_layers
    if num_layers > len(tensors):
        raise CheckpointError(
            f"{len(tensors)} tensors are too few for the {num_layers} layers of config.json"
        )

    shapes = pieces.shapes(config)
    tensors_of = {name: names.theirs(name, shape, config) for name, shape in shapes.items()}
    embedding = _embedding(tensors, config)
    tensors_of["embedding"] = [embedding]
    if names.LOGITS not in tensors and hf_config.get("tie_word_embeddings") is True:
        # Tied but not scaled (mT5): our network has the embedding as a logit kernel of its own.
        tensors_of |= {"logits": [embedding]} if "logits" in tensors_of else {}

    expected = {theirs for group in tensors_of.values() for theirs in group}
    _check_names(tensors, expected, embedding)

    # A block is a slice of one layer, along the axis of the tensor's rows: such a slice is read
    # without the rest of the tensor.
    chunks = {}
    for name, shape in shapes.items():
        layer_shape = shape[1:] if names.is_stacked(name) else shape
        # The layers of one parameter may have been stored in different dtypes; the widest decides.
        itemsize = max(
            tensors.floats(tensor, names.their_shape(name, layer_shape)).itemsize
            for tensor in tensors_of[name]
        )
        axis, length = _chunk_along_axis(name, layer_shape, itemsize)
        chunk = (*layer_shape[:axis], length, *layer_shape[axis + 1 :])
        chunks[name] = (1, *chunk) if names.is_stacked(name) else chunk

    read = functools.partial(_blocks, tensors, tensors_of, shapes, chunks)
    return Source(config, shapes, chunks, read)


def _kv_heads(hf_config: dict, config: Config, tensors: Tensors | _InMemory) -> dict:
    """Return the numbers of KV heads that config.json leaves open.

    We write a number for each of the three attentions. GQA T5s of others have one number,
    `num_key_value_heads`, and the sizes of their tensors say which attentions it is meant for.
    """
    if hf_config.get("num_key_value_heads") is None:
        return {}

    found = {}
    multi_head = names.their_shape("key", (config.d_model, config.num_heads, config.head_dim))
    for key, tensor in names.KV_HEADS_IN.items():
        if hf_config.get(key) is None and tensor in tensors:
            is_multi_head = tuple(tensors[tensor].shape) == multi_head
            found[key] = config.num_heads if is_multi_head else hf_config["num_key_value_heads"]
    return found


def _embedding(tensors: Tensors | _InMemory, config: Config) -> str:
    """Return the name under which the file has the embedding, `names.EMBEDDING` if it has none.

    Transformers stores one of several tied tensors, and finds it under each of their names.
    """
    copies = [name for name in names.COPIES if name != names.LOGITS or config.tied_logits]
    present = (name for name in (names.EMBEDDING, *copies) if name in tensors)
    return next(present, names.EMBEDDING)


def _chunk_along_axis(name: str, layer_shape: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Return the axis along which a layer is cut into blocks, and the length of one block."""
    axis, _ = names.rows(name, layer_shape)

    # A number takes its own bytes while it is read, and 4 once it is float32.
    bytes_each = int(np.prod(layer_shape)) // layer_shape[axis] * max(itemsize, 4)
    return axis, min(layer_shape[axis], max(1, safetensors_files.PIECE // bytes_each))


def _check_names(tensors: Tensors | _InMemory, expected: set[str], embedding: str) -> None:
    """Refuse a missing tensor, an unknown tensor, and a copy that differs from the embedding."""
    present = set(tensors)
    if missing := sorted(expected - present):
        raise CheckpointError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(present - expected - {*COPIES, UNUSED}):
        raise CheckpointError(f"tensor {extra[0]} is not one of T5's ({len(extra)} in all)")

    for name in COPIES:
        if name in present - expected and not _equal(tensors, name, embedding):
            raise CheckpointError(f"tensor {name} differs from {embedding}, which it should repeat")


def _equal(tensors: Tensors | _InMemory, name: str, other: str) -> bool:
    """Compare two tensors, some rows at a time because an embedding may be large."""
    rows, *rest = shape = tuple(tensors[other].shape)
    if tuple(tensors[name].shape) != shape or tensors[name].dtype != tensors[other].dtype:
        return False
    tensors.floats(name, shape)
    # At most 8 bytes a number (F64).
    step = max(1, safetensors_files.PIECE // (8 * int(np.prod(rest))))

    def rows_from(tensor: str, first: int) -> np.ndarray:
        return tensors.read(tensor, first, min(step, rows - first))

    return all(
        np.array_equal(rows_from(name, first), rows_from(other, first))
        for first in range(0, rows, step)
    )


def _blocks(
    tensors: Tensors | _InMemory,
    tensors_of: dict[str, list[str]],
    shapes: dict[str, tuple[int, ...]],
    chunks: dict[str, tuple[int, ...]],
    name: str,
) -> Iterator[tuple[Index, np.ndarray]]:
    """Yield the parameter `name` in blocks of its chunk's shape, each with its index."""
    stacked = names.is_stacked(name)
    layer_shape = shapes[name][1:] if stacked else shapes[name]
    axis, rows_each = names.rows(name, layer_shape)
    # A stacked parameter has the axis of layers before those of the layer.
    step = chunks[name][axis + stacked]

    for layer, tensor in enumerate(tensors_of[name]):
        for first in range(0, layer_shape[axis], step):
            count = min(step, layer_shape[axis] - first)
            rows = tensors.read(tensor, first * rows_each, count * rows_each)

            # A finite number of 64 bits may be infinite in float32. The check names the tensor, and
            # NumPy need not warn as well.
            with np.errstate(over="ignore"):
                rows = rows.astype(np.float32, copy=False)
            pieces.check_finite(rows, f"tensor {tensor}, in float32,")

            # The tensor has outputs before inputs and flattened heads. Our array has inputs first,
            # and an axis of heads.
            rows = rows.T if names.is_transposed(name, layer_shape) else rows
            block = rows.reshape(*layer_shape[:axis], count, *layer_shape[axis + 1 :])

            index = (slice(None),) * axis + (slice(first, first + count),)
            yield ((layer, *index) if stacked else index), block
