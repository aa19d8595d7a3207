"""The part that all command lines of this project share: errors of the parser, the exit status.

`python -m gqa ...` uses `status` as it is. `experiments.run.process` builds on `describe_failure`,
because its programs also take signals and may be one of several processes.
"""

import argparse
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gqa.runtime.errors import UserError, is_disk_full
from gqa.runtime.signals import Interrupted

DONE = 0
USER_ERROR = 2
SIGNAL_BASE = 128  # a process that a signal has stopped exits with 128 + its number

# Errors of the system that only the user can mend, with what to do. Others, such as a missing file,
# may be defects of this program: where the user names a file, its reader says so.
ADVICE = {
    errno.EACCES: "choose another path, or change the permissions",
    errno.EPERM: "choose another path, or change the permissions",
    errno.EROFS: "choose a path on a disk that can be written",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EISDIR: "is a folder; choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links lead in a circle; choose another path",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENXIO: "choose a regular file",
}
# What Python and JAX say of links in a circle and of an environment variable of JAX's.
CIRCLE = re.compile(r"Symlink loop from (['\"])(.*)\1", re.DOTALL)
VARIABLE = re.compile(r"(?s)invalid \w+ value .* for environment '\w+'")
TRUE = ("y", "yes", "t", "true", "on", "1")  # as JAX reads its environment variables


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are a UserError: one line, without argparse's usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError; argparse calls this for arguments that it cannot parse."""
        raise UserError(f"{message}; {self.prog} --help lists the arguments")


def check_environment() -> None:
    """Refuse environment variables that would change what this program computes.

    Raises:
        UserError: naming the variable.
    """
    wide = os.environ.get("JAX_ENABLE_X64", "")
    if wide.strip().lower() in TRUE:
        raise UserError(
            f"JAX_ENABLE_X64={wide} makes JAX compute in 64 bits, for which this program is not "
            "made; unset it"
        )


def describe_failure(error: BaseException) -> tuple[int, str] | None:
    """Return exit status and one line for an error that the user can act on.

    Returns:
        The status (2 for something to change, 128 + signal for an interruption) and the line, which
        is empty if nothing should be printed; None for every other error, which is a defect and
        should keep its traceback.
    """
    if isinstance(error, UserError):
        return USER_ERROR, f"error: {error}"

    if isinstance(error, Interrupted):
        return SIGNAL_BASE + error.signum, f"stopped: {error}"

    # Ctrl-C before the signal handlers were installed.
    if isinstance(error, KeyboardInterrupt):
        return SIGNAL_BASE + signal.SIGINT, "stopped: interrupted by SIGINT"

    # Whoever read the output has seen enough of it, such as `head`.
    if isinstance(error, BrokenPipeError):
        return SIGNAL_BASE + signal.SIGPIPE, ""

    # Most writers report a full disk as an OutOfDiskError; this is for all others.
    if isinstance(error, Exception) and is_disk_full(error):
        path = getattr(error, "filename", None)
        place = f" for {path}" if path else ""
        return USER_ERROR, (
            f"error: no space left on device{place}; free some and run the same command again: "
            "what is finished is kept"
        )

    # A file's name may be long or hold line breaks; UserError makes a printable line of it.
    if isinstance(error, OSError) and error.errno in ADVICE:
        place = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return USER_ERROR, f"error: {UserError(f'{place}{error.strerror}; {ADVICE[error.errno]}')}"

    if isinstance(error, FileNotFoundError) and not _has_current_folder():
        return USER_ERROR, "error: the current folder has been deleted; change to another one"

    # Path.resolve, and JAX where it reads its environment variables, raise these for a user's
    # mistake.
    said = str(error)
    if isinstance(error, RuntimeError) and (loop := CIRCLE.fullmatch(said)):
        return USER_ERROR, f"error: {UserError(f'{loop[2]}: {ADVICE[errno.ELOOP]}')}"
    if isinstance(error, ValueError) and VARIABLE.fullmatch(said):
        return USER_ERROR, f"error: {UserError(f'{said}; unset it or correct it')}"

    if _is_missing_device(error):
        platforms = os.environ.get("JAX_PLATFORMS")
        return USER_ERROR, (
            f"error: JAX_PLATFORMS={platforms}: JAX has no such device here; install JAX for it, "
            "or unset JAX_PLATFORMS"
        )
    return None


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _is_missing_device(error: BaseException) -> bool:
    """Return whether JAX found no device of the kind that JAX_PLATFORMS asks for.

    JAX says so in an error of its own, or by an assertion that fails in its search for devices.
    """
    if not os.environ.get("JAX_PLATFORMS"):
        return False
    if isinstance(error, RuntimeError):
        return str(error).startswith(("Unable to initialize backend", "Unknown backend"))
    frames = traceback.extract_tb(error.__traceback__)
    in_search = bool(frames) and Path(frames[-1].filename).name == "xla_bridge.py"
    return isinstance(error, AssertionError) and in_search


def status(run: Callable[[], None]) -> int:
    """Call `run` and return the exit status; a mistake of the user is printed in one line."""
    try:
        check_environment()
        run()
        flush_output()
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        failure = describe_failure(error)
        if failure is None:
            raise
        code, line = failure
        if line:
            print(line, file=sys.stderr, flush=True)
        if isinstance(error, BrokenPipeError):
            close_output()
        return code
    return DONE


def flush_output() -> None:
    """Flush stdout, so that an error of writing is raised here; stdout may be closed (`>&-`)."""
    if sys.stdout is not None:
        sys.stdout.flush()


def close_output() -> None:
    """Discard the rest of stdout, because the interpreter would fail to write it when it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
