"""Files from strangers: only regular files are opened, and JSON only up to a number of bytes.

A path may lead to a device that never ends, to a pipe that nobody writes to, or to a sparse file of
a terabyte, or out of the folder that it came in. Every reader of a file that somebody else may have
made opens it here, and so does whoever adds lines to one. Whole files are written by
`gqa.runtime.atomic_files`.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, cast

from gqa.runtime.errors import UserError

# The largest JSON file that is read: config.json and metadata have kilobytes. Parsed, 16 MiB of
# brackets become less than a gigabyte of Python's objects.
MAX_JSON_BYTES = 2**24


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file, or a link to one, to read its bytes.

    Raises:
        UserError: naming the path, if it cannot be opened or is a folder, a device or a pipe.
    """
    try:
        # A pipe without a writer would block the call that opens it, unless it is told not to.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error

    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
    raise UserError(f"{path}: is {kind}; use a regular file")


def open_to_append(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file to read it and to write at its end; make it if it is not there.

    Each `write` is one system call, so no bytes wait in memory.

    Raises:
        UserError: naming the path, if it is a link, a folder, a device or a pipe.
        OSError: if the file cannot be opened or made.
    """
    # O_NONBLOCK: a pipe or a device must be refused below, instead of making the open wait.
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: is a link, and nothing is written through it") from error
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise UserError(f"{path}: not a regular file; move it away") from error
        raise

    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file; move it away")
    return cast(BinaryIO, os.fdopen(descriptor, "a+b", buffering=0))


def read_bytes(path: str | os.PathLike, most: int = MAX_JSON_BYTES) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        UserError: naming the path, if it cannot be read or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            # Some files, such as those of /proc, say that they are empty and are not. Ask for one
            # byte more than is allowed, to learn whether there is one.
            content = file.read(most + 1) if size <= most else b""
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
    if max(size, len(content)) > most:
        raise UserError(f"{path}: has more than {most:,} bytes; use the right file")
    return content


def read_json(path: str | os.PathLike, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read the JSON object in a regular file of at most `most` bytes.

    Raises:
        UserError: naming the path, if it cannot be read, is larger, is nested too deeply, is no
            JSON, or holds something else than an object.
    """
    content = read_bytes(path, most)
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; use the right file") from error
    except ValueError as error:
        raise UserError(f"{path}: {error or 'no JSON'}; repair it, or copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; use the right file")
    return value


def list_inside(folder: Path, top: Path) -> list[Path]:
    """Return the files in `top`, a part of `folder`, and in its subfolders.

    A library that is given the folder would follow its links. A link to a file inside `folder` is a
    file; every other link is refused.

    Raises:
        UserError: naming a path that leads out of `folder`, or is neither a file nor a folder.
    """
    inside, files = folder.resolve(), []

    def check(path: Path) -> None:
        is_link = path.is_symlink()
        # What a link to a folder leads to would not be listed, so it is refused wherever it leads.
        is_strange = not path.is_file() and (is_link or not path.is_dir())
        if is_strange or (is_link and not path.resolve().is_relative_to(inside)):
            name = path.relative_to(folder)
            raise UserError(f"{name} is not a regular file of the folder; copy the file itself")

    if top != folder:
        check(top)
    for place, folders, names in os.walk(top):
        for name in sorted(folders + names):
            path = Path(place, name)
            check(path)
            files += [path] if path.is_file() else []
    return files
