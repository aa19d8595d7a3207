"""A checkpoint of another program in the place of pretraining: its sizes, vocabulary and arrays."""

import dataclasses
import hashlib
import importlib
import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from gqa import conversion
from gqa.checkpoints import pieces
from gqa.interop import huggingface, t5x
from gqa.interop.safetensors_files import naming
from gqa.model.config import Config
from gqa.runtime.errors import UserError

READERS = {"huggingface": huggingface, "t5x": t5x}
# Sizes that say nothing of other programs' checkpoints: theirs give way.
OURS = ("pico", "nano", "mini")
# What T5 1.0, 1.1 and mT5 of one size do not share.
FAMILY = ("vocab_size", "activation", "tied_logits")
# What a checkpoint does not say: how its network is run.
RUN = ("dtype", "remat", "dropout_rate")
SAMPLES, SAMPLE = 64, 2**16  # of a file, for telling one checkpoint from another


def adopted(config: ConfigDict) -> ConfigDict:
    """The config with the sizes and the vocabulary of the checkpoint it names, or as it is.

    Raises:
        UserError: when what was set contradicts the checkpoint, naming both.
    """
    given = _named(config)
    if given is None:
        return config
    found = given.source.config
    if any(
        getattr(found, f"num_kv_heads_{name}") != found.num_heads for name in conversion.ATTENTIONS
    ):
        raise UserError(f"{given.folder} has grouped attention; init.* takes a multi-head network")
    config = config.copy_and_resolve_references()
    sizes = dataclasses.asdict(found)
    known = [key for key in config.model if key not in RUN]
    known += [key for key in ("num_buckets", "max_distance") if key not in known]
    _check(config, given.folder, sizes)
    attentions = [f"num_kv_heads_{name}" for name in conversion.ATTENTIONS]
    full = [key for key in attentions if config.convert[key] == config.model.num_heads]
    with config.unlocked():
        config.model.update({key: sizes[key] for key in known})
        config.convert.update(dict.fromkeys(full, found.num_heads))
        if config.size in OURS and "sweep" not in config:
            config.size = given.folder.name
        config.text.vocabulary = config.text.vocabulary or _vocabulary(given)
    return config


def identity(config: ConfigDict) -> dict[str, str] | None:
    """What a stage has to know to read the checkpoint, and to tell it from others; or None."""
    kinds = [kind for kind in READERS if config.init[kind]]
    if not kinds:
        return None
    folder = Path(config.init[kinds[0]]).absolute()
    return {"kind": kinds[0], "folder": str(folder), "contents": _fingerprint(folder)}


def open_source(settings: dict[str, str]) -> pieces.Source:
    """The parameters of what `identity` described."""
    return READERS[settings["kind"]].open_folder(settings["folder"])


def check_network(settings: dict[str, str], found: Config, wanted: Config) -> None:
    """Refuse a checkpoint of another network, e.g. of another size of a sweep."""
    run = {key: getattr(wanted, key) for key in RUN}
    found = dataclasses.replace(found, **run)
    for field in dataclasses.fields(found):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if theirs != ours:
            raise _conflict(field.name, ours, settings["folder"], theirs)


@dataclasses.dataclass(frozen=True)
class _Given:
    kind: str
    folder: Path
    source: pieces.Source


def _named(config: ConfigDict) -> _Given | None:
    kinds = [kind for kind in READERS if config.init[kind]]
    if len(kinds) > 1:
        raise UserError(f"init.{kinds[0]} and init.{kinds[1]} are both set; use one")
    if not kinds:
        return None
    folder = Path(config.init[kinds[0]]).absolute()
    with naming(f"init.{kinds[0]}"):
        return _Given(kinds[0], folder, READERS[kinds[0]].open_folder(folder))


def _check(config: ConfigDict, folder: Path, sizes: dict) -> None:
    """Refuse sizes that were set, by name or key by key, and are not the checkpoint's."""
    default = importlib.import_module("configs.base").get_config(config.size).model
    for key, value in config.model.items():
        chosen = value != default.get(key) or (config.size not in OURS and key not in FAMILY)
        if key not in RUN and chosen and value != sizes[key]:
            raise _conflict(key, value, folder, sizes[key])


def _conflict(key: str, ours, folder: str | Path, theirs) -> UserError:
    return UserError(
        f"model.{key}={ours!r} contradicts {folder}, which has {theirs!r}; "
        f"use --config.model.{key}={theirs} or another size"
    )


def _vocabulary(given: _Given) -> str:
    path = given.folder / huggingface.VOCABULARY
    if not path.is_file():
        raise UserError(f"{path} is missing; set text.vocabulary to the checkpoint's vocabulary")
    return str(path)


def _fingerprint(folder: Path) -> str:
    """A hash of names, sizes and samples of all files: tens of gigabytes are not read whole."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(json.dumps([str(path.relative_to(folder)), size]).encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                file.seek(start, os.SEEK_SET)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
