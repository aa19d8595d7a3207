"""Rows of Parquet files and Arrow streams.

What a file declares is checked before it is decoded, by `gqa.data.parquet_pages` and
`gqa.data.arrow_messages`. Offsets inside it are validated before they are followed.
"""

import itertools
from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.parquet

from gqa.data import arrow_messages, parquet_pages, text_lines
from gqa.runtime import regular_files
from gqa.runtime.errors import UserError

# Rows that become Python objects at a time.
MOST_ROWS = 1024

Rows = Iterator[tuple[int, dict]]


def read_parquet(path: str, columns: Collection[str]) -> Rows:
    """Yield the rows of a Parquet file.

    Raises:
        UserError: naming the file, if it is damaged, lacks a column or expands too much.
    """
    try:
        with (
            regular_files.open_regular(path) as source,
            pyarrow.parquet.ParquetFile(source, arrow_extensions_enabled=False) as file,
        ):
            names = _present(path, file.schema_arrow.names, columns)
            metadata = file.metadata

            # A column of objects or lists is stored as several leaves: the column `answers` as
            # `answers.text` and others. All leaves of a column are read, so all are checked.
            leaves = {
                i: metadata.schema.column(i).path
                for i in range(metadata.num_columns)
                if metadata.schema.column(i).path.partition(".")[0] in names
                or metadata.schema.column(i).path in names
            }

            page = parquet_pages.largest_page(
                source, metadata, {*leaves}, text_lines.allowed_bytes(path)
            )
            dictionaries = [name for i, name in leaves.items() if _has_dictionary(metadata, i)]

        # Texts that are kept once and used in many rows are not repeated until they are rows.
        with (
            regular_files.open_regular(path) as source,
            pyarrow.parquet.ParquetFile(
                source, read_dictionary=dictionaries, arrow_extensions_enabled=False
            ) as file,
        ):
            # A text may be as long as the largest page, and every row may repeat it. `count` rows
            # have at most SMALL bytes together.
            count = max(1, min(MOST_ROWS, text_lines.SMALL // max(page, 1)))

            # Arrow cannot join lists of dictionaries, as which texts are read, across row groups.
            batches = itertools.chain.from_iterable(
                file.iter_batches(count, row_groups=[group], columns=names)
                for group in range(file.num_row_groups)
            )
            yield from _rows(path, batches, names, count)
    except (pa.ArrowException, ValueError, MemoryError, OverflowError) as error:
        raise UserError(f"{path}: damaged or not Parquet: {error}") from error


def number_of_rows(path: str) -> int:
    """Return how many rows `read_parquet` yields, as the file's footer says.

    Raises:
        UserError: naming the file, if it is damaged.
    """
    try:
        with regular_files.open_regular(path) as source:
            metadata = pyarrow.parquet.read_metadata(source)
            return sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    except (pa.ArrowException, ValueError, MemoryError, OverflowError) as error:
        raise UserError(f"{path}: damaged or not Parquet: {error}") from error


def _has_dictionary(metadata: pyarrow.parquet.FileMetaData, column: int) -> bool:
    """Return whether a column can be read as a dictionary: it is one, and no part is a difference.

    Arrow cannot make a dictionary of values that are written as differences of one another.
    """
    chunks = [metadata.row_group(i).column(column) for i in range(metadata.num_row_groups)]
    encodings = {encoding for chunk in chunks for encoding in chunk.encodings}
    is_text = all(chunk.physical_type == "BYTE_ARRAY" for chunk in chunks)
    return is_text and not any(encoding.startswith("DELTA") for encoding in encodings)


def read_arrow(path: str, columns: Collection[str]) -> Rows:
    """Yield the rows of an Arrow stream, the format in which Hugging Face's `datasets` saves.

    Raises:
        UserError: naming the file, if it is damaged or compressed, lacks a column, or has a column
            of a type that no text needs.
    """
    try:
        with regular_files.open_regular(path) as source:
            arrow_messages.check(source)
            with pa.ipc.open_stream(source) as stream:
                names = _present(path, stream.schema.names, columns)
                for name in names:
                    _check_type(path, name, stream.schema.field(name).type)
                yield from _rows(path, stream, names, MOST_ROWS)
    except (pa.ArrowException, ValueError, MemoryError, OverflowError) as error:
        raise UserError(f"{path}: damaged or not an Arrow stream: {error}") from error


def _check_type(path: str, column: str, kind: pa.DataType) -> None:
    """Refuse types in which a few bytes stand for many rows, and types that others define."""
    if isinstance(kind, pa.BaseExtensionType) or (
        pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
        or pa.types.is_run_end_encoded(kind)
        or pa.types.is_union(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary_view(kind)
    ):
        raise UserError(
            f"{path}: column {column!r} has type {kind}; save it as text, or as lists of texts"
        )

    # In a list, a long text of a dictionary may be repeated a million times in one row.
    if pa.types.is_nested(kind) and any(
        pa.types.is_dictionary(kind.field(i).type) for i in range(kind.num_fields)
    ):
        raise UserError(f"{path}: column {column!r} has type {kind}; save its texts as they are")

    # Such a type may be hidden inside a list, an object or a dictionary.
    for i in range(kind.num_fields):
        _check_type(path, column, kind.field(i).type)
    if pa.types.is_dictionary(kind):
        _check_type(path, column, kind.value_type)


def _present(path: str, names: list[str], columns: Collection[str]) -> list[str]:
    """Return the columns to read; refuse a file that lacks one of `columns`."""
    # `answers.text` may be a column of this name, or the field `text` of a column `answers`.
    for column in columns:
        if column not in names and column.partition(".")[0] not in names:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(names)}")
    return [name for name in names if name in {c.partition(".")[0] for c in columns} | {*columns}]


def _rows(path: str, batches: Iterator[pa.RecordBatch], names: list[str], count: int) -> Rows:
    """Yield numbered rows, `count` of which become Python objects at a time."""
    number, total, allowed = 0, 0, text_lines.allowed_bytes(path)
    for batch in batches:
        batch = batch.select(names)
        batch.validate(full=True)  # an offset may point anywhere

        for start in range(0, len(batch), count):
            for row in batch.slice(start, count).to_pylist():
                number += 1

                # Dictionaries and runs of equal values let a small file stand for any amount of
                # text.
                total += _characters(row)
                if total > allowed:
                    raise UserError(
                        f"{path}: its texts are over {text_lines.EXPANSION} times as long as the "
                        "file; write them as .jsonl if they are what you expect"
                    )
                yield number, row


def _characters(value) -> int:
    """Return the number of characters of all texts in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 1
