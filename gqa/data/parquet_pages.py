"""Check what the pages of a Parquet file decompress to, before one of them is decompressed.

The sizes in the file's footer are no help, because whoever wrote the file may have written any
number there. The header of each page has the size of the buffer that a reader allocates.
"""

from typing import Any, BinaryIO

import pyarrow.parquet

from gqa.data import varints

# Bytes of a page header that are read. It holds two values of a column, for statistics.
HEADER = 1 << 20

# Values of a column that a small file may declare in any case.
FEW_VALUES = 1 << 20

# Bytes that a value counts as, because a null or an empty list takes none in the file but memory
# and time as a Python object.
VALUE_COST = 16


class WrongPages(ValueError):
    """Pages that are damaged, or that declare more than is allowed; the message says which."""


def largest_page(
    file: BinaryIO, metadata: pyarrow.parquet.FileMetaData, columns: set[int], allowed: int
) -> int:
    """Return the bytes of the largest decompressed page of some columns.

    Args:
        columns: places of the columns in the schema.
        allowed: bytes that all pages of a column may have together in a row group. Each of their
            values counts as VALUE_COST bytes, above FEW_VALUES.

    Raises:
        WrongPages: if pages are damaged or declare more than is allowed.
    """
    largest = 0
    for group in range(metadata.num_row_groups):
        for column in columns:
            chunk = metadata.row_group(group).column(column)

            # A dictionary page stands before the data pages. It expands like them, so it is
            # checked, too.
            begin = chunk.data_page_offset
            if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < begin:
                begin = chunk.dictionary_page_offset

            sizes, values = _pages(file, begin, begin + chunk.total_compressed_size)
            if sum(sizes) > allowed:
                raise WrongPages(f"column {chunk.path_in_schema} expands to {sum(sizes):,} bytes")

            # The footer and the pages may disagree, and a reader may allocate memory by either.
            if max(values, chunk.num_values) > max(FEW_VALUES, allowed // VALUE_COST):
                raise WrongPages(f"column {chunk.path_in_schema} declares {values:,} values")
            largest = max(largest, *sizes, 0)
    return largest


def _pages(file: BinaryIO, begin: int, end: int) -> tuple[list[int], int]:
    """Return the decompressed bytes of each page between two places, and their values together."""
    sizes, values = [], 0
    while begin < end:
        file.seek(begin)
        try:
            header, length = _struct(file.read(min(HEADER, end - begin)), 0, depth=0)

            # Fields by their numbers in parquet.thrift. A page header: 2 bytes of the page when it
            # is decompressed, 3 bytes in the file; then the header of a data page of version 1 (5)
            # or 2 (8), or of a dictionary page (7), whose field 1 is the number of values.
            size, compressed = header[2], header[3]
            content = header.get(5) or header.get(8) or header.get(7) or {}
            count = content.get(1, 0)
        except (LookupError, AttributeError, TypeError) as error:
            raise WrongPages(f"the page at byte {begin:,} is damaged") from error
        if min(size, compressed, count) < 0:
            raise WrongPages(f"the page at byte {begin:,} has a negative size")

        sizes.append(size)
        values += count
        begin += length + compressed
    return sizes, values


# --- Thrift's compact protocol: a struct is a sequence of fields, each with a type and a number ---


def _struct(data: bytes, place: int, depth: int) -> tuple[dict[int, Any], int]:
    """Read a struct; return its fields by number, and the place behind it."""
    if depth > 8:
        raise LookupError("structs nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while data[place]:
        # The upper half of the byte is the distance from the last field's number, the lower half
        # the type. A distance of 0 means that the number itself follows.
        step, kind = data[place] >> 4, data[place] & 15
        place += 1
        if step:
            number += step
        else:
            number, place = _integer(data, place)
        fields[number], place = _value(data, place, kind, depth)
    return fields, place + 1


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    # 3 is a byte, 4 to 6 are integers of 16 to 64 bits, 7 is a float, 8 a text and 12 a struct.
    # Page headers have no lists, sets and maps (9 to 11).
    if kind in (1, 2):  # the type of a boolean field is its value
        return kind == 1, place
    if kind == 3:
        return data[place], place + 1
    if kind in (4, 5, 6):
        return _integer(data, place)
    if kind == 7:
        return None, place + 8
    if kind == 8:
        length, place = varints.read(data, place)
        return None, place + length
    if kind == 12:
        return _struct(data, place, depth + 1)
    raise LookupError(f"a page header has no field of type {kind}")


def _integer(data: bytes, place: int) -> tuple[int, int]:
    """Read a number whose sign is its lowest bit: 0, 1, 2, 3 stand for 0, -1, 1, -2."""
    number, place = varints.read(data, place)
    return (number >> 1) ^ -(number & 1), place
