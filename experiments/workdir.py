"""The workdir: making it, locking it for one process, and writing its files whole.

What lies in a stage's folder is in `experiments/stages/folder.py`.
"""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from gqa.runtime import atomic_files
from gqa.runtime.distributed import is_primary
from gqa.runtime.errors import UserError


def make_workdir(workdir: Path) -> None:
    """Make the folder if it is not there.

    Raises:
        UserError: if the folder cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {error.strerror}; use a folder to write to"
        ) from error


@contextlib.contextmanager
def lock(path: Path, guarded: str) -> Iterator[None]:
    """Hold the lock of a file, so that one run at a time works on what the file guards.

    The system releases the lock when the process ends, however it ends. Where several processes
    run together, the primary holds the lock for all.

    Args:
        guarded: what an error message calls the thing that is locked.

    Raises:
        UserError: if another process holds the lock, naming the process.
    """
    if not is_primary():
        yield
        return
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{guarded} is in use by {file.read().strip() or 'another process'}; wait for it, "
                "stop it, or use another --workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{path}: no lock ({error.strerror}); start no second process", flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it: a reader sees the old text or the new one.

    Where several processes run together, the primary writes, and the others must not expect the
    file to be there when this function returns.
    """
    if is_primary():
        atomic_files.write(path, text)
