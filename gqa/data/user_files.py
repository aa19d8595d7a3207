"""From the files a user names to checked examples: entries, columns, and the rows that are bad.

Names are comma-separated; each is a file, a glob, or a folder: of such files, or saved by Hugging
Face's `datasets`. `@weight` behind a name makes the list a mixture.
"""

import functools
import glob
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from gqa.data import file_formats
from gqa.runtime.errors import UserError

MOST_BAD = 0.01  # of a file's rows
SHOWN = 5
WEIGHTED = re.compile(r"(.+)@(\d+(?:\.\d+)?)")
FIELD = re.compile(r"\{([^{}]+)\}")


class BadRow(ValueError):
    """What is wrong with a row."""


class Entry(NamedTuple):
    """Files to read one after the other, and how often they are drawn from beside others."""

    files: list[str]
    weight: float


class Report(NamedTuple):
    """What was left out of a file: how many of its rows, and the first of them."""

    path: str
    rows: int
    bad: int
    first: list[str]

    def __str__(self) -> str:
        return f"{self.bad} of {self.rows} rows are bad: {'; '.join(self.first)}"


def collect(entry: Entry, columns: Collection[str], make: Callable) -> tuple[list, list[Report]]:
    """What `make` makes of the rows of an entry; those that raise `BadRow` are left out.

    Raises:
        UserError: naming the first bad rows of a file in which more than 1% are.
    """
    made, reports = [], []
    for path in entry.files:
        report = Report(path, 0, 0, [])
        for number, row in file_formats.read(path, columns):
            report = report._replace(rows=report.rows + 1)
            try:
                made.append(make(_whole(row)))
            except BadRow as error:
                report = report._replace(bad=report.bad + 1)
                if report.bad <= SHOWN:
                    report.first.append(f"{path}:{number}: {error}")
        if not report.rows:
            raise UserError(f"{path}: no rows")
        if report.bad > MOST_BAD * report.rows:
            raise UserError(f"{report}; at most 1% may be")
        reports += [report] if report.bad else []
    return made, reports


def _whole(row: file_formats.Row) -> dict:
    if isinstance(row, str):
        raise BadRow(row)
    return row


# --- columns --------------------------------------------------------------------------------------


def needed(*columns: str) -> list[str]:
    """The columns that names and templates such as "{question} {context}" take."""
    return list(dict.fromkeys(c for column in columns for c in FIELD.findall(column) or [column]))


def text(row: dict, column: str) -> str:
    """One text: of a column, lists joined by spaces, or of a template of columns in braces.

    Raises:
        BadRow: if there is no such text.
    """
    if not FIELD.search(column):
        return " ".join(texts(row, column))
    return FIELD.sub(lambda field: text(row, field[1]), column)


def texts(row: dict, column: str) -> list[str]:
    """Every text of a column; `answers.text` looks into objects, and into each of a list of them.

    Raises:
        BadRow: if there is none, or anything else beside them.
    """
    keys = [column] if column in row else column.split(".")
    found = _look(row, keys)
    if found is None:
        raise BadRow(f"no column {column!r}; this row has {', '.join(row)}")
    if not found or not all(map(_is_text, found)):
        raise BadRow(f"{column!r} must be text or a list of texts, none empty")
    return found


def _look(value, keys: list[str]) -> list | None:
    """What stands under the keys, lists flattened; None if nothing does."""
    if isinstance(value, list):
        found = [_look(item, keys) for item in value]
        return None if None in found else [item for items in found for item in items]
    if not keys:
        return [value]
    if not isinstance(value, dict) or keys[0] not in value:
        return None
    return _look(value[keys[0]], keys[1:])


def _is_text(value) -> bool:
    """Whether it is a string with something in it that UTF-8 can write, unlike half a surrogate."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- names to files -------------------------------------------------------------------------------


def entries(names: str, split: str) -> list[Entry]:
    """Files of every name, in order; without weights all are one entry.

    Raises:
        UserError: for a name that leads to no file, or weights for some names or not for training.
    """
    found = [_weighted(name.strip()) for name in names.split(",") if name.strip()]
    weights = [weight for _, weight in found if weight is not None]
    if weights and (len(weights) < len(found) or split != "train"):
        raise UserError(f"{names}: weights (@) are for training files, for all of them or none")
    expanded = [(_expand(name, split), weight) for name, weight in found]
    if weights:
        return [Entry(files, weight) for files, weight in expanded]
    return [Entry([file for files, _ in expanded for file in files], 1.0)]


def _weighted(name: str) -> tuple[str, float | None]:
    match = WEIGHTED.fullmatch(name)
    if match is None or os.path.exists(name):
        return name, None
    if float(match[2]) == 0:
        raise UserError(f"{name}: a weight must be above 0")
    return match[1], float(match[2])


def _expand(name: str, split: str) -> list[str]:
    if os.path.isdir(name) and not file_formats.ending(name):
        return _folder(pathlib.Path(name), split)
    if os.path.lexists(name) or not glob.has_magic(name):
        return [name]
    found = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
    if not found:
        raise UserError(f"{name}: matches no file")
    return found


def _folder(folder: pathlib.Path, split: str) -> list[str]:
    """Files of a folder; one with several splits, saved by `datasets`, has a folder for each."""
    if (folder / "dataset_dict.json").is_file():
        folder = folder / split
        if not (folder / "state.json").is_file():
            raise UserError(f"{folder}: not there; name the folder of the split that is meant")
    if (folder / "state.json").is_file():
        return _saved(folder)
    files = [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if file_formats.ending(name)
    ]
    if not files:
        raise UserError(f"{folder}: no file in it ends in {', '.join(file_formats.READERS)}")
    root = folder.resolve()
    for file in files:
        if not pathlib.Path(file).resolve().is_relative_to(root):
            raise UserError(f"{file}: leads out of its folder; name the file it leads to")
    return sorted(files)


def _saved(folder: pathlib.Path) -> list[str]:
    """The Arrow files that `save_to_disk` lists in state.json, in their order."""
    path = folder / "state.json"
    try:
        if path.stat().st_size > file_formats.LONGEST:
            raise ValueError("it is too large")
        state = json.loads(path.read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
        if not names or not all(isinstance(name, str) and _is_plain(name) for name in names):
            raise ValueError("_data_files must name files of the folder")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not what datasets writes: {error}") from error
    if state.get("_indices_data_files"):
        raise UserError(f"{path}: rows are chosen by indices; save it after flatten_indices()")
    return [str(folder / name) for name in names]


def _is_plain(name: str) -> bool:
    return name == os.path.basename(name) and name.endswith(".arrow")


@functools.cache
def digest(path: str) -> str:
    """The sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(options: dict) -> dict:
    """Of the files that `options` names for each split: their hashes and weights, as JSON."""
    return {
        split: [
            [[digest(file) for file in files], weight] for files, weight in entries(names, split)
        ]
        for split in ("train", "validation", "test")
        if (names := options.get(split))
    }
