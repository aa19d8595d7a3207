"""Check what the messages of an Arrow stream declare, before Arrow allocates memory for them.

A message is a header, a FlatBuffers table, and a body with the bytes of the columns. A header may
declare 2^31 rows of nothing, or a body that decompresses to any size; Arrow believes it.
Source: "Serialization and Interprocess Communication" of Arrow's columnar format.
"""

import os
import struct
from typing import BinaryIO

from gqa.data import text_lines

CONTINUATION = 0xFFFFFFFF
DICTIONARY_BATCH, RECORD_BATCH = 2, 3


class WrongMessages(ValueError):
    """A stream that is damaged, compressed, or declares more than it holds."""


def check(file: BinaryIO) -> None:
    """Check all messages of a stream; the file is left at its beginning.

    Raises:
        WrongMessages: if a message is damaged or compressed, or declares more rows than its body
            has bytes.
    """
    size = os.fstat(file.fileno()).st_size
    place = 0
    while place < size:
        file.seek(place)
        try:
            (length,) = struct.unpack("<I", file.read(4))
            place += 4
            if length == CONTINUATION:  # streams before version 0.15 lack it
                (length,) = struct.unpack("<I", file.read(4))
                place += 4

            # A length of 0 marks the end of the stream.
            if not length:
                break

            # The length may be any number up to 4 GiB, so it is checked before so many bytes are
            # read.
            if length > min(text_lines.LONGEST, size - place):
                raise WrongMessages("a header is longer than the file")
            body = _check_message(file.read(length))
        except struct.error as error:
            raise WrongMessages("a header is damaged") from error
        if not 0 <= body <= size - place - length:
            raise WrongMessages("a body is longer than the file")
        place += length + body
    file.seek(0)


def _check_message(data: bytes) -> int:
    """Check one header; return the bytes of its body."""
    # Fields by their numbers in Arrow's Message.fbs. A message: 1 kind of header, 2 header, 3 bytes
    # of the body. A dictionary batch: 1 the record batch with its texts. A record batch: 0 rows, 1
    # rows of each column, 3 compression.
    message = _Table(data, *struct.unpack_from("<I", data, 0))
    kind, body = message.number(1, "<B"), message.number(3, "<q")
    batch = message.table(2) if kind in (DICTIONARY_BATCH, RECORD_BATCH) else None
    if batch is not None and kind == DICTIONARY_BATCH:
        batch = batch.table(1)
    if batch is None:
        return body

    if batch.place_of(3) is not None:
        raise WrongMessages("compressed; save it without compression, or as Parquet")
    # A row of text has bytes, or at least the place where its text begins. So has an element of a
    # list. Only columns of nothing have no bytes, and nobody trains on them.
    for rows in (batch.number(0, "<q"), *batch.lengths(1)):
        if not 0 <= rows <= max(body, 0):
            raise WrongMessages(f"declares {rows:,} rows in {body:,} bytes")
    return body


class _Table:
    """A table of FlatBuffers: a list of places, one for each field that is there."""

    def __init__(self, data: bytes, place: int):
        self._data, self._place = data, place

        # A table begins with the distance back to its list of places; the list begins with its own
        # size.
        (back,) = struct.unpack_from("<i", data, place)
        self._fields = place - back
        if self._fields < 0:
            raise WrongMessages("a header is damaged")
        (self._size,) = struct.unpack_from("<H", data, self._fields)

    def place_of(self, field: int) -> int | None:
        """Return where a field stands; None if it is not there."""
        # The list has 4 bytes of sizes, then 2 bytes for each field: 0 if the field is not there.
        # Fields beyond the end of the list are not there either.
        if 4 + 2 * field + 2 > self._size:
            return None
        (step,) = struct.unpack_from("<H", self._data, self._fields + 4 + 2 * field)
        return self._place + step if step else None

    def number(self, field: int, form: str) -> int:
        """Return a number; 0 if it is not there."""
        place = self.place_of(field)
        return 0 if place is None else struct.unpack_from(form, self._data, place)[0]

    def table(self, field: int) -> "_Table | None":
        """Return a table inside this one; None if it is not there."""
        place = self._target(field)
        return None if place is None else _Table(self._data, place)

    def lengths(self, field: int) -> list[int]:
        """Return the first of the two numbers of each element: the rows of each column."""
        place = self._target(field)
        if place is None:
            return []
        (count,) = struct.unpack_from("<I", self._data, place)

        # An element has two numbers of 8 bytes. More elements than the header can hold would make a
        # list as long as the file claims.
        if 16 * count > len(self._data):
            raise WrongMessages("a header is damaged")
        return [struct.unpack_from("<q", self._data, place + 4 + 16 * i)[0] for i in range(count)]

    def _target(self, field: int) -> int | None:
        place = self.place_of(field)
        return None if place is None else place + struct.unpack_from("<I", self._data, place)[0]
