"""Rows of one file: JSON lines, JSON, TSV, CSV and plain text (all also .gz), Parquet and Arrow.

A reader yields (number, row). The number is that of the line, or of the row in formats without
lines; both count from 1. A row is a dict of columns, or a str that says why the row cannot be read.
A file that cannot be read at all raises UserError.

No content of a file is trusted: the size of a line is limited, and Arrow's offsets are validated
before they are followed. `gqa.data.user_files` chooses files and columns.
"""

import collections
import csv
import gzip
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet

from gqa.runtime import hardware
from gqa.runtime.errors import UserError

LONGEST = 1 << 24  # bytes of a line or a paragraph; the rest of it is not held in memory
LARGEST = 1 << 30  # bytes of a .json file, which is held whole
MOST_ROWS = 1024  # of a columnar file at a time

Row = dict | str
Rows = Iterator[tuple[int, Row]]

# What a line becomes: a row, or None for a header.
_Made = TypeVar("_Made", dict, dict | None)

csv.field_size_limit(LONGEST)  # 131,072 otherwise: an article can be longer


class _Wrong(ValueError):
    """A line that cannot be read as a row; the message says why."""


def ending(path: str) -> str:
    """Return the ending of a file name that tells its format, e.g. .jsonl.gz; "" if unknown."""
    return next((end for end in READERS if str(path).endswith(end)), "")


def read(path: str, columns: Collection[str]) -> Rows:
    """Yield the rows of a file; columnar formats read only the columns `columns`.

    Raises:
        UserError: for a path that is no file, an unknown format, or a damaged file.
    """
    if not ending(path):
        raise UserError(f"{path}: file name must end in {', '.join(READERS)}")
    try:
        # It is read several times, and opening a pipe would wait for its writer.
        if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
            raise UserError(f"{path}: not a file")
        yield from READERS[ending(path)](path, columns)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


# --- lines ----------------------------------------------------------------------------------------


def _jsonl(path: str, columns: Collection[str]) -> Rows:
    del columns
    return _each_line(path, _object)


def _object(line: str) -> dict:
    row = _parse(line)
    if not isinstance(row, dict):
        raise _Wrong("not a JSON object with named columns")
    return row


def _parse(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _Wrong(f"not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # the latter: a number of 5000 digits
        raise _Wrong("JSON nested too deeply or a number too long") from error


def _tsv(path: str, columns: Collection[str]) -> Rows:
    """Read tab-separated values: a header line, no quoting."""
    del columns
    names: list[str] = []

    def row(line: str) -> dict | None:
        values = line.split("\t")
        if not names:
            names.extend(values)
            return None
        return _by_name(names, values)

    for number, parsed in _each_line(path, row):
        # The header is no row: None if it could be read, else what is wrong with it.
        if parsed is None or (isinstance(parsed, str) and not names):
            _check_header(f"{path}:{number}", names, parsed)
        else:
            yield number, parsed


def _by_name(names: list[str], values: list[str]) -> dict:
    if len(values) != len(names):
        raise _Wrong(f"{len(values)} columns, the header has {len(names)}")
    return dict(zip(names, values, strict=True))


def _check_header(where: str, names: list[str], wrong: str | None) -> None:
    if wrong:
        raise UserError(f"{where}: {wrong}")
    name, times = collections.Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{where}: the header has {times} columns {name!r}")


def _csv(path: str, columns: Collection[str]) -> Rows:
    """Read comma-separated values: a header line; quotes may enclose commas and line ends."""
    del columns
    # Undecodable bytes become half surrogates, which are found in the row they end up in.
    lines = (raw.decode(errors="surrogateescape") for _, raw in _lines(path))
    reader = csv.reader(lines, strict=True)
    names: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader, None)
            if values is None:
                return
            _check_encodes("".join(values))
            if values and names:
                yield number, _by_name(names, values)
            elif values:
                names = values
                _check_header(f"{path}:{number}", names, None)
        except (csv.Error, _Wrong) as error:
            if not names:
                raise UserError(f"{path}:{number}: {error}") from error
            yield number, f"not CSV: {error}" if isinstance(error, csv.Error) else str(error)


def _txt(path: str, columns: Collection[str]) -> Rows:
    """Read paragraphs, each a row with the column `text`; a blank line ends a paragraph."""
    del columns
    paragraph: list[bytes] = []
    first, size = 0, 0
    for number, raw in itertools.chain(_lines(path), [(0, b"")]):
        blank = not raw.strip()
        if paragraph and (blank or size + len(raw) > LONGEST):
            yield first, _paragraph(paragraph)
            paragraph, size = [], 0
        if not blank:
            first = first if paragraph else number
            paragraph.append(raw)
            size += len(raw)


def _paragraph(lines: list[bytes]) -> Row:
    try:
        return {"text": _decode(b"".join(lines)).rstrip()}
    except _Wrong as error:
        return str(error)


def _each_line(path: str, make: Callable[[str], _Made]) -> Iterator[tuple[int, _Made | str]]:
    """Apply `make` to every line that is not blank. A line of tabs is a row of empty columns."""
    for number, raw in _lines(path):
        try:
            text = _decode(raw).rstrip("\r\n")
            if text.strip(" "):
                yield number, make(text)
        except _Wrong as error:
            yield number, str(error)


def _decode(raw: bytes) -> str:
    if len(raw) > LONGEST:
        raise _Wrong(f"longer than {LONGEST} bytes")
    text = raw.decode(errors="surrogateescape")
    _check_encodes(text)
    return text


def _check_encodes(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Wrong("not UTF-8 text") from error


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines with their line ends; a line that is too long is cut off."""
    open_file = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        with open_file(path, "rb") as file:
            while line := file.readline(LONGEST + 1):
                number += 1
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                while len(line) > LONGEST and not line.endswith(b"\n"):
                    line = file.readline(LONGEST + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: not a whole gzip file from here on") from error


# --- one value ------------------------------------------------------------------------------------


def _json(path: str, columns: Collection[str]) -> Rows:
    """Read a list of objects, alone or under `data`; in SQuAD's layout, a row per question."""
    del columns
    content = bytearray()
    for _, line in _lines(path):
        content += line
        if len(content) > LARGEST:
            raise UserError(
                f"{path}: larger than {LARGEST >> 30} GiB; write one object a line (.jsonl)"
            )
    try:
        value = _parse(_decode_whole(content))
        rows = value["data"] if isinstance(value, dict) else value
        yield from enumerate((row for item in rows for row in _questions(item)), start=1)
    except _Wrong as error:
        raise UserError(f"{path}: {error}; if each line is an object, name it .jsonl") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: neither a list of objects nor in SQuAD's layout") from error


def _decode_whole(content: bytearray) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _Wrong("not UTF-8 text") from error


def _questions(item) -> Iterator[Row]:
    if not isinstance(item, dict):
        yield "not a JSON object with named columns"
    elif "paragraphs" not in item:
        yield item
    else:
        for paragraph in item["paragraphs"]:
            for question in paragraph["qas"]:
                yield {"context": paragraph["context"], **question}


# --- columnar -------------------------------------------------------------------------------------


def _parquet(path: str, columns: Collection[str]) -> Rows:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = _present(path, file.schema_arrow.names, columns)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            largest = max((group.total_byte_size for group in groups), default=0)
            hardware.check_memory(largest, f"{path}: one row group")
            batches = file.iter_batches(MOST_ROWS, columns=names)
            yield from _columnar(batches, names)
    except (pa.ArrowException, ValueError, MemoryError) as error:
        raise UserError(f"{path}: damaged or not Parquet: {error}") from error


def _arrow(path: str, columns: Collection[str]) -> Rows:
    """Read an Arrow IPC stream, the format in which Hugging Face's `datasets` saves."""
    try:
        with pa.OSFile(path) as source, pa.ipc.open_stream(source) as stream:
            names = _present(path, stream.schema.names, columns)
            yield from _columnar(stream, names)
    except (pa.ArrowException, ValueError, MemoryError) as error:
        raise UserError(f"{path}: damaged or not an Arrow stream: {error}") from error


def _present(path: str, names: list[str], columns: Collection[str]) -> list[str]:
    """Return the columns to read; refuse a file that lacks one of `columns`."""
    for column in columns:
        if column not in names and column.partition(".")[0] not in names:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(names)}")
    return [name for name in names if name in {c.partition(".")[0] for c in columns} | {*columns}]


def _columnar(batches: Iterator[pa.RecordBatch], names: list[str]) -> Rows:
    number = 0
    for batch in batches:
        batch = batch.select(names)
        batch.validate(full=True)  # an offset may point anywhere
        for start in range(0, len(batch), MOST_ROWS):
            for row in batch.slice(start, MOST_ROWS).to_pylist():
                number += 1
                yield number, row


_TEXT = {".jsonl": _jsonl, ".json": _json, ".tsv": _tsv, ".csv": _csv, ".txt": _txt}
READERS = {
    **_TEXT,
    **{f"{name}.gz": reader for name, reader in _TEXT.items()},
    ".parquet": _parquet,
    ".arrow": _arrow,
}
