"""Rows of one file, in any of the formats that are read.

JSON lines (.jsonl, .ndjson), JSON, TSV, CSV and plain text, each also compressed by gzip, bzip2 or
zstd; Parquet and Arrow. Upper case in an ending makes no difference.

A reader yields (number, row). The number is that of the line, or of the row in formats without
lines; both count from 1. A row is a dict of columns, or a str that says why the row cannot be read.
A file that cannot be read at all raises UserError.

No content of a file is trusted: only regular files are opened, and lines, rows and what a
compressed file expands to are bounded before they are held in memory. The formats are read by
`gqa.data.text_lines`, `separated_values`, `json_lists` and `columnar_files`; `gqa.data.user_files`
chooses files and columns.
"""

import os
from collections.abc import Collection, Iterator

from gqa.data import columnar_files, json_lists, separated_values, text_lines
from gqa.data.text_lines import WrongText
from gqa.runtime.errors import UserError

Row = dict | str
Rows = Iterator[tuple[int, Row]]


def ending(path: str | os.PathLike) -> str:
    """Return the ending of a file name that tells its format, such as .jsonl.gz; "" if unknown."""
    name = str(path).lower()
    return next((end for end in READERS if name.endswith(end)), "")


def read(path: str, columns: Collection[str]) -> Rows:
    """Yield the rows of a file; columnar formats read only the columns `columns`.

    Raises:
        UserError: for a path that is no regular file, an unknown format, or a damaged file.
    """
    if not ending(path):
        raise UserError(f"{path}: file name must end in {ENDINGS}")

    # The user sees a broken link in the folder, so "no such file" would be puzzling.
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(
            f"{path}: a link to {os.readlink(path)}, which is not there; restore that file, or "
            "name another one"
        )
    try:
        yield from READERS[ending(path)](path, columns)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def number_of_rows(path: str) -> int | None:
    """Return how many rows a file has, if it says so at its end; None for most formats."""
    return columnar_files.number_of_rows(path) if ending(path) == ".parquet" else None


def _jsonl(path: str, columns: Collection[str]) -> Rows:
    """Read one JSON object a line."""
    del columns
    for number, raw in text_lines.lines(path):
        try:
            text = text_lines.decode(raw)
            if text.strip(" \r\n"):
                row = json_lists.parse(text.rstrip("\r\n"))
                is_row = isinstance(row, dict)
                yield number, row if is_row else "not a JSON object with named columns"
        except WrongText as error:
            yield number, str(error)


def _json(path: str, columns: Collection[str]) -> Rows:
    del columns
    return json_lists.read(path)


def _csv(path: str, columns: Collection[str]) -> Rows:
    del columns
    return separated_values.read_csv(path)


def _tsv(path: str, columns: Collection[str]) -> Rows:
    del columns
    return separated_values.read_tsv(path)


def _txt(path: str, columns: Collection[str]) -> Rows:
    """Read paragraphs, each a row with the column `text`; a blank line ends a paragraph.

    A paragraph with a line that is no text is left out, and the number is that of the line.
    """
    del columns
    paragraph: list[str] = []

    # `wrong` is the paragraph's first line that is no text: its number, and the reason. The number
    # is 0 if there is no such line.
    first, size, wrong = 0, 0, (0, "")
    for number, raw in text_lines.lines(path):
        # A paragraph also ends before it becomes too long, because a file without blank lines would
        # be one paragraph.
        is_blank = not raw.strip()
        if (paragraph or wrong[0]) and (is_blank or size + len(raw) > text_lines.LONGEST):
            yield wrong if wrong[0] else (first, {"text": "".join(paragraph).rstrip()})
            paragraph, size, wrong = [], 0, (0, "")
        if is_blank:
            continue

        first = first if paragraph else number
        size += len(raw)
        try:
            paragraph.append(text_lines.decode(raw))
        except WrongText as error:
            wrong = wrong if wrong[0] else (number, str(error))

    # The last paragraph has no blank line behind it.
    if paragraph or wrong[0]:
        yield wrong if wrong[0] else (first, {"text": "".join(paragraph).rstrip()})


_TEXT = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".tsv": _tsv,
    ".csv": _csv,
    ".txt": _txt,
}
READERS = {
    **_TEXT,
    **{
        f"{name}{compression}": reader
        for compression in text_lines.COMPRESSIONS
        for name, reader in _TEXT.items()
    },
    ".parquet": columnar_files.read_parquet,
    ".arrow": columnar_files.read_arrow,
}

# The endings in words, for messages.
ENDINGS = (
    f"{', '.join(_TEXT)} (or these with {', '.join(text_lines.COMPRESSIONS)}), .parquet or .arrow"
)
