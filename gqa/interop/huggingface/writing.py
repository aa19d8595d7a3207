"""Write parameters of our network as a Hugging Face T5 folder, or as a state dict in memory.

Each tensor is made when it is written, so that the folder never lies in memory as a whole. Reading
is in reading.py.
"""

import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

from gqa.interop import safetensors_files
from gqa.interop.huggingface import names, tokenizer_files
from gqa.interop.huggingface.config import GROUPED, KV_HEADS, MODELING_FILE, from_config
from gqa.model.config import Config
from gqa.runtime import checks
from gqa.runtime.errors import CheckpointError, is_disk_full

VOCABULARY = "spiece.model"
MAX_SHARD_BYTES = 5 * 10**9  # of one safetensors file, as Transformers has it
# Files of a model that belong to its weights: those that `save` writes, and settings of the text
# generation of the model that was there before.
OWN_WEIGHTS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|generation_config\.json"
    rf"|{re.escape(MODELING_FILE)}"
)
# Weights that other programs write, which `save` does not delete.
OTHER_WEIGHTS = re.compile(
    r"adapter_(config\.json|model\.(bin|safetensors))|pytorch_model.*\.bin(\.index\.json)?"
    r"|tf_model.*\.h5|flax_model.*\.msgpack"
)
# Files of other tokenizers that change what Transformers makes of ours.
OTHER_VOCABULARY = re.compile(r"added_tokens\.json|special_tokens_map\.json|vocab\.(json|txt)")
UNFINISHED = ".unfinished-"


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

    Transformers' T5 reads a folder that is multi-head or expanded. A grouped network has a class of
    ours beside its weights, modeling_t5_gqa.py, which Transformers loads with
    `trust_remote_code=True`. `load` reads both.

    If the folder holds a model, that model is replaced once the new one is complete. Its
    safetensors, its index, its class and generation_config.json are removed, so that no program
    reads them together with the new weights.

    Args:
        expand: repeat each KV head for its query heads.
        vocabulary: a SentencePiece file, copied into the folder as spiece.model. Transformers reads
            tokenizer.json beside it, which gives the same ids.
            In its place, a folder of Hugging Face, whose tokenizer's files are copied.

    Raises:
        UserError: if Transformers cannot have the same vocabulary.
        CheckpointError: if the folder has weights in another format or an adapter, or cannot be
            written; nothing is changed.
    """
    folder = Path(folder)
    checks.check_local_path("folder", folder)
    if expand:
        # Any, because a type checker does not match the keys of ** with the types of the fields.
        multi_head: dict[str, Any] = dict.fromkeys(KV_HEADS, config.num_heads)
        new_config = dataclasses.replace(config, **multi_head)
    else:
        new_config = config
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_replaceable(folder, bool(vocabulary))

        # Inside the folder, so that the files can be renamed into place: a rename does not cross to
        # another disk.
        with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as name:
            unfinished = Path(name)
            if vocabulary:
                _write_vocabulary(Path(vocabulary), unfinished)
            _write_weights(_lazy_tensors(params, config, expand), unfinished)
            hf_config = from_config(new_config)
            if hf_config["model_type"] == GROUPED:
                shutil.copyfile(Path(__file__).with_name(MODELING_FILE), unfinished / MODELING_FILE)
            safetensors_files.write_json(unfinished / "config.json", hf_config)
            _replace_model(folder, unfinished)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise CheckpointError(
            f"{error.filename or folder}: {error.strerror}; name a folder that can be written"
        ) from error


def _write_vocabulary(vocabulary: Path, folder: Path) -> None:
    """Write the files of a tokenizer: copies of a folder's, or those of a SentencePiece file."""
    if not vocabulary.is_dir():
        tokenizer_files.write(vocabulary, folder)
        shutil.copyfile(vocabulary, folder / VOCABULARY)
        return

    own = (VOCABULARY, tokenizer_files.TOKENIZER, tokenizer_files.TOKENIZER_CONFIG)
    for path in vocabulary.iterdir():
        if path.name in own or OTHER_VOCABULARY.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)


def _check_replaceable(folder: Path, has_vocabulary: bool) -> None:
    """Refuse a folder with weights that this program does not write and would have to remove.

    Where the new model has a vocabulary, the files of another tokenizer are refused as well.
    """
    for path in sorted(folder.iterdir()):
        old = "weights" if OTHER_WEIGHTS.fullmatch(path.name) else ""
        if has_vocabulary and OTHER_VOCABULARY.fullmatch(path.name):
            old = VOCABULARY
        if old:
            raise CheckpointError(
                f"{path}: is in the folder already and would be loaded in the place of the new "
                f"{old} or beside them; remove it or name another folder"
            )


def _replace_model(folder: Path, unfinished: Path) -> None:
    """Put the files of a new model into a folder, in the place of the model that is there.

    config.json goes first and comes last: a folder without it is no model, so that a kill leaves
    no mixture of the two that could be read.
    """
    (folder / "config.json").unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        if OWN_WEIGHTS.fullmatch(path.name) and not path.is_dir():
            path.unlink()
        elif path.name.startswith(UNFINISHED) and path != unfinished and path.is_dir():
            shutil.rmtree(path)  # a kill left it

    names = sorted(path.name for path in unfinished.iterdir() if path.name != "config.json")
    for name in (*names, "config.json"):
        (unfinished / name).rename(folder / name)


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

    # A single file needs no index.
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

        # The axes of a key or a value are [D, K, H]; K becomes N.
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

    # Query heads 0 .. G - 1 read KV head 0, so each head is repeated next to itself: 0, 0, 1, 1.
    if repeats > 1:
        array = np.repeat(array, repeats, axis=1)

    # Flatten the heads of our [inputs, outputs], then put the outputs first.
    return array.reshape(shape[::-1]).T if names.is_transposed(name, array.shape) else array
