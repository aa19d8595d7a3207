"""Lines of a text file from anybody: regular files only, decompressed up to a bound.

`gqa.data.file_formats` makes rows of the lines.
"""

import bz2
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from gqa.runtime import regular_files
from gqa.runtime.errors import UserError

# Bytes of a line, a paragraph or a row. What is longer is never held in memory.
LONGEST = 1 << 24

# A line of more than this many times LONGEST is no text: a sparse file, or a disk image.
MOST_PIECES = 64

# A compressed file may give this many bytes for each of its bytes. Text rarely gives 50; a file of
# one letter gives 1000 with gzip, and far more with other programs.
EXPANSION = 200

# What a small file may give in any case, in bytes.
SMALL = 1 << 26

COMPRESSIONS = (".gz", ".bz2", ".zst")


class WrongText(ValueError):
    """A line or a row that cannot be read; the message says why."""


def allowed_bytes(path: str | os.PathLike) -> int:
    """Return how many bytes the contents of a compressed file may have."""
    return max(SMALL, EXPANSION * os.path.getsize(path))


def chunks(path: str, size: int = 1 << 16) -> Iterator[bytes]:
    """Yield the contents of a file, decompressed, in pieces of at most `size` bytes.

    Raises:
        UserError: naming the file, if it is no regular file, is damaged or expands too much.
    """
    with regular_files.open_regular(path) as file:
        yield from _checked(path, file, lambda stream: stream.read(size))


def lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a file with their line ends, without a byte order mark.

    Of a line that is longer than LONGEST, its first LONGEST + 1 bytes are given.

    Raises:
        UserError: naming the file, if it is no regular file, is damaged, expands too much, or has
            line ends of CR alone.
    """
    number, pieces = 0, 0
    with regular_files.open_regular(path) as file:
        for piece in _checked(path, file, lambda stream: stream.readline(LONGEST + 1)):
            # A file with such line ends would be one line, and a text of it one paragraph.
            if number == 0 and b"\n" not in piece and b"\r" in piece.rstrip(b"\r"):
                raise UserError(
                    f"{path}: its lines end in CR alone; convert them, such as with "
                    "`tr '\\r' '\\n' < OLD > NEW`"
                )
            if not pieces:
                number += 1
                yield number, piece.removeprefix(b"\xef\xbb\xbf") if number == 1 else piece

            # The rest of a line that is too long is read, to find where the next line begins.
            is_whole = len(piece) <= LONGEST or piece.endswith(b"\n")
            pieces = 0 if is_whole else pieces + 1
            if pieces > MOST_PIECES:
                raise UserError(f"{path}:{number}: a line of over 1 GiB; use a text file")


def decode(raw: bytes) -> str:
    """Return a line as text.

    Raises:
        WrongText: if it is too long or not UTF-8.
    """
    if len(raw) > LONGEST:
        raise WrongText(f"longer than {LONGEST} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise WrongText("not UTF-8 text") from error


def _checked(path, file: BinaryIO, read) -> Iterator[bytes]:
    """Yield what `read` takes from the decompressed file until nothing is left."""
    compression = next((end for end in COMPRESSIONS if str(path).lower().endswith(end)), "")
    allowed = allowed_bytes(path)
    total = 0
    try:
        stream = _decompressed(file, compression)
        while piece := read(stream):
            total += len(piece)
            if compression and total > allowed:
                raise UserError(
                    f"{path}: expands to more than {EXPANSION} times its size; decompress it, and "
                    "name the decompressed file if it is what you expect"
                )
            yield piece
    except (gzip.BadGzipFile, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{path}: {_damage(compression, total)}") from error
    except OSError as error:
        # bz2 and Arrow raise this for damaged contents, with no number; a disk's has one.
        raise UserError(f"{path}: {error.strerror or _damage(compression, total)}") from error


def _decompressed(file: BinaryIO, compression: str):
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".bz2":
        return bz2.BZ2File(file)
    if compression == ".zst":
        # Arrow's stream has no `readline`, which `lines` needs; the buffer has it.
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))
    return file


def _damage(compression: str, total: int) -> str:
    return f"not a whole {compression} file: it is damaged behind {total:,} bytes of its contents"
