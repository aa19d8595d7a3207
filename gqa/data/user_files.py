"""The files that a user names: which files they are, the texts of their columns, and bad rows.

Names are separated by commas. Each is a file, a glob, a folder of files, or a folder that Hugging
Face's `datasets` saved. `@weight` after the names makes the list a mixture. `gqa.data.file_formats`
reads the rows of one file; `gqa.data.tasks.files` and `.documents` make examples of them.
"""

import glob
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from gqa.data import file_formats
from gqa.data.examples import SPLITS
from gqa.data.separated_values import DoubtfulRow
from gqa.runtime import file_hashes, regular_files
from gqa.runtime.errors import UserError

MOST_BAD = 0.01  # share of a file's rows that may be bad
SHOWN = 5  # bad rows, or files passed over, that a message quotes
# A file of which so many rows are bad is not read to its end, if they are also more than half of
# the rows so far, or too many of all rows.
HOPELESS = 100_000
WEIGHTED = re.compile(r"(.+)@(\d+(?:\.\d+)?)")
FIELD = re.compile(r"\{([^{}]+)\}")


class BadRow(ValueError):
    """A row that gives no text; the message says why."""


class Entry(NamedTuple):
    """Files that are read one after the other: one part of a mixture, with its weight."""

    files: list[str]
    weight: float


class Report(NamedTuple):
    """Counts of a file's rows for the user: how many are bad, and which may be several rows.

    Args:
        first: the messages of the first few bad rows.
        doubtful: the numbers of the rows whose quoted text looks like rows of its own.
    """

    path: str
    rows: int
    bad: int
    first: list[str]
    doubtful: list[int]

    def __str__(self) -> str:
        return f"{self.bad} of {self.rows} rows are bad: {'; '.join(self.first)}"

    def lines(self) -> Iterator[str]:
        """Yield a line for the bad rows and one for the doubtful ones, where there are any."""
        if self.bad:
            yield f"{self}; left out"
        if self.doubtful:
            places = ", ".join(f"{self.path}:{number}" for number in self.doubtful[:SHOWN])
            yield (
                f"{len(self.doubtful)} rows hold a quoted text of which every line looks like a "
                f"row; if a quote is missing, rows are lost in it: {places}"
                + (", ..." if len(self.doubtful) > SHOWN else "")
            )


def collect(entry: Entry, columns: Collection[str], make: Callable) -> tuple[list, list[Report]]:
    """Apply `make` to every row of an entry; return the results, and reports of some files.

    Reports are of files with bad or doubtful rows.

    A row is bad, and left out, if `make` raises `BadRow`.

    Raises:
        UserError: naming the first bad rows of a file in which more than 1% are.
    """
    results, reports = [], []
    for path in entry.files:
        report = Report(path, 0, 0, [], [])
        most_bad = math.inf
        for number, row in file_formats.read(path, columns):
            report = report._replace(rows=report.rows + 1)
            if isinstance(row, DoubtfulRow):
                report.doubtful.append(number)
            try:
                results.append(make(_columns(row)))
            except BadRow as error:
                report = report._replace(bad=report.bad + 1)
                if report.bad <= SHOWN:
                    report.first.append(f"{path}:{number}: {error}")
                # Only a file with many bad rows is worth the look at its end.
                if report.bad == HOPELESS:
                    most_bad = MOST_BAD * (file_formats.number_of_rows(path) or math.inf)
                if report.bad > max(HOPELESS, min(report.rows / 2, most_bad)):
                    break

        if not report.rows:
            raise UserError(f"{path}: no rows")
        if report.bad > MOST_BAD * report.rows:
            raise UserError(f"{report}; at most 1% may be")
        reports += [report] if report.bad or report.doubtful else []
    return results, reports


def _columns(row: file_formats.Row) -> dict:
    """Return the columns of a row, or raise `BadRow` if it could not be read."""
    if isinstance(row, str):
        raise BadRow(row)
    return row


# --- columns --------------------------------------------------------------------------------------


def needed(*columns: str) -> list[str]:
    """Return the columns that names and templates such as "{question} {context}" use."""
    return list(dict.fromkeys(c for column in columns for c in FIELD.findall(column) or [column]))


def text(row: dict, column: str) -> str:
    """Return the text of a column (a list is joined by spaces) or of a template with {columns}.

    Raises:
        BadRow: if there is no such text.
    """
    if not FIELD.search(column):
        return " ".join(texts(row, column))
    return FIELD.sub(lambda field: text(row, field[1]), column)


def texts(row: dict, column: str) -> list[str]:
    """Return all texts of a column; `answers.text` looks into objects and lists of objects.

    Raises:
        BadRow: if there is none, or anything else beside them.
    """
    # A column may have a dot in its own name.
    keys = [column] if column in row else column.split(".")

    values = _look_up(row, keys)
    if values is None:
        raise BadRow(f"no column {column!r}; this row has {', '.join(row)}")
    if not values or not all(map(_is_text, values)):
        raise BadRow(f"{column!r} must be text or a list of texts, none empty")
    return values


def _look_up(value, keys: list[str]) -> list | None:
    """Return the values under nested keys, lists flattened; None if a key is missing."""
    if isinstance(value, list):
        # A list stands for all its elements: `answers.text` of [{"text": "a"}, {"text": "b"}] is
        # "a" and "b".
        flattened: list = []
        for item in value:
            values = _look_up(item, keys)
            if values is None:
                return None
            flattened += values
        return flattened
    if not keys:
        return [value]
    if not isinstance(value, dict) or keys[0] not in value:
        return None
    return _look_up(value[keys[0]], keys[1:])


def _is_text(value) -> bool:
    """Return whether a value is a string that is not blank and that UTF-8 can encode."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        # JSON may hold half of a surrogate pair, such as "\ud800", which is no character.
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- names to files -------------------------------------------------------------------------------


def entries(names: str, split: str) -> list[Entry]:
    """Return the files of every name, in order; without weights, all files are one entry.

    Raises:
        UserError: for a name that leads to no file, a file that is named twice, or weights for some
            names or not for training.
    """
    weighted_names = [_weighted(name.strip()) for name in names.split(",") if name.strip()]
    weights = [weight for _, weight in weighted_names if weight is not None]
    if weights and (len(weights) < len(weighted_names) or split != "train"):
        raise UserError(f"{names}: weights (@) are for training files, for all of them or none")

    expanded = [_expand(name, split) for name, _ in weighted_names]
    if weights:
        return [Entry(files, weight) for files, weight in zip(expanded, weights, strict=True)]
    files = [file for files in expanded for file in files]
    _check_once(files)
    return [Entry(files, 1.0)]


def _check_once(files: list[str]) -> None:
    """Refuse a file that is named twice, such as by itself and by its folder.

    Its rows would count twice in training and in every score. A mixture says by its weights how
    often rows are drawn, so it may name a file twice.
    """
    names: dict[str, str] = {}
    for file in files:
        place = os.path.realpath(file)
        if place in names:
            raise UserError(
                f"{file}: is named twice, also as {names[place]}, so that its rows would count "
                "twice; name it once"
            )
        names[place] = file


def _weighted(name: str) -> tuple[str, float | None]:
    """Split NAME@WEIGHT; a file may have such a name itself."""
    match = WEIGHTED.fullmatch(name)
    if match is None or os.path.exists(name):
        return name, None
    if float(match[2]) == 0:
        raise UserError(f"{name}: a weight must be above 0")
    return match[1], float(match[2])


def _expand(name: str, split: str) -> list[str]:
    """Return the files that one name stands for."""
    if os.path.isdir(name) and not file_formats.ending(name):
        return _folder(pathlib.Path(name), split)

    # A file's own name may look like a pattern, such as a[1].txt. A name that is neither is left to
    # the reader, which says what is wrong with it.
    if os.path.lexists(name) or not glob.has_magic(name):
        return [name]
    matches = sorted(glob.glob(name, recursive=True))
    files = [file for file in matches if not os.path.isdir(file)]

    # A pattern such as data/* stands for the folders in data, too.
    for folder in _folders(name):
        is_saved = _is_saved(folder)
        files += _folder(folder, split) if is_saved else _walk(folder).files
    if not files:
        raise UserError(f"{name}: matches no file")
    return files


def _folders(name: str) -> list[pathlib.Path]:
    """Return the folders that a name stands for; none with **, because their files match then."""
    if os.path.isdir(name) and not file_formats.ending(name):
        return [pathlib.Path(name)]
    if "**" in name or os.path.lexists(name) or not glob.has_magic(name):
        return []
    return [pathlib.Path(match) for match in sorted(glob.glob(name)) if os.path.isdir(match)]


def _is_saved(folder: pathlib.Path) -> bool:
    """Return whether `datasets` saved a folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


class _Folder(NamedTuple):
    """The files of a folder that can be read, and the files whose names have another ending."""

    files: list[str]
    passed_over: list[str]


def _folder(folder: pathlib.Path, split: str) -> list[str]:
    """Return the files of a folder; `datasets` saves several splits as a folder each."""
    # Several splits were saved: one folder each, with the split's name.
    if (folder / "dataset_dict.json").is_file():
        folder = folder / split
        if not (folder / "state.json").is_file():
            raise UserError(f"{folder}: not there; name the folder of the split that is meant")
    if (folder / "state.json").is_file():
        return _saved(folder)

    files = _walk(folder).files
    if not files:
        raise UserError(f"{folder}: no file in it ends in {file_formats.ENDINGS}")
    return files


def _walk(folder: pathlib.Path) -> _Folder:
    """Return the files of a folder and its subfolders, without hidden ones.

    Hidden are names that begin with a dot, such as .ipynb_checkpoints and what macOS leaves, and
    with two underscores.

    Raises:
        UserError: for a link that leads out of the folder, or a subfolder that `datasets` saved.
    """
    files: list[str] = []
    passed_over: list[str] = []
    for parent, folders, names in os.walk(folder):
        # `os.walk` visits only the subfolders that are left in this list.
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]

        if _is_saved(pathlib.Path(parent)):
            raise UserError(f"{parent}: saved by datasets; name that folder itself")
        for name in names:
            if not name.startswith((".", "__")):
                known = files if file_formats.ending(name) else passed_over
                known.append(os.path.join(parent, name))
    for file in files:
        _check_link(file, folder)
    return _Folder(sorted(files), sorted(passed_over))


def _check_link(file: str, folder: pathlib.Path) -> None:
    """Refuse a file of a folder that is a link to a file elsewhere."""
    target = pathlib.Path(file).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise UserError(
            f"{file}: leads out of its folder, to {target}; if that is meant, name the files of "
            f"the folder one by one, as {file}"
        )


def passed_over(names: str) -> list[str]:
    """Return a line for each folder among `names` of which files are not read, and why."""
    folders = [
        folder for name in names.split(",") for folder in _folders(_weighted(name.strip())[0])
    ]
    lines = []
    for folder in folders:
        others = [] if _is_saved(folder) else _walk(folder).passed_over
        if others:
            shown = ", ".join(others[:SHOWN]) + (" ..." if len(others) > SHOWN else "")
            lines.append(
                f"{len(others)} files of {folder} do not end in {file_formats.ENDINGS}: {shown}; "
                "left out"
            )
    return lines


def _saved(folder: pathlib.Path) -> list[str]:
    """Return the Arrow files that `save_to_disk` listed in state.json, in that order."""
    path = folder / "state.json"
    try:
        state = regular_files.read_json(path)
        names = [entry["filename"] for entry in state["_data_files"]]
        if not names or not all(isinstance(name, str) and _is_plain(name) for name in names):
            raise ValueError("_data_files must name files of the folder")
    except (UserError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not what datasets writes: {error}") from error

    # Such a folder holds all rows of its parent, and a list of the rows that were selected.
    if state.get("_indices_data_files"):
        raise UserError(f"{path}: rows are chosen by indices; save it after flatten_indices()")
    for name in names:
        _check_link(str(folder / name), folder)
    return [str(folder / name) for name in names]


def _is_plain(name: str) -> bool:
    # A name with a folder in it could lead to any file of the machine.
    return name == os.path.basename(name) and name.endswith(".arrow")


def contents(options: dict) -> dict:
    """Return hashes and weights of the files that `options` names for each split, as JSON."""
    return {
        split: [
            [[file_hashes.sha256(file) for file in files], weight]
            for files, weight in entries(names, split)
        ]
        for split in SPLITS
        if (names := options.get(split))
    }
