"""The default text: docstrings and comments of the Python packages that are installed.

This file chooses packages, reads their files, and keeps the rows of each task and split on disk.
What is taken from a file is in `gqa.data.python_texts`, `gqa.data.duplicates` and
`gqa.data.docstring_rows`. Nothing is imported and nothing is downloaded.

Whole packages are held out for validation and test. A random split of rows would leak, because one
package describes the same parameter in many places.
"""

import dataclasses
import gc
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from gqa.data import text_lines
from gqa.data.docstring_rows import module_rows
from gqa.data.duplicates import SeenTexts, without_duplicates
from gqa.data.examples import SPLITS
from gqa.data.python_texts import module_texts
from gqa.runtime import atomic_files, regular_files
from gqa.runtime.errors import UserError

FORMAT = 1  # raise it when the extraction changes, so that older corpora are built again

# Keys of the rows, beside `package`: docstrings has text; parameter_qa has parameter, answer,
# begin, end and context; the two summaries have source and summary.
TASKS = ("docstrings", "parameter_qa", "docstring_summary", "code_summary")
TEXT_FIELDS = {"text", "source", "summary", "context", "answer"}

# Packages held out for a split; all others are for training.
HELD_OUT = {"test": ("flax", "rich"), "validation": ("optax", "fsspec")}

TEST_MODULE = re.compile(r"(^|[/_])(tests?|testing|testdata|conftest)([/_.]|$)")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A built corpus on disk.

    `manifest` has the version, the split and the sha256 of the files of each package; the numbers
    of rows and words of each task and split; and `sha256`, the hash of all rows.
    """

    folder: pathlib.Path
    manifest: dict[str, Any]

    @property
    def files(self) -> list[pathlib.Path]:
        """The files of all tasks and splits."""
        pairs = itertools.product(TASKS, SPLITS)
        return [_rows_file(self.folder, task, split) for task, split in pairs]

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """Return the rows of one task (see `TASKS`), in a fixed order.

        Raises:
            UserError: if the file was damaged after `build`, which checks it.
        """
        return [json.loads(line) for line in _lines(self.folder, task, split).splitlines()]


def build(folder: str | os.PathLike, packages: Sequence[str]) -> Corpus:
    """Return the corpus of installed packages in `folder`; extract it if `find` does not."""
    corpus = find(folder, packages)
    if corpus is None:
        folder = pathlib.Path(folder)
        corpus = Corpus(folder, _extract(folder, distributions(packages)))
    return corpus


def find(folder: str | os.PathLike, packages: Sequence[str]) -> Corpus | None:
    """Return the corpus in `folder` if it is undamaged and of these packages and versions."""
    folder = pathlib.Path(folder)
    installed = distributions(packages).items()
    versions = {name: distribution.version for name, distribution in installed}
    manifest = _read_manifest(folder / "manifest.json", versions)
    if manifest is None or not _rows_match(folder, manifest):
        return None
    return Corpus(folder, manifest)


def distributions(packages: Sequence[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions by canonical name (PEP 503), sorted.

    Raises:
        UserError: if a package is not installed, or a split would have no package.
    """
    installed = {}
    for name in packages:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"corpus package {name!r} is not installed: pip install it") from error

        # PEP 503: "ml_collections" and "ml-collections" are one name.
        installed[re.sub(r"[-_.]+", "-", name).lower()] = distribution

    for split, held_out in HELD_OUT.items():
        if not set(held_out) & set(installed):
            raise UserError(f"corpus packages give no {split} text: add {' or '.join(held_out)}")
    return dict(sorted(installed.items()))


def _read_manifest(path: pathlib.Path, versions: dict[str, str]) -> dict[str, Any] | None:
    """Read the manifest; None if it is missing, damaged, or of other versions."""
    try:
        manifest = regular_files.read_json(path)

        # The manifest may be any JSON, so looking into it may raise any of the exceptions below.
        same = {name: p["version"] for name, p in manifest["packages"].items()} == versions
        return manifest if same and manifest["format"] == FORMAT else None
    except (UserError, LookupError, TypeError, AttributeError):
        return None


def _rows_match(folder: pathlib.Path, manifest: dict[str, Any]) -> bool:
    """Return whether the rows on disk have the hash that the manifest says."""
    try:
        return hash_rows(folder) == manifest.get("sha256")
    except UserError:
        return False


def hash_rows(folder: pathlib.Path) -> str:
    """Return the hash of all rows on disk, in the order of `TASKS` and `SPLITS`.

    Raises:
        UserError: naming a file that is damaged.
    """
    digest = hashlib.sha256()
    for task, split in itertools.product(TASKS, SPLITS):
        digest.update(_lines(folder, task, split))
    return digest.hexdigest()


def _rows_file(folder: pathlib.Path, task: str, split: str) -> pathlib.Path:
    return folder / f"{task}-{split}.jsonl.gz"


def _lines(folder: pathlib.Path, task: str, split: str) -> bytes:
    """Return the rows of one task and split as JSON lines."""
    path = _rows_file(folder, task, split)
    try:
        return b"".join(text_lines.chunks(str(path)))
    except UserError as error:
        raise UserError(f"{path} is damaged; run again to build the corpus anew") from error


def _split(package: str) -> str:
    """Return the split that a package belongs to."""
    return next((split for split, names in HELD_OUT.items() if package in names), "train")


def _extract(
    folder: pathlib.Path, distributions: dict[str, importlib.metadata.Distribution]
) -> dict[str, Any]:
    """Read every package and write the corpus into `folder`; return its manifest."""
    packages: dict[str, dict[str, str]] = {}
    unreadable: list[str] = []
    duplicates: Counter[str] = Counter()
    rows: dict[str, dict[str, list[dict]]] = {task: defaultdict(list) for task in TASKS}
    seen_texts, seen_code = SeenTexts(), SeenTexts()

    # Held-out packages go first, so that of two near duplicates the training one is dropped.
    order = [*itertools.chain(*HELD_OUT.values()), *distributions]

    # The garbage collector would walk the syntax trees repeatedly and add half to the time.
    gc.disable()
    try:
        for name in dict.fromkeys(name for name in order if name in distributions):
            sources, digest = _python_files(distributions[name])
            version, split = distributions[name].version, _split(name)
            packages[name] = {"version": version, "split": split, "sha256": digest}

            for path, source in sources:
                try:
                    texts = module_texts(source)
                except (SyntaxError, ValueError, RecursionError):
                    unreadable.append(path)
                    continue
                new_texts = without_duplicates(texts, seen_texts, seen_code, duplicates)
                for task, row in module_rows(list(new_texts)):
                    rows[task][split].append({"package": name, **row})
    finally:
        gc.enable()

    manifest: dict[str, Any] = {"format": FORMAT, "packages": dict(sorted(packages.items()))}
    manifest |= {"unreadable": unreadable, "duplicates": dict(sorted(duplicates.items()))}
    return _write(folder, rows, manifest)


def _write(
    folder: pathlib.Path, rows: dict[str, dict[str, list[dict]]], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Write each task and split as JSON lines, then the manifest with their counts and hash."""
    folder.mkdir(parents=True, exist_ok=True)

    # Rows without a manifest are not read, so a build that is killed leaves no half corpus.
    (folder / "manifest.json").unlink(missing_ok=True)

    digest = hashlib.sha256()
    counts: dict[str, dict[str, dict[str, int]]] = {task: {} for task in TASKS}
    for task, split in itertools.product(TASKS, SPLITS):
        split_rows = rows[task][split]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows).encode()

        digest.update(lines)
        atomic_files.write(_rows_file(folder, task, split), gzip.compress(lines, 6, mtime=0))

        words = sum(len(row[key].split()) for row in split_rows for key in row.keys() & TEXT_FIELDS)
        counts[task][split] = {"rows": len(split_rows), "words": words}

    manifest |= {"counts": counts, "sha256": digest.hexdigest()}
    atomic_files.write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _python_files(
    distribution: importlib.metadata.Distribution,
) -> tuple[list[tuple[str, bytes]], str]:
    """Return the Python files of a package, except tests, as (path, bytes), and their sha256."""
    if distribution.files is None:
        name = distribution.metadata["Name"]
        raise UserError(f"corpus package {name!r} has no list of its files: reinstall it with pip")

    sources: list[tuple[str, bytes]] = []
    digest = hashlib.sha256()
    for file in sorted(distribution.files, key=str):
        path, location = file.as_posix(), pathlib.Path(str(distribution.locate_file(file)))

        is_test = TEST_MODULE.search(path)
        if file.suffix != ".py" or path.startswith("..") or is_test or not location.is_file():
            continue

        # With the length before each source, no two lists of files give the same bytes to hash.
        source = location.read_bytes()
        digest.update(f"{path}\n{len(source)}\n".encode() + source)
        sources.append((path, source))
    return sources, digest.hexdigest()
