"""Check what an array_record file declares, before one of its records is decoded.

An array_record file is a Riegeli file: chunks of compressed rows, one behind the other. The last 64
KiB say where the footer is, and the footer where each chunk is. The library believes all of it: a
file of 128 KiB may hold a row of a gigabyte, and a number that leads out of an array ends the
process.
Sources: riegeli_records_file_format.md of Riegeli; layout.proto of array_record.
"""

import os
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from gqa.data import varints
from gqa.runtime import regular_files

# Every block of a file begins with a header, which may stand in the middle of a chunk.
BLOCK, BLOCK_HEADER = 1 << 16, 24
PAYLOAD = BLOCK - BLOCK_HEADER

# Bytes that a chunk may have, in the file and decoded. TFDS writes one row as one chunk, and a row
# of text has kilobytes.
MOST_CHUNK = 1 << 26
# Bytes of a footer, in the file and decoded. It has about 10 for each chunk.
MOST_FOOTER = 1 << 25

# The tags of a record about a chunk: its place, its decoded bytes and its rows.
TAGS = (1 << 3, 2 << 3, 3 << 3)


class WrongRecords(ValueError):
    """A file that is damaged or declares more than is allowed; the message says which."""


class _Chunk(NamedTuple):
    """The header of a chunk.

    Args:
        place: where its data begins, in bytes of the file without the headers of blocks.
        stored: bytes of its data in the file.
        kind: "r" for rows that stand one behind the other.
        rows: the number of rows.
        decoded: bytes of all rows when they are decoded.
    """

    place: int
    stored: int
    kind: str
    rows: int
    decoded: int


class RecordFile:
    """An array_record file, with the places of its chunks: 8 bytes a chunk, as the library keeps.

    Args:
        path: the file.

    Raises:
        WrongRecords: naming the file, if its footer is damaged or declares more than it holds.
        UserError: if it is no regular file.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        with regular_files.open_regular(path) as file:
            try:
                self._read_footer(file)
            except (LookupError, TypeError) as error:
                raise WrongRecords(f"{path}: its footer is damaged") from error

    def _read_footer(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        sizes, records = _records(file, _chunk(file, size - BLOCK), BLOCK)
        end = _message(records[: int(sizes[0])])[1]

        # The library reads all of the file from the footer to the last block.
        region = size - BLOCK - end
        if not 0 < region <= MOST_FOOTER:
            raise WrongRecords(f"{self._path}: its footer has {region:,} bytes")
        sizes, records = _records(file, _chunk(file, end), region)

        # The first record is about the whole file: its field 1 is a message, of which 2 is the
        # number of chunks. Each of the others is about one chunk.
        first = int(sizes[0])
        number = _message(_message(records[:first])[1]).get(2, 0)
        numbers, lengths = _varints(records[first:])
        if not number == len(sizes) - 1 == len(numbers) / len(TAGS) / 2:
            raise LookupError("not one record for each chunk")
        fields = numbers.reshape(number, len(TAGS), 2)
        if (fields[..., 0] != TAGS).any() or (
            lengths.reshape(number, 2 * len(TAGS)).sum(1) != sizes[1:]
        ).any():
            raise LookupError("a record without a place")

        # All chunks have as many rows as the first, but for the last.
        self._places = np.append(fields[:, 0, 1], np.uint64(end))
        self._rows = int(fields[0, 2, 1]) if number else 1
        if not self._rows:
            raise LookupError("a chunk without rows")

    def check(self, row: int) -> None:
        """Check the chunk that holds a row.

        Raises:
            WrongRecords: naming the file, if the chunk is damaged or declares more than is allowed.
        """
        index = row // self._rows
        if index + 1 >= len(self._places):
            raise WrongRecords(f"{self._path}: row {row} is in no chunk")
        begin, end = map(int, self._places[index : index + 2])
        with regular_files.open_regular(self._path) as file:
            try:
                chunk = _chunk(file, begin)
            except LookupError as error:
                raise WrongRecords(f"{self._path}: the chunk of row {row} is damaged") from error

        # The library reads all of the file up to the next chunk, and makes a list of all rows.
        largest = max(end - begin, chunk.decoded, 8 * chunk.rows)
        if largest > MOST_CHUNK:
            raise WrongRecords(f"{self._path}: the chunk of row {row} declares {largest:,} bytes")
        if chunk.kind != "r" or not chunk.stored < end - begin:
            raise WrongRecords(f"{self._path}: the chunk of row {row} is damaged")


def _records(file: BinaryIO, chunk: _Chunk, most: int) -> tuple[np.ndarray, bytes]:
    """Return the sizes of a chunk's records, and the records one behind the other.

    Raises:
        LookupError: if the chunk is damaged, or has more than `most` bytes in the file or
            MOST_FOOTER decoded.
    """
    if chunk.kind != "r" or chunk.stored > most or max(chunk.decoded, chunk.rows) > MOST_FOOTER:
        raise LookupError("not a chunk of records, or a large one")
    data = _read(file, chunk.place, chunk.stored)

    # One byte for the compression, the bytes of all sizes together, the sizes, the records.
    length, begin = varints.read(data, 1)
    parts = [data[begin : begin + length], data[begin + length :]]
    if data[0]:
        parts = [_decompressed(part, data[0], 10 * chunk.rows + chunk.decoded) for part in parts]
    sizes, _ = _varints(parts[0])
    if not 0 < len(sizes) == chunk.rows or not sizes.sum() == len(parts[1]) == chunk.decoded:
        raise LookupError("not one size for each record")
    return sizes, parts[1]


def _decompressed(part: bytes, compression: int, most: int) -> bytes:
    """Return what a part of a chunk decompresses to; its size stands before it."""
    size, begin = varints.read(part, 0)
    if chr(compression) != "z" or size > most:
        raise LookupError("not compressed with zstd, or larger than the chunk")
    try:
        return pa.decompress(part[begin:], size, codec="zstd", asbytes=True)
    except (OSError, pa.ArrowException) as error:
        raise LookupError("not what zstd writes") from error


def _varints(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return all numbers in a sequence of them (see `gqa.data.varints`), and the bytes of each."""
    array = np.frombuffer(data, np.uint8)
    if not len(array):
        return np.zeros(0, np.uint64), np.zeros(0, np.int32)

    # The last byte of a number is below 128.
    ends = np.flatnonzero(array < 128).astype(np.int32) + 1
    lengths = np.diff(ends, prepend=0)
    if array[-1] >= 128 or lengths.max() > 9:
        raise LookupError("numbers that are damaged, or have more than 63 bits")

    # Byte k of a number holds the bits from 7 k on.
    starts = ends - lengths
    k = np.arange(len(array), dtype=np.int32) - np.repeat(starts, lengths)
    bits = (array & 127).astype(np.uint64) << (7 * k).astype(np.uint8)
    return np.add.reduceat(bits, starts), lengths


def _chunk(file: BinaryIO, place: int) -> _Chunk:
    """Read the header of the chunk that begins at a place of the file.

    Raises:
        LookupError: if the place is none, or the file ends before the header does.
    """
    if not 0 <= place < os.fstat(file.fileno()).st_size:
        raise LookupError("outside of the file")

    # Where a block begins, its header stands before the chunk's.
    begin = place // BLOCK * PAYLOAD + max(place % BLOCK - BLOCK_HEADER, 0)
    _, stored, _, kind_and_rows, decoded = struct.unpack("<5Q", _read(file, begin, 40))
    return _Chunk(begin + 40, stored, chr(kind_and_rows & 255), kind_and_rows >> 8, decoded)


def _read(file: BinaryIO, place: int, count: int) -> bytes:
    """Read `count` bytes at a place of the file, both without the headers of blocks.

    Raises:
        LookupError: if the file ends before.
    """
    pieces = []
    while count:
        block, offset = divmod(place, PAYLOAD)
        file.seek(block * BLOCK + BLOCK_HEADER + offset)
        piece = file.read(min(count, PAYLOAD - offset))
        if not piece:
            raise LookupError("the file ends")
        pieces.append(piece)
        place, count = place + len(piece), count - len(piece)
    return b"".join(pieces)


def _message(data: bytes) -> dict[int, Any]:
    """Return the fields of a protocol buffer by their numbers: whole numbers, or bytes."""
    fields: dict[int, Any] = {}
    place = 0
    while place < len(data):
        tag, place = varints.read(data, place)
        if tag & 7 not in (0, 2):
            raise LookupError("a field of another type")
        value, place = varints.read(data, place)
        if tag & 7 == 2:
            fields[tag >> 3] = data[place : place + value]
            place += value
        else:
            fields[tag >> 3] = value
    return fields
