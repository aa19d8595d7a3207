"""The workdir: that it is there, whose it is, and that no file in it is ever half written."""

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
    """Raise a UserError unless there is, or can be, such a folder."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {error.strerror}; use a folder to write to"
        ) from error


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a file's lock; `what` it guards is for one run at a time.

    The lock goes with the process, however that ends. Of several processes the primary has it.

    Raises:
        UserError: if another process has it, saying which.
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
                f"{what} is in use by {file.read().strip() or 'another process'}; wait for it, "
                "stop it, or use another --workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{path}: no lock ({error.strerror}); start no second process", flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a file by another name first: a reader sees all of it or the one before.

    Of several processes the primary writes it, and the others must not count on it yet.
    """
    if is_primary():
        atomic_files.write(path, text)
