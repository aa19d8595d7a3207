"""Datasets that tensorflow-datasets (TFDS) prepared on disk, read without TensorFlow.

A dataset is the folder DATA_DIR/NAME/VERSION in array_record format. Its JSON files are not
trusted: only TFDS's own feature classes are accepted, and only files inside the folder are read.
What a row declares is checked by `gqa.data.array_records` before the row is decoded.
Each dataset of the paper is a module of `gqa.data.tasks` that calls `task` of this file.
"""

import bisect
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import tensorflow_datasets as tfds

from gqa.data import array_records
from gqa.data.examples import SPLITS, Example
from gqa.runtime import regular_files
from gqa.runtime.errors import UserError

CHARACTERS = 1 << 15  # of an input: 16 for each of 2048 tokens; what follows is never read
VERSION = re.compile(r"\d+\.\d+\.\d+")
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
FEATURES = "tensorflow_datasets.core.features."

# TFDS's classes of text and numbers. It would import a module for a name that it does not know, and
# its images, sounds, videos and labels start other programs or read further files.
SHIPPED = frozenset(
    FEATURES + name
    for name in (
        "feature.Tensor",
        "features_dict.FeaturesDict",
        "scalar.Scalar",
        "sequence_feature.Sequence",
        "tensor_feature.Tensor",
        "text_feature.Text",
        "translation_feature.Translation",
        "translation_feature.TranslationVariableLanguages",
    )
)


def task(
    dataset: str,
    example: Callable[[dict], Example],
    prefix: str = "",
    splits: Sequence[str] = SPLITS,
):
    """Return the functions `load`, `check` and `fingerprint` of a task (see `gqa.data.tasks`).

    Args:
        dataset: its name in TFDS, such as "c4/en".
        example: makes an example of a row, in which text is str. Examples that lack inputs or a
            target are left out.
        prefix: put before the inputs.
        splits: those that the dataset has.
    """

    def load(split: str, *, corpus=None, data_dir: str = "") -> list[Example]:
        del corpus  # every task takes it
        made = (example(row) for row in records(dataset, data_dir, split))
        return [
            Example((prefix + inputs)[:CHARACTERS], targets)
            for inputs, targets in made
            if inputs.strip() and targets[0].strip()
        ]

    def check(*, data_dir: str = "") -> list:
        for split in splits:
            try:
                # One row shows whether the dataset has the features that `example` reads.
                example(records(dataset, data_dir, split)[0])
            except (LookupError, TypeError, AttributeError) as error:
                folder = find(dataset, data_dir)
                raise UserError(f"{folder}: not the features of {dataset}: {error}") from error
        return []

    def fingerprint(*, data_dir: str = "") -> list:
        return describe(dataset, data_dir)

    return load, check, fingerprint


class Records(Sequence):
    """The rows of one split; each is checked and read from disk when it is indexed.

    Args:
        source: TFDS's data source.
        folder: of the dataset, for messages.
        files: the split's files in their order, each with the number of its rows.
    """

    def __init__(self, source: Sequence, folder: Path, files: Sequence[tuple[str, int]]):
        self._source, self._folder = source, folder
        self._paths = [path for path, _ in files]
        self._ends = [*itertools.accumulate(rows for _, rows in files)]
        self._checked: dict[str, array_records.RecordFile] = {}
        if self._ends[-1:] != [len(source)]:
            raise ValueError(f"{len(source)} rows, and {sum(rows for _, rows in files)} in files")

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> dict: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]

        # A loop over a Sequence ends with an IndexError.
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            self._check(index)
            return _decode(self._source[index])
        except Exception as error:  # TFDS, array_record and protobuf have one of their own each
            raise UserError(f"{self._folder}: record {index} is damaged: {error}") from error

    def _check(self, index: int) -> None:
        """Refuse a row that declares more than may be decoded."""
        file = bisect.bisect_right(self._ends, index)
        path, first = self._paths[file], self._ends[file - 1] if file else 0

        # The footer of a file is read once, when the first of its rows is.
        if path not in self._checked:
            self._checked[path] = array_records.RecordFile(path)
        self._checked[path].check(index - first)


def _decode(value):
    """Return `value` with all bytes decoded to str, at any depth."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if hasattr(value, "__iter__") and not isinstance(value, str):
        return [_decode(item) for item in value]
    return value


def records(dataset: str, data_dir: str, split: str) -> Records:
    """Return the rows of a split.

    Raises:
        UserError: naming the folder and, if it is not there, the command that prepares it.
    """
    folder = find(dataset, data_dir)
    builder = _open(folder, dataset, data_dir)
    known = builder.info.splits

    name = "val" if split == "validation" and "val" in known else split  # as media_sum has it
    if name not in known or not known[name].num_examples:
        raise UserError(f"{folder}: no rows in split {split!r}; {_command(dataset, data_dir)}")

    # dataset_info.json may name files anywhere on the machine, or be no description of files.
    try:
        files = [(part.filename, part.examples_in_shard) for part in known[name].file_instructions]
    except Exception as error:  # see Records
        raise UserError(f"{folder}: not what TFDS writes: {error}") from error
    for file, _ in files:
        path = Path(os.path.abspath(file))
        if path.parent != folder or not path.is_file():
            raise UserError(f"{folder}: {path} is not in it; {_command(dataset, data_dir)}")
    try:
        return Records(builder.as_data_source(name), folder, files)
    except Exception as error:  # see Records
        raise UserError(f"{folder}: split {name!r} is damaged: {error}") from error


def describe(dataset: str, data_dir: str) -> list:
    """Return what identifies a prepared dataset, as JSON; its path does not count."""
    folder = find(dataset, data_dir)
    splits = _open(folder, dataset, data_dir).info.splits
    sizes = {name: [split.num_bytes, split.shard_lengths] for name, split in splits.items()}
    return [dataset, folder.name, sizes]


def find(dataset: str, data_dir: str) -> Path:
    """Return the folder of the newest version on disk."""
    parent = _root(data_dir) / dataset
    versions = [
        path
        for path in (parent.iterdir() if parent.is_dir() else ())
        if VERSION.fullmatch(path.name) and (path / "dataset_info.json").is_file()
    ]
    if not versions:
        raise UserError(f"{parent}: not prepared; {_command(dataset, data_dir)}")

    # Compare versions as numbers: 10.0.0 is newer than 9.0.0.
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))


def _root(data_dir: str) -> Path:
    return Path(os.path.abspath(data_dir or os.path.expanduser(tfds.core.constants.DATA_DIR)))


def _command(dataset: str, data_dir: str) -> str:
    """Return advice: the command that prepares the dataset, which needs TensorFlow."""
    return (
        "where tensorflow and apache-beam are installed, run: "
        f"tfds build {dataset} --data_dir={_root(data_dir)} --file_format=array_record"
    )


def _open(folder: Path, dataset: str, data_dir: str) -> tfds.core.DatasetBuilder:
    path = folder / "features.json"
    try:
        names = list(_classes(_json(path)))
    except RecursionError as error:
        raise UserError(f"{path}: not what TFDS writes: nested too deeply") from error
    for name in names:
        if name not in SHIPPED:
            raise UserError(f"{path}: {name} is no feature of TFDS for text or numbers")

    # Only array_record lets a row be read by its number.
    kept_as = _json(folder / "dataset_info.json").get("fileFormat", "tfrecord")
    if kept_as != "array_record":
        raise UserError(
            f"{folder}: prepared as {kept_as}; {_command(dataset, data_dir)} --overwrite"
        )
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # see Records
        raise UserError(f"{folder}: not what TFDS writes: {error}") from error


def _json(path: Path) -> dict:
    try:
        return regular_files.read_json(path)
    except UserError as error:
        raise UserError(f"{path}: not what TFDS writes: {error}") from error


def _classes(value) -> Iterator[str]:
    """Yield the names of classes in features.json, of its present and its former layout.

    A feature may hold a text that is JSON itself and names classes, too, at any depth. TFDS parses
    such a text under several keys, so every text that is JSON is searched.
    """
    if isinstance(value, list):
        for item in value:
            yield from _classes(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in CLASS_KEYS and isinstance(item, str):
                yield item
            # A compressed tensor could fill the memory, so that its encoding is none of `SHIPPED`.
            if key == "encoding" and isinstance(item, str) and item.lower() != "none":
                yield f"encoding {item}"
            yield from _classes(item)
    elif isinstance(value, str) and any(bracket in value for bracket in "{["):
        try:
            inner = json.loads(value)
        except ValueError:
            return
        yield from _classes(inner)
