"""The places of the members of a zip file, which are read without unpacking anything.

Only what torch.save writes is taken: members that are stored as they are, each under a name of its
own. A compressed member, which could unpack to any size, is refused. torch_files.py says what the
members mean.
"""

import os
import struct
from typing import BinaryIO, NamedTuple

from gqa.runtime.errors import CheckpointError

# The structures at the end of a zip file, and those of each member: signatures, and the fields that
# are read (PKWARE's APPNOTE, section 4.3).
END, END_FIELDS = b"PK\5\6", struct.Struct("<4x2x2x2xHLL2x")
LOCATOR, LOCATOR_FIELDS = b"PK\6\7", struct.Struct("<4x4xQ4x")
END_64, END_64_FIELDS = b"PK\6\6", struct.Struct("<4x8x2x2x4x4x8xQQQ")
ENTRY, ENTRY_FIELDS = b"PK\1\2", struct.Struct("<4x2x2xHH4x4xLLHHH2x2x4xL")
LOCAL, LOCAL_FIELDS = b"PK\3\4", struct.Struct("<4x22xHH")
MAX_COMMENT = 2**16  # bytes behind the end of the directory
MAX_DIRECTORY = 2**24  # bytes; a member of torch.save takes about 70
IS_ENCRYPTED = 1
EXTRA_64 = 1  # the extra field with sizes and places of 64 bits


class Member(NamedTuple):
    """A member of a zip file.

    Attributes:
        header: offset of the member's own header in the file, which its bytes follow.
    """

    name: str
    header: int
    nbytes: int


def members(file: BinaryIO) -> dict[str, Member]:
    """Return the members of a zip file by name.

    Raises:
        CheckpointError: if the file is no zip file, or not one that torch.save writes.
    """
    size = os.fstat(file.fileno()).st_size
    count, length, start = _directory_place(file, size)
    if length > MAX_DIRECTORY:
        raise CheckpointError(f"its directory has more than {MAX_DIRECTORY:,} bytes")
    if start + length > size:
        raise CheckpointError("its directory lies outside of the file; copy the file again")

    directory, found, position = _read(file, start, length), {}, 0
    for _ in range(count):
        member, position = _member(directory, position)
        if member.name in found:
            raise CheckpointError(f"has two members {member.name!r:.100}; save the model again")
        if member.header + member.nbytes > size:
            raise CheckpointError(f"member {member.name!r:.100} is cut off; copy the file again")
        found[member.name] = member
    return found


def start(file: BinaryIO, member: Member) -> int:
    """Return the offset of a member's first byte in the file.

    Raises:
        CheckpointError: if the member's header is damaged, or its bytes end outside of the file.
    """
    header = _read(file, member.header, LOCAL_FIELDS.size)
    if not header.startswith(LOCAL):
        raise CheckpointError(f"member {member.name!r:.100} has no header; copy the file again")
    first = member.header + LOCAL_FIELDS.size + sum(LOCAL_FIELDS.unpack(header))
    if first + member.nbytes > os.fstat(file.fileno()).st_size:
        raise CheckpointError(f"member {member.name!r:.100} is cut off; copy the file again")
    return first


def read(file: BinaryIO, member: Member, most: int) -> bytes:
    """Return the bytes of a member that has at most `most` of them.

    Raises:
        CheckpointError: if it has more, or is damaged.
    """
    if member.nbytes > most:
        raise CheckpointError(f"member {member.name!r:.100} has more than {most:,} bytes")
    return _read(file, start(file, member), member.nbytes)


def _directory_place(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Return the number of members, and the bytes and the offset of the directory of them."""
    # The file ends with a structure of fixed size and a comment that may be empty.
    tail_start = max(0, size - MAX_COMMENT - END_FIELDS.size)
    tail = _read(file, tail_start, size - tail_start)
    found = tail.rfind(END, 0, len(tail) - END_FIELDS.size + len(END))
    if found < 0:
        raise CheckpointError("ends without the directory of a zip file; copy the file again")

    # Files above 4 GB have a larger structure as well, whose place stands before the small one.
    end = tail_start + found
    locator_start = end - LOCATOR_FIELDS.size
    locator = _read(file, locator_start, LOCATOR_FIELDS.size) if locator_start >= 0 else b""
    if not locator.startswith(LOCATOR):
        return END_FIELDS.unpack_from(tail, found)
    (place,) = LOCATOR_FIELDS.unpack(locator)
    large = _read(file, min(place, size), END_64_FIELDS.size)
    if not large.startswith(END_64):
        raise CheckpointError("the directory of the zip file is damaged; copy the file again")
    return END_64_FIELDS.unpack(large)


def _member(directory: bytes, position: int) -> tuple[Member, int]:
    """Return the member that is described at a position of the directory, and the next position."""
    fields = directory[position : position + ENTRY_FIELDS.size]
    if len(fields) < ENTRY_FIELDS.size or not fields.startswith(ENTRY):
        raise CheckpointError("the directory of the zip file is damaged; copy the file again")
    flags, method, packed, nbytes, *lengths, header = ENTRY_FIELDS.unpack(fields)
    name_start = position + ENTRY_FIELDS.size
    extra_start = name_start + lengths[0]
    name = directory[name_start:extra_start].decode("utf-8", "replace")

    extra = directory[extra_start : extra_start + lengths[1]]
    nbytes, packed, header = _in_64_bits(extra, [nbytes, packed, header])
    if method or packed != nbytes or flags & IS_ENCRYPTED:
        raise CheckpointError(
            f"member {name!r:.100} is compressed or encrypted, which torch.save never does; "
            "save the model again"
        )
    return Member(name, header, nbytes), name_start + sum(lengths)


def _in_64_bits(extra: bytes, values: list[int]) -> list[int]:
    """Replace each value of all ones, which does not fit in 32 bits, by the next of 64 bits."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        field = extra[position + 4 : position + 4 + length]
        if kind == EXTRA_64:
            large = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            return [next(large, value) if value == 2**32 - 1 else value for value in values]
        position += 4 + length
    return values


def _read(file: BinaryIO, position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length)
