"""Rows of CSV and TSV files.

A quote that is not closed takes in all lines up to the next quote. Such a row is bad, and the lines
behind its first are read again as rows of their own, so that one typing error costs one row. Where
the next quote happens to end a field, as in `5"` for five inches, the row looks right; it is told
by its lines, which have the columns of rows. The file is refused if such lines are many, and the
row is a `DoubtfulRow` if they are few.
"""

import collections
import csv
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gqa.data import text_lines
from gqa.data.text_lines import WrongText, decode
from gqa.runtime.errors import UserError

# Bytes of a file that may be read again behind unclosed quotes; lines beyond are bad unread.
MOST_REREAD = 1 << 26
# Bytes that a line costs beside its own, because short lines take more memory and time than their
# bytes.
LINE_COST = 64

# Lines and separators of a row, also inside quotes. Every line and every value is a Python object,
# so that 16 MiB of two bytes each would become a gigabyte.
MOST_LINES = 1 << 18
MOST_SEPARATORS = 1 << 20

# Of a TSV file's rows that hold quotes, this share may be written otherwise than the others.
MOST_ODD = 0.01

# A quoted text of so many lines that all have the columns of a row is taken for rows that an
# unclosed quote hides.
HIDDEN_LINES = 10

# Columns of a header.
MOST_COLUMNS = 1 << 16

# 131,072 otherwise: an article can be longer.
csv.field_size_limit(text_lines.LONGEST)

# Each field is quoted as a whole, or has no quote. What was matched is never given back (`*+`),
# because remembering a place for each character takes 100 times the memory of the row.
_QUOTED_FIELD = r'"[^"]*+(?:""[^"]*+)*+"'
_QUOTED_ROW = re.compile(rf'(?:{_QUOTED_FIELD}|[^"\t]*+)(?:\t(?:{_QUOTED_FIELD}|[^"\t]*+))*+')

Rows = Iterator[tuple[int, dict | str]]


class Record(NamedTuple):
    """The values of a row, or what is wrong with it; `text` is the row as it stands in the file."""

    number: int
    text: str
    values: list[str]
    wrong: str


def read_csv(path: str) -> Rows:
    """Yield the rows of a file with a header line; quotes may enclose commas and line ends."""
    return _named(path, ",", lambda width: _quoted_records(path, ",", width))


def read_tsv(path: str) -> Rows:
    """Yield the rows of a file with a header line and tabs between the columns.

    Programs such as pandas quote a text that holds a quote, a tab or a line end, and double its
    quotes; others write quotes as they are. The whole file tells which of the two it is.

    Raises:
        UserError: if the file is written in both ways.
    """
    if _is_quoted_tsv(path):
        return _named(path, "\t", lambda width: _quoted_records(path, "\t", width))
    return _named(path, "\t", lambda width: _plain_records(path, width))


class DoubtfulRow(dict):
    """A row with a quoted text of which every line looks like a row that a quote may hide."""


class _Width:
    """The number of columns, which is known once the header is read."""

    columns = 0


def _named(path: str, separator: str, open_records: Callable[[_Width], Iterator[Record]]) -> Rows:
    """Yield rows as dicts of the header's columns.

    Raises:
        UserError: naming the line of a wrong header, or of a quote that hides rows.
    """
    width = _Width()
    names: list[str] = []
    for number, text, values, wrong in open_records(width):
        if not wrong and _hidden_lines(text, separator, width.columns):
            raise UserError(
                f"{path}:{number}: a quote is open over {text.count(chr(10))} lines that look like "
                "rows; close it or double it, or write the file as .jsonl if it is one text"
            )

        # The first row that is not blank is the header.
        if names:
            is_doubtful = _may_be_rows(text, separator, width.columns)
            kind = DoubtfulRow if is_doubtful else dict
            yield number, wrong or kind(zip(names, values, strict=True))
        elif wrong:
            raise UserError(f"{path}:{number}: {wrong}")
        else:
            name, times = collections.Counter(values).most_common(1)[0]
            if times > 1:
                raise UserError(f"{path}:{number}: the header has {times} columns {name!r}")
            names, width.columns = values, len(values)


def _hidden_lines(text: str, separator: str, columns: int) -> bool:
    """Return whether the text of a row is that of many rows, which an unclosed quote hides.

    The first line and the last one belong to the quoted text in any case, so that only the lines
    between them are looked at. In a file of one column every line has the columns of a row.
    """
    between = text.split("\n")[1:-1]
    return len(between) >= HIDDEN_LINES and _look_like_rows(between, separator, columns)


def _may_be_rows(text: str, separator: str, columns: int) -> bool:
    """Return whether every line of a row's text has the columns of a row.

    A few such lines are no proof, because a text may have a comma in each of its lines.
    """
    lines = text.split("\n")
    return len(lines) > 1 and _look_like_rows(lines, separator, columns)


def _look_like_rows(lines: list[str], separator: str, columns: int) -> bool:
    """Return whether every line has the columns of a row; False for one column, which all have."""
    return columns > 1 and all(line.count(separator) == columns - 1 for line in lines)


def _plain_records(path: str, width: _Width) -> Iterator[Record]:
    """Yield the lines of a file without quoting. A line of tabs is a row of empty columns."""
    for number, raw in text_lines.lines(path):
        try:
            text = decode(raw).rstrip("\r\n")
            if text.strip(" "):
                # A line of 16 MiB can have 16 million values, so they are counted first.
                wrong = _width_fault(text.count("\t") + 1, width)
                yield Record(number, text, [] if wrong else text.split("\t"), wrong)
        except WrongText as error:
            yield Record(number, "", [], str(error))


def _width_fault(columns: int, width: _Width) -> str:
    """Return the fault of a row of so many columns; "" if it has none."""
    if not width.columns:
        return f"the header has {columns} columns" if columns > MOST_COLUMNS else ""
    if columns == width.columns:
        return ""
    return f"{columns} columns, the header has {width.columns}"


def _quoted_records(path: str, separator: str, width: _Width) -> Iterator[Record]:
    """Yield the rows of a file with quoting; behind a bad row go on with its second line."""
    source = text_lines.lines(path)
    waiting: collections.deque[tuple[int, bytes]] = collections.deque()
    reread = 0
    while True:
        taken, record = _next_record(source, waiting, separator, width)
        if not taken:
            return
        if record is not None:
            yield record
        if record is None or not record.wrong:
            continue

        # The lines that a bad row took in are rows too, which the quote may have hidden.
        behind = taken[1:]
        reread += sum(len(raw) + LINE_COST for _, raw in behind)
        if reread <= MOST_REREAD:
            waiting.extendleft(reversed(behind))
        else:
            for number, _ in behind:
                yield Record(number, "", [], "inside the quote of a bad row")


def _next_record(
    source, waiting, separator, width
) -> tuple[list[tuple[int, bytes]], Record | None]:
    """Read one row; return the numbered lines it takes, and the row unless it is blank."""
    taken: list[tuple[int, bytes]] = []
    size, separators = 0, 0

    def take() -> Iterator[str]:
        nonlocal size, separators
        while (line := waiting.popleft() if waiting else next(source, None)) is not None:
            taken.append(line)
            size += len(line[1])
            separators += line[1].count(separator.encode())
            if size > text_lines.LONGEST:
                raise WrongText(f"longer than {text_lines.LONGEST} bytes")
            if len(taken) > MOST_LINES:
                raise WrongText(f"more than {MOST_LINES} lines")
            if separators > MOST_SEPARATORS:
                name = "commas" if separator == "," else "tabs"
                raise WrongText(f"more than {MOST_SEPARATORS} {name}")
            yield decode(line[1])

    try:
        # The reader takes as many lines as an open quote needs; `take` keeps them for a second
        # reading.
        values = next(csv.reader(take(), delimiter=separator, strict=True), [])
        wrong = _width_fault(len(values), width) if values else ""
    except csv.Error as error:
        values, wrong = [], f"not {'CSV' if separator == ',' else 'TSV'}: {error}"
    except WrongText as error:
        values, wrong = [], str(error)

    if not taken or not (values or wrong):
        return taken, None
    text = b"".join(raw for _, raw in taken).decode(errors="replace")
    return taken, Record(taken[0][0], text.rstrip("\r\n"), values, wrong)


def _is_quoted_tsv(path: str) -> bool:
    """Return whether the quotes of a TSV file enclose its texts."""
    evident, odd, header = 0, 0, ""
    for record in _quoted_records(path, "\t", _Width()):
        header = header or record.text
        columns = header.count("\t") + 1
        if '"' not in record.text:
            continue

        # Odd: a quote that is not closed, or one in the middle of a text.
        is_closed = not record.wrong and not _hidden_lines(record.text, "\t", columns)
        if not is_closed or not _QUOTED_ROW.fullmatch(record.text):
            odd += 1
        elif (
            '""' in record.text
            or len(record.values) < record.text.count("\t") + 1
            or "\n" in record.text
        ):
            evident += 1

    # A program that quotes everything quotes the header, too.
    if header.startswith('"') and header.endswith('"'):
        evident += 1

    # A few rows of the other kind are typing errors. More of them leave it open which quotes are
    # part of the texts.
    if evident and odd and not MOST_ODD * odd > evident and not MOST_ODD * evident > odd:
        raise UserError(
            f"{path}: {evident} rows have quoted texts with doubled quotes and {odd} rows have "
            "single quotes; write it as .jsonl, or as .csv"
        )
    return evident > odd
