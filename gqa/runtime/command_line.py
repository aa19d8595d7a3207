"""What every command line of this project shares: its parser's errors, its exit status.

`python -m gqa ...` uses `status` as it is. `experiments.run.process` builds on `describe_failure`,
because its programs also take signals and may be one of several processes.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from gqa.runtime.errors import UserError, is_disk_full
from gqa.runtime.signals import Interrupted

DONE = 0
USER_ERROR = 2
SIGNAL_BASE = 128  # a process that a signal has stopped exits with 128 + its number


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are a UserError: one line, without argparse's usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError; argparse calls this for arguments that it cannot parse."""
        raise UserError(f"{message}; {self.prog} --help lists the arguments")


def describe_failure(error: BaseException) -> tuple[int, str] | None:
    """Return exit status and one line for an error that the user can act on.

    Returns:
        The status (2 for something to change, 128 + signal for an interruption) and the line; None
        for every other error, which is a defect and should keep its traceback.
    """
    if isinstance(error, UserError):
        return USER_ERROR, f"error: {error}"

    if isinstance(error, Interrupted):
        return SIGNAL_BASE + error.signum, f"stopped: {error}"

    # Most writers report a full disk as an OutOfDiskError; this is for all others.
    if isinstance(error, Exception) and is_disk_full(error):
        path = getattr(error, "filename", None)
        place = f" for {path}" if path else ""
        return USER_ERROR, (
            f"error: no space left on device{place}; free some and run the same command again: "
            "what is finished is kept"
        )

    return None


def status(run: Callable[[], None]) -> int:
    """Call `run` and return the exit status; a mistake of the user is printed in one line."""
    try:
        run()
    except (Exception, Interrupted) as error:
        failure = describe_failure(error)
        if failure is None:
            raise
        code, line = failure
        print(line, file=sys.stderr, flush=True)
        return code
    return DONE
