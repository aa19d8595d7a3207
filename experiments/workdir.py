"""The workdir: making it, locking it for one process, and writing its files whole.

What lies in a stage's folder is in `experiments/stages/folder.py`.
"""

import contextlib
import errno
import fcntl
import os
import platform
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gqa.checkpoints import step_folders
from gqa.runtime import atomic_files
from gqa.runtime.distributed import is_primary
from gqa.runtime.errors import ConfigError, UserError

MAX_HOLDER = 200  # characters of a lock's file that a message shows


def make_workdir(workdir: Path) -> None:
    """Make the folder if it is not there.

    Raises:
        UserError: if the folder cannot be made or listed, has links that lead nowhere, or is one
            from which checkpoints could not be read.
    """
    step_folders.check_path(workdir, "--workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        links = [path for path in workdir.iterdir() if path.is_symlink()]
    except OSError as error:
        # A ConfigError shortens the path, which may be what is wrong with it.
        advice, reason = "use a folder to write to", f"cannot be used: {error.strerror}"
        raise ConfigError("--workdir", str(workdir), advice, reason) from error

    # A folder or file could not be made behind such a link, which a run would notice only later.
    for link in links:
        if not link.exists():
            raise UserError(f"{link}: a link that leads nowhere; delete it")


@contextlib.contextmanager
def lock(path: Path, guarded: str) -> Iterator[None]:
    """Hold the lock of a file, so that one run at a time works on what the file guards.

    The system releases the lock when the process ends, however it ends. Where several processes
    run together, the primary holds the lock for all.

    Args:
        guarded: the name of the locked thing in an error message.

    Raises:
        UserError: if another process holds the lock, naming the process.
    """
    if not is_primary():
        yield
        return

    # The file says who holds the lock, for the message of a process that finds it locked.
    with _open_locked(path, guarded) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _open_locked(path: Path, guarded: str) -> TextIO:
    """Return the file of a lock, open and locked."""
    while True:
        file = os.fdopen(_open_plain(path), "r+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(MAX_HOLDER).strip()
            file.close()
            raise UserError(
                f"{guarded} is in use by {holder or 'another process'}; wait for it, stop it, or "
                "use another --workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{path}: no lock ({error.strerror}); start no second process", flush=True)
            return file

        # Between opening and locking, the file may have been deleted and made anew by another
        # process, which then holds the lock of the new file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False)):
                return file
        file.close()


def _open_plain(path: Path) -> int:
    """Open or make a file to read and write.

    Links are refused, because the lock's text would overwrite the file that a link leads to.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: is a link, which no lock may be; delete it") from error
        raise UserError(f"{path}: {error.strerror}; use a --workdir to write to") from error

    # A hard link is another name of some file, which would be overwritten just as well.
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise UserError(f"{path}: not a file of its own, as a lock must be; delete it")
    return descriptor


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it: a reader sees the old text or the new one.

    Where several processes run together, the primary writes, and the others must not expect the
    file to be there when this function returns.
    """
    if is_primary():
        atomic_files.write(path, text)
