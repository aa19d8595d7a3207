"""Tables as Markdown and as plain text, and numbers with the right unit."""

import math
import textwrap

from experiments.report import safe_text

DASH = "-"
NARROWEST = 20  # characters of a wrapped first column
# Of the HTML page (`html_page.STYLE`): pixels of its text's width, of a character of a table, and
# of a cell's padding. A cell longer than WRAPPED characters takes several lines.
PAGE_PIXELS, PIXELS, PADDING, WRAPPED = 1200, 7.2, 23, 28


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose columns also line up in its source.

    Cells are plain text: what Markdown would take for markup is escaped. A table that is wider than
    a page becomes several, each of which repeats the first column.
    """
    columns = [list(column) for column in zip(header, *rows, strict=True)]
    pages = [[columns[0]]]
    for column in columns[1:]:
        if len(pages[-1]) > 1 and sum(map(_pixels, [*pages[-1], column])) > PAGE_PIXELS:
            pages.append([columns[0]])
        pages[-1].append(column)
    return "\n\n".join(_markdown_page(columns) for columns in pages)


def _pixels(column: list[str]) -> float:
    """Estimate the width of a column on the HTML page, where long cells are wrapped."""
    return PIXELS * min(max(map(len, column)), WRAPPED) + PADDING


def _markdown_page(columns: list[list[str]]) -> str:
    columns = [[safe_text.markdown(cell) for cell in column] for column in columns]
    widths = [max(map(len, column)) for column in columns]
    header, *rows = zip(*columns, strict=True)
    rule = ["-" * width for width in widths]
    lines = [_padded(cells, widths, " | ") for cells in (header, rule, *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def plain(header: list[str], rows: list[list[str]], width: int = 100) -> str:
    """Return the table in blocks of at most `width` characters; each repeats the first column.

    If it makes one block of the table, long cells of the first column are wrapped.
    """
    # Names come from files, and a terminal would obey the control codes in them.
    header, *rows = [[safe_text.visible(cell) for cell in row] for row in (header, *rows)]
    room = width - sum(max(map(len, column)) + 2 for column in zip(*[header, *rows], strict=True))
    room += max(len(row[0]) for row in (header, *rows)) + 2
    if room >= NARROWEST:
        rows = [line for row in rows for line in _wrapped(row, room)]

    columns = [list(column) for column in zip(header, *rows, strict=True)]
    blocks = [[columns[0]]]

    # Two spaces stand between columns, and none after the last one.
    for column in columns[1:]:
        if sum(max(map(len, c)) + 2 for c in [*blocks[-1], column]) - 2 > width:
            blocks.append([columns[0]])
        blocks[-1].append(column)
    return "\n\n".join(_block(block) for block in blocks)


def _wrapped(row, width):
    """Return a row as one line, or as several whose other cells are empty after the first."""
    parts = textwrap.wrap(row[0], width, subsequent_indent="  ", break_on_hyphens=False)
    first, *more = parts or [""]
    return [[first, *row[1:]], *([part, *[""] * (len(row) - 1)] for part in more)]


def _block(columns):
    widths = [max(map(len, column)) for column in columns]
    header, *rows = zip(*columns, strict=True)
    lines = [_padded(header, widths, "  "), "-" * (sum(widths) + 2 * len(widths) - 2)]
    return "\n".join(line.rstrip() for line in [*lines, *(_padded(r, widths, "  ") for r in rows)])


def _padded(cells, widths, separator):
    return separator.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))


def count(value: float) -> str:
    """Format a number of parameters: 11.1B, 77.0M."""
    return _scaled(value, 1000, ("", "K", "M", "B", "T"))


def size(value: float) -> str:
    """Format a number of bytes: 256 KiB."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def seconds(value: float) -> str:
    """Format a duration: 1.52 ms."""
    if value < 1e-3:
        return _three_digits(value * 1e6) + " us"
    return _three_digits(value * 1e3) + " ms" if value < 1 else _three_digits(value) + " s"


def _scaled(value, step, suffixes):
    # For example, 262144 bytes are divided by 1024 once: "256 KiB". The last suffix takes all that
    # is larger.
    power = 0
    while value >= step and power < len(suffixes) - 1:
        value, power = value / step, power + 1
    return (_three_digits(value) if power else f"{value:.0f}") + suffixes[power]


def _three_digits(value):
    """Round to three significant digits, never in scientific notation."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 2)}f}"
