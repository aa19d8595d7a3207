"""Measure the nodes of an OCDBT database before TensorStore decodes them.

OCDBT is the format in which Orbax keeps many arrays in few files. TensorStore decompresses a node
as a whole, and then writes out all its names: a name is stored as the number of characters that it
shares with the name before it, and the rest. 350 KB of names that each add one letter to the one
before so become gigabytes. The names of a node also share the beginning that the node above gives
them. This file counts all of these and decodes no name. `stored_arrays` measures the arrays.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow

from gqa.runtime import hardware, regular_files
from gqa.runtime.errors import CheckpointError

# Every object of a file begins with one of these, then its length, version and compression. The
# first is a manifest, the second a node of names and values, the third a node of versions.
MAGIC = re.compile(rb"\x0c\xdb(?:\x3a\x2a|\x20\xde|\x12\x34)")
NAMES_MAGIC = b"\x0c\xdb\x20\xde"

# Orbax lets a node have 10^8 bytes at most, the default of OCDBT is 2^23.
MAX_NODE_BYTES = 2**27
# A manifest lists a few versions. Its names of files are not counted, because so few bytes cannot
# stand for many.
MAX_MANIFEST_BYTES = 2**16
# All names of a database, and what a name takes beside its characters. A million arrays fit.
MAX_NAMES_BYTES = 2**27
NAME_COST = 64
PIECE = 2**20  # bytes that are decompressed at a time


class _Node(NamedTuple):
    """An object of OCDBT in a file, without its magic and its length.

    The rest is two numbers, the content and a checksum.
    """

    has_names: bool
    start: int
    length: int


class _Names(NamedTuple):
    """The names in nodes, as many as they take once they are decoded.

    Args:
        nbytes: of the names without what the node above gives them.
        number: of the names.
        given: by the height of a node, the longest beginning that it gives the nodes below.
    """

    nbytes: float
    number: float
    given: dict[int, float]

    def plus(self, other: "_Names") -> "_Names":
        """Return these names and others."""
        given = dict(self.given)
        for height, longest in other.given.items():
            given[height] = max(longest, given.get(height, 0.0))
        return _Names(self.nbytes + other.nbytes, self.number + other.number, given)

    @property
    def decoded(self) -> float:
        """Bytes of all names, at most, and of what holds them."""
        return self.nbytes + self.number * (NAME_COST + sum(self.given.values()))


def check(folder: Path) -> None:
    """Check the files of an OCDBT database; call it before the database is opened.

    Raises:
        CheckpointError: naming the file with a node larger than MAX_NODE_BYTES, or with which the
            names have more than MAX_NAMES_BYTES.
        UserError: naming a file that is larger than this machine's memory.
    """
    names = _Names(0.0, 0.0, {})
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with regular_files.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            # A value has as many bytes as the database says, if its file has them: a file without
            # contents may seem to have terabytes.
            if size > MAX_NODE_BYTES:
                hardware.check_memory(size, str(path))
            for node in _nodes(file, size):
                most = MAX_NODE_BYTES if node.has_names else MAX_MANIFEST_BYTES
                content = _content(file, node, most) if node.length <= most else None
                if content is None:
                    raise CheckpointError(
                        f"{path}: a node of its database has more than {most:,} bytes when it is "
                        "decompressed; use another checkpoint"
                    )

                names = names.plus(_names(content)) if node.has_names else names
                if names.decoded > MAX_NAMES_BYTES:
                    raise CheckpointError(
                        f"{path}: the names in its database have more than {MAX_NAMES_BYTES:,} "
                        "bytes when they are decoded; use another checkpoint"
                    )


def _content(file: BinaryIO, node: _Node, most: int) -> bytes | None:
    """Return the decompressed content of a node; None if it has more than `most` bytes.

    It is empty for other data that happen to look like a node, and for a damaged one.
    """
    file.seek(node.start)
    stored = file.read(node.length)
    version_end = _varint_end(stored, 0)
    method_end = _varint_end(stored, version_end)

    # The last 4 bytes are the checksum. The compression 0 is none, 1 is zstd.
    content = stored[method_end:-4]
    if not _is_one(stored[version_end:method_end]):
        return content

    pieces, total = [], 0
    try:
        stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd")
        while piece := stream.read(PIECE):
            total += len(piece)
            if total > most:
                return None
            pieces.append(piece)
    except OSError:
        return b""
    return b"".join(pieces)


def _names(content: bytes) -> _Names:
    """Return the names in a node; none if it is no whole node.

    A node begins with its height, one byte. Then come the names of the files that it refers to, and
    its keys. Both are tables: a count, the shared characters of each name but the first, the other
    characters of each name, another number for each, and the other characters themselves.
    """
    numbers = np.frombuffer(content, np.uint8)
    try:
        # The other number is the length of a file's folder, or of the beginning that a key gives to
        # the node below. At height 0 there is none below.
        files, _, end = _table(numbers, 1, True)
        keys, given, _ = _table(numbers, end, content[0] > 0)
    except (ValueError, IndexError):
        return _Names(0.0, 0.0, {})
    return _Names(files.nbytes + keys.nbytes, files.number + keys.number, {content[0]: given})


def _table(numbers: np.ndarray, start: int, has_more: bool) -> tuple[_Names, float, int]:
    """Return the names of a table, the largest of their other numbers, and where the table ends.

    Args:
        numbers: [n], the bytes of a node.
        start: the table's first byte.
        has_more: whether there is another number for each name.

    Raises:
        ValueError: if the node ends before.
    """
    (count,), end = _varints(numbers, start, 1)
    shared, end = _varints(numbers, end, max(count - 1, 0))
    rest, end = _varints(numbers, end, count)
    more, end = _varints(numbers, end, count if has_more else 0)
    names = _Names(float(shared.sum() + rest.sum()), float(count), {})
    return names, float(more.max(initial=0)), end + int(min(rest.sum(), len(numbers)))


def _varints(numbers: np.ndarray, start: int, count: float) -> tuple[np.ndarray, int]:
    """Return `count` numbers of variable length as floats, and where they end.

    Raises:
        ValueError: if there are not so many.
    """
    count = int(min(count, len(numbers) + 1))
    if not count:
        return np.zeros(0), start

    # The highest bit of a byte says that another byte of the number follows.
    last = np.flatnonzero(numbers[start:] < 0x80)[:count]
    if len(last) < count:
        raise ValueError("the node ends inside its numbers")
    first = np.append(0, last[:-1] + 1)
    stop = int(last[-1]) + 1

    # Each byte has 7 bits of its number, the lowest first. A number of more bits than a length can
    # have stays a large one.
    place = np.arange(stop) - np.repeat(first, last - first + 1)
    digits = (numbers[start : start + stop] & 0x7F) * 128.0 ** np.minimum(place, 20)
    return np.add.reduceat(digits, first), start + stop


def _nodes(file: BinaryIO, size: int) -> Iterator[_Node]:
    """Yield everything that may be an object of OCDBT.

    Objects may lie anywhere in a file, so every place with the magic bytes is taken. Other data
    have these bytes by chance every few gigabytes, and the bytes behind them are not zstd.
    """
    offset = 0
    while offset < size:
        file.seek(offset)
        piece = file.read(2**24)
        if len(piece) < 16:
            return
        for match in MAGIC.finditer(piece, 0, len(piece) - 12):
            length = int.from_bytes(piece[match.end() : match.end() + 8], "little")
            start = offset + match.end() + 8
            if 16 <= length <= size - offset - match.start():
                yield _Node(match[0] == NAMES_MAGIC, start, length - 12)
        # The last bytes are searched again, because magic and length may lie across two pieces.
        offset += len(piece) - 15


def _varint_end(content: bytes, start: int) -> int:
    # The highest bit of a byte says that another byte follows.
    end = start
    while end < len(content) and content[end] & 0x80:
        end += 1
    return end + 1


def _is_one(varint: bytes) -> bool:
    # A number may be written with more bytes than it needs, so 0x81 0x00 is 1 as well.
    return bool(varint) and varint[0] & 0x7F == 1 and not any(x & 0x7F for x in varint[1:])
