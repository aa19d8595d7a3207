"""Choose the files beside the weights that a converted folder takes over.

Files that are known to say nothing about heads are copied: tokenizers, chat templates, generation
settings, licences, model code. Every other file may hold the old weights or the old number of
heads in another format, so it is left out and named. So is a link out of the folder, because it may
lead to a private file: who publishes the new folder would publish that file.
"""

import fnmatch
import os
import shutil
from pathlib import Path

from gqa.interop import safetensors_files
from gqa.runtime import atomic_files, regular_files

# Names of files that are copied, in small letters.
COPIED = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("tokenizer.model*", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
    *("merges.txt", "vocab.txt", "chat_template*", "*.jinja", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "tokenization_*.py"),
    *("configuration_*.py", "modeling_*.py", "*.md", "license*", "notice*", "use_policy*"),
)
COPIED_FOLDERS = ("additional_chat_templates",)  # Transformers' name; templates lie in it directly
# The folder's weights and its config are written anew, so nobody misses these.
REWRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json")
MAX_BYTES = 2**30  # of a file that is copied; the largest tokenizers have 40 MB


def check(source: Path) -> None:
    """Refuse a folder with a file to copy that Git LFS has not downloaded yet.

    Raises:
        CheckpointError: naming the file.
    """
    for path in sorted(source.iterdir()):
        if _matches(path.name.lower(), COPIED) and _is_copyable(path, source):
            safetensors_files.check_is_downloaded(path)


def copy(source: Path, target: Path, record: str) -> list[str]:
    """Copy what is known to be harmless from folder `source` to folder `target`.

    Args:
        record: the name of the file in which a conversion keeps its record. The source has one of
            its own if it was converted before.

    Returns:
        The names of the files and folders that were left out, hidden ones excepted.
    """
    left_out = []
    for path in sorted(source.iterdir()):
        name = path.name.lower()
        # Hidden files, such as .gitattributes, belong to Git or to the download.
        if name.startswith(".") or path.name == record or _matches(name, REWRITTEN):
            continue
        if path.is_dir() and path.name in COPIED_FOLDERS:
            left_out += _copy_folder(path, target / path.name)
        elif _matches(name, COPIED) and _is_copyable(path, source):
            _copy_file(path, target / path.name)
        else:
            left_out.append(f"{path.name}/" if path.is_dir() else path.name)
    return left_out


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_copyable(path: Path, source: Path) -> bool:
    """Return whether a path leads to a regular file of a reasonable size, not out of `source`."""
    if not path.is_file() or os.stat(path).st_size > MAX_BYTES:
        return False

    # In the cache of the Hub every file is a link: snapshots/REVISION/NAME leads to blobs/HASH.
    folder, file = source.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs"
    in_cache = folder.parent.name == "snapshots" and file.is_relative_to(blobs)
    return in_cache or file.is_relative_to(folder)


def _copy_folder(source: Path, target: Path) -> list[str]:
    """Copy the templates of a folder, and return the names of all other files."""
    target.mkdir(exist_ok=True)
    left_out = []
    for path in sorted(source.iterdir()):
        if _matches(path.name.lower(), COPIED) and _is_copyable(path, source.parent):
            _copy_file(path, target / path.name)
        else:
            left_out.append(f"{source.name}/{path.name}")
    return left_out


def _copy_file(source: Path, target: Path) -> None:
    """Copy the content of a regular file, or of one that a link leads to."""
    with (
        regular_files.open_regular(source) as content,
        atomic_files.writing(target) as temporary,
        open(temporary, "wb") as file,
    ):
        shutil.copyfileobj(content, file)
