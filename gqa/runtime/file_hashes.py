"""Hash the contents of files, and remember a hash for as long as its file is unchanged."""

import hashlib
import os
import time

from gqa.runtime import regular_files

# Seconds that a file must have been left alone before its hash is remembered. Two changes within
# one tick of the file system's clock leave the same time, and may leave the same size.
SETTLED = 0.1

_remembered: dict[tuple[int, ...], str] = {}


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a regular file's bytes.

    The file is read again only if its size, times or inode have changed since the last call.

    Raises:
        UserError: naming the path, if it cannot be read or is no regular file.
    """
    with regular_files.open_regular(path) as file:
        before, now = _signature(file.fileno()), time.time_ns()
        if before in _remembered:
            return _remembered[before]
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if _signature(file.fileno()) == before and now - max(before[-2:]) > SETTLED * 1e9:
            _remembered[before] = digest
    return digest


def _signature(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    # Nobody can set back the time of the last change of status, unlike that of the contents.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
