"""A checkpoint of another program in the place of pretraining: its sizes, vocabulary and arrays.

The config is fitted to the checkpoint here, before anything is planned; the files are read by
`gqa.interop`, and `pretrain.py` writes the arrays into a checkpoint of this program.
"""

import dataclasses
import hashlib
import importlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.stages.settings import InitialCheckpoint
from gqa import conversion
from gqa.checkpoints import pieces
from gqa.data import tokenizer
from gqa.interop import hub, huggingface, safetensors_files, t5x
from gqa.interop.safetensors_files import naming
from gqa.model.config import Config
from gqa.runtime import distributed, file_hashes, hardware
from gqa.runtime.errors import CheckpointError, UserError

READERS = {"huggingface": huggingface, "t5x": t5x}
# Sizes that only this project has. No checkpoint of another program has them, so a config of such
# a size takes the checkpoint's sizes instead of being refused.
OUR_SIZES = ("pico", "nano", "mini")
# Fields in which T5 1.0, T5 1.1 and mT5 of one named size differ.
FAMILY = ("vocab_size", "activation", "tied_logits", "position_bias_per_layer")
# Fields that are not in the config, which leaves them at T5's values or, for tokens, those of the
# vocabulary. A checkpoint may have others.
NOT_IN_CONFIG = (
    "num_buckets",
    "max_distance",
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
)
# Fields that no checkpoint has: they are no part of the network, but say how it is run.
HOW_IT_IS_RUN = ("dtype", "remat", "dropout_rate")


def adopted(config: ConfigDict) -> ConfigDict:
    """Return the config with the sizes and the vocabulary of the checkpoint that it names.

    A config that names none is returned as it is.

    Raises:
        UserError: when a key that was set contradicts the checkpoint, naming both.
    """
    named = _open_named(config)
    if named is None:
        return config
    network = named.source.config
    heads = [f"num_kv_heads_{name}" for name in conversion.ATTENTIONS]
    if any(getattr(network, key) != network.num_heads for key in heads):
        raise UserError(f"{named.folder} has grouped attention; init.* takes a multi-head network")

    # The caller's config stays as the user set it. A key that the user set must agree with the
    # checkpoint; all others take the checkpoint's value.
    config = config.copy_and_resolve_references()
    if named.kind == "huggingface" and hub.is_name(config.init.huggingface):
        print(f"{config.init.huggingface}: {named.folder}", flush=True)
    sizes = dataclasses.asdict(network)
    _check_sizes(config, named.folder, sizes)
    taken = [key for key in config.model if key not in HOW_IT_IS_RUN]
    taken += [key for key in NOT_IN_CONFIG if key not in taken]
    # Attentions that were to stay multi-head stay so with the checkpoint's number of heads.
    multi_head = [key for key in heads if config.convert[key] == config.model.num_heads]
    with config.unlocked():
        # A model of the Hub stays the one of this commit, wherever the config goes.
        config.init[named.kind] = str(named.folder)
        config.model.update({key: sizes[key] for key in taken})
        config.convert.update(dict.fromkeys(multi_head, network.num_heads))
        # Result records name the network by its size, and "nano" would be the name of another one.
        # A sweep makes its points from the names of sizes, so it keeps them.
        if config.size in OUR_SIZES and "sweep" not in config:
            config.size = hub.short_name(named.folder)
        config.text.vocabulary = config.text.vocabulary or _vocabulary(named)
    return config


def identity(config: ConfigDict) -> InitialCheckpoint | None:
    """Return the checkpoint that the config names, if any, with a hash of the files it uses."""
    named = _open_named(config)
    if named is None:
        return None
    return InitialCheckpoint(named.kind, str(named.folder), _contents(named.folder, named.source))


def open_source(initial: InitialCheckpoint) -> pieces.Source:
    """Return the network of a checkpoint and its parameters, which are read piece by piece.

    Raises:
        CheckpointError: if its files are no longer those that the stage was planned with.
    """
    source = READERS[initial.kind].open_folder(initial.folder)
    check_contents(initial, source)
    return source


def check_contents(initial: InitialCheckpoint, source: pieces.Source) -> None:
    """Compare the files of a checkpoint with those that the stage was planned with.

    Call it after reading too: a file may have been replaced meanwhile.

    Raises:
        CheckpointError: if a file has changed.
    """
    folder = Path(initial.folder)
    if _contents(folder, source) != initial.contents:
        raise CheckpointError(
            f"{folder}: its files have changed since this run began; run the same command again"
        )


def check_network(initial: InitialCheckpoint, theirs: Config, ours: Config) -> None:
    """Refuse a checkpoint of another network, e.g. of another size of a sweep.

    Args:
        theirs: the network of the checkpoint.
        ours: the network that the stage was planned with.
    """
    # No checkpoint has these fields, so they cannot contradict one.
    theirs = dataclasses.replace(theirs, **{key: getattr(ours, key) for key in HOW_IT_IS_RUN})
    for field in dataclasses.fields(theirs):
        their_value, our_value = getattr(theirs, field.name), getattr(ours, field.name)
        if their_value != our_value:
            raise _conflict(field.name, our_value, initial.folder, their_value)


class _Named(NamedTuple):
    """The checkpoint that a config names, opened."""

    kind: str
    folder: Path
    source: pieces.Source


def _open_named(config: ConfigDict) -> _Named | None:
    kinds = [kind for kind in READERS if config.init[kind]]
    if len(kinds) > 1:
        raise UserError(f"init.{kinds[0]} and init.{kinds[1]} are both set; use one")
    if not kinds:
        return None

    (kind,) = kinds
    with naming(f"init.{kind}"):
        folder = _folder(kind, config.init[kind])
        source = READERS[kind].open_folder(folder)

    # Four bytes a parameter, because training holds the parameters in float32.
    size = sum(map(math.prod, source.shapes.values()))
    hardware.check_memory(4 * size, f"init.{kind}: {folder}, of {size:,} parameters,")
    return _Named(kind, folder, source)


def _folder(kind: str, named: str) -> Path:
    """Return the folder that a config names, or the copy of a model of the Hub that it names."""
    if kind != "huggingface":
        safetensors_files.check_folder(Path(named))
        return Path(named).absolute()

    # Process 0 downloads, while the others wait, and says which commit it has. The others find
    # this commit in the cache that they share, or download it to the disk of their machine.
    return hub.local_folder(distributed.by_primary(lambda: hub.pinned(named))).absolute()


def _check_sizes(config: ConfigDict, folder: Path, sizes: dict[str, Any]) -> None:
    """Refuse sizes that the user set, by name or key by key, and the checkpoint does not have."""
    # A value that differs from the size's default was set key by key. With a size of T5, such as
    # "large", the user has set all keys of the size by its name, except those of the family.
    default = importlib.import_module("configs.base").get_config(config.size).model
    for key, value in config.model.items():
        named_size = config.size not in OUR_SIZES and key not in FAMILY
        was_set = named_size or value != default.get(key)
        if key not in HOW_IT_IS_RUN and was_set and value != sizes[key]:
            raise _conflict(key, value, folder, sizes[key])


def _conflict(key: str, ours: Any, folder: str | Path, theirs: Any) -> UserError:
    return UserError(
        f"model.{key}={ours!r} contradicts {folder}, which has {theirs!r}; "
        f"use --config.model.{key}={theirs} or another size"
    )


def _vocabulary(named: _Named) -> str:
    path = named.folder / huggingface.VOCABULARY
    if not tokenizer.is_in(named.folder):
        raise UserError(f"{path} is missing; set text.vocabulary to the checkpoint's vocabulary")
    if path.exists():
        safetensors_files.check_is_downloaded(path)
    return str(named.folder)


def _contents(folder: Path, source: pieces.Source) -> str:
    """Return a hash of every byte of the files that a checkpoint is read from, and of their names.

    Files beside them, such as a README or a whole workdir, are no part of the checkpoint.
    """
    digest = hashlib.sha256()
    for path in sorted(source.files):
        entry = [path.relative_to(folder).as_posix(), file_hashes.sha256(path)]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()
