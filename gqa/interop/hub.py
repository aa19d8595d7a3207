"""Folders of Hugging Face by path, or by the name of a model on the Hub.

A name such as google/t5-v1_1-large, with a revision google/t5-v1_1-large@REVISION, is downloaded
by the package `huggingface_hub` into its cache, with its token, its offline mode (HF_HUB_OFFLINE)
and its address (HF_ENDPOINT). The cache's own locks let one process download while others wait.
What the files mean is for the readers of this package.
"""

import functools
import glob
import os
import re
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from gqa.interop.safetensors_files import ADAPTERS, MAX_INDEX_BYTES, OTHER_FORMATS, Format
from gqa.interop.weights import FORMATS
from gqa.runtime import checks, regular_files
from gqa.runtime.errors import CheckpointError, UserError, reporting_full_disk

# ORGANISATION/MODEL, and a branch, a tag or a commit.
NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = "config.json"
# What changes how a model is read, beside its weights: an adapter is downloaded to be refused.
SETTINGS = (CONFIG, "generation_config.json", ADAPTERS[0])
# Names of tokenizers' files, in small letters.
TOKENIZERS = (
    *("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
)
EXAMPLE = "google/t5-v1_1-large"


def is_name(text: str) -> bool:
    """Return whether a text is the name of a model on the Hub, and no path that exists."""
    return bool(NAME.fullmatch(text)) and not os.path.lexists(text)


def local_folder(
    named: str | os.PathLike, formats: Sequence[Format] = FORMATS, also: Sequence[str] = TOKENIZERS
) -> Path:
    """Return the folder of a model: the path itself, or a copy in the cache of the Hub.

    A folder models--ORGANISATION--MODEL of the cache stands for its snapshot.

    Args:
        formats: of weights; the first one that the model has is downloaded, and no other. Without
            formats only the model's settings are.
        also: patterns for the names of other files to download, in small letters.

    Raises:
        ConfigError: if the path is an address.
        CheckpointError: if there is no such folder or model, or if the model cannot be downloaded;
            with what to do.
    """
    checks.check_local_path("folder", os.fspath(named))
    path = Path(named)
    if os.path.lexists(path):
        return _snapshot(path)
    match = NAME.fullmatch(os.fspath(named))
    if not match:
        raise CheckpointError(
            f"{named}: No such folder; name a folder, or a model of the Hugging Face Hub such as "
            f"{EXAMPLE}"
        )
    return _download(match[1], match[2] or "main", tuple(formats), tuple(also))


def pinned(named: str) -> str:
    """Return the name of a model on the Hub with the commit that it has now; a path as it is.

    Raises:
        UserError: as `local_folder` does, which downloads the model here.
    """
    if not is_name(named):
        return named
    return f"{named.partition('@')[0]}@{local_folder(named).name}"


def short_name(folder: Path) -> str:
    """Return the model's name without the organisation, or else the folder's name."""
    cached = re.fullmatch(r"models--.*?--(.+)", folder.parent.parent.name)
    return cached[1] if cached and folder.parent.name == "snapshots" else folder.name


def _snapshot(path: Path) -> Path:
    """Return the snapshot of a model's folder in the cache: that of main, or the only one."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir() or (path / CONFIG).exists():
        return path
    found = {folder.name: folder for folder in sorted(snapshots.iterdir()) if folder.is_dir()}
    main = path / "refs" / "main"
    if main.is_file():
        commit = regular_files.read_bytes(main, 100).decode("ascii", "replace").strip()
        if commit in found:
            return found[commit]
    if len(found) != 1:
        raise CheckpointError(
            f"{path}: has {len(found)} snapshots; name one of the folders in {snapshots}"
        )
    return next(iter(found.values()))


@functools.cache  # so that all steps of a command use the same commit
def _download(name: str, revision: str, formats: tuple[Format, ...], also: tuple[str, ...]) -> Path:
    """Download a model into the cache and return the folder of its snapshot."""
    # The import takes time that only those who name a model should wait for.
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    def fetch(files: Sequence[str]) -> Path:
        patterns = [glob.escape(file) for file in files]
        return Path(
            huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=patterns)
        )

    try:
        with reporting_full_disk(f"downloading {name}", "whole files stay in the cache"):
            commit = huggingface_hub.resolve_revision(name, revision=revision)
            folder = fetch(SETTINGS)
            entries = huggingface_hub.get_cached_repo_tree(name, revision=commit)
            files = {entry.path for entry in entries if "/" not in entry.path}
            if CONFIG not in files:
                raise CheckpointError(f"{name}: has no {CONFIG}; name a model of Transformers")
            for wanted in (_others(files, also), *_weights(name, files, formats, folder, fetch)):
                if wanted:
                    fetch(wanted)
            return folder
    except CachedRepoTreeNotFoundError:
        # Without network, a copy that another program has downloaded is used as it is.
        return folder
    except UserError:
        raise
    except Exception as error:  # the package and its parts in Rust raise errors of many kinds
        raise CheckpointError(f"{name}: {_reason(error, name, revision)}") from error


def _others(files: Collection[str], patterns: Sequence[str]) -> list[str]:
    """Return the files whose name in small letters matches one of the patterns."""
    return [file for file in files if any(fnmatchcase(file.lower(), p) for p in patterns)]


def _weights(
    name: str,
    files: Collection[str],
    formats: Sequence[Format],
    folder: Path,
    fetch: Callable[[Sequence[str]], Path],
) -> list[list[str]]:
    """Return the files of weights in the first of the formats that a model has."""
    for known in formats:
        if known.single_file in files:
            return [[known.single_file]]
        if known.index_file in files:
            # The index says which files belong to the model. A file that is not in the model, or
            # out of the folder, is refused when the weights are read.
            fetch([known.index_file])
            places = regular_files.read_json(folder / known.index_file, MAX_INDEX_BYTES)
            named = places.get("weight_map")
            values = named.values() if isinstance(named, dict) else ()
            return [[file for file in files if file in values]]
    if not formats:
        return []
    names = ", ".join(known.single_file for known in formats)
    others = [file for file in sorted(files) if Path(file).suffix.lower() in OTHER_FORMATS]
    raise CheckpointError(
        f"{name}: has no weights that are read ({names})"
        + (f" but {', '.join(others)}" if others else "")
        + "; name another model"
    )


def _reason(error: Exception, name: str, revision: str) -> str:
    """Return why a model cannot be downloaded, and what to do."""
    from huggingface_hub import constants, errors

    hub = f"the Hugging Face Hub ({constants.ENDPOINT})"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"access to the model is restricted; ask for it at {constants.ENDPOINT}/{name} and run "
            "`hf auth login`"
        )
    if isinstance(error, errors.HFValidationError):
        return (
            f"No such folder, and no name of a model either ({error}); name a folder, or a model "
            f"such as {EXAMPLE}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; name a branch, a tag or a commit"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if status in (401, 403, 404):
        return (
            f"No such folder, and {hub} has no model of that name, or a private one; name a folder "
            "or another model, or run `hf auth login`"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"No such folder, and the cache ({constants.HF_HUB_CACHE}) has no complete copy while "
            "HF_HUB_OFFLINE is set; unset it, or name a folder"
        )
    cause = error.__cause__ or error
    return (
        f"No such folder, the cache has no complete copy, and {hub} cannot be reached or fails "
        f"({type(cause).__name__}: {cause!s:.200}); try again, or run `hf download {name}` where "
        "there is network and name its folder"
    )
