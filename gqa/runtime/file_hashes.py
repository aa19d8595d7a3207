"""Hash the contents of files, and remember a hash for as long as its file is unchanged.

Hashes of large files are remembered on disk too, in a private folder of the user: a checkpoint of
tens of gigabytes is hashed once, and not by every command that names it.
"""

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path

from gqa.runtime import atomic_files, private_folders, regular_files
from gqa.runtime.errors import UserError

# Seconds that a file must have been left alone before its hash is remembered. Two changes within
# one tick of the file system's clock leave the same time, and may leave the same size.
SETTLED = 0.1
# A file of so many bytes takes about 0.1 s to hash. Smaller ones are not worth a file on disk.
LARGE = 2**26

_remembered: dict[tuple[int, ...], str] = {}


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a regular file's bytes.

    The file is read again only if its size, times or inode have changed since the last call, or
    since the last call of any process of this user if the file is large.

    Raises:
        UserError: naming the path, if it cannot be read or is no regular file.
    """
    with regular_files.open_regular(path) as file:
        before, now = _signature(file.fileno()), time.time_ns()
        if before in _remembered:
            return _remembered[before]

        place = _place(before) if before[2] >= LARGE else None
        digest = _read(place) if place else None
        if digest is None:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

            # Remember nothing of a file that changed while it was hashed, or so recently that its
            # next change could leave the same times.
            if _signature(file.fileno()) == before and now - max(before[-2:]) > SETTLED * 1e9:
                _remembered[before] = digest
                if place:
                    _keep(place, digest)
    return digest


def _place(signature: tuple[int, ...]) -> Path | None:
    """Return where the hash of a file is kept on disk; None where no folder can be made."""
    try:
        folder = private_folders.in_cache("hashes")
        private_folders.make_private(folder)
    except (OSError, RuntimeError, UserError):
        return None
    return folder / hashlib.sha256(repr(signature).encode()).hexdigest()


def _read(place: Path) -> str | None:
    try:
        content = regular_files.read_bytes(place, 64).decode(errors="replace")
    except UserError:
        return None
    # Anything else is a damaged file, as after a crash: the hash is computed again.
    return content if re.fullmatch("[0-9a-f]{64}", content) else None


def _keep(place: Path, digest: str) -> None:
    with contextlib.suppress(OSError):  # the file is hashed again next time
        atomic_files.write(place, digest)


def _signature(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)

    # Nobody can set back the time of the last change of status, unlike that of the contents.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
