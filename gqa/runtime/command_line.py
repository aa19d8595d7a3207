"""What the library's own command lines have in common."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from gqa.runtime.errors import UserError, disk_full

USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls."""
        raise UserError(f"{message}; {self.prog} --help lists what there is")


def status(run: Callable[[], None]) -> int:
    """Run; returns the exit status: 0 done, 2 something to change, told in one line."""
    try:
        run()
    except UserError as error:
        reason = str(error)
    except Exception as error:
        if not disk_full(error):
            raise
        reason = "no space left on device; free some and run the same command again"
    else:
        return 0
    print(f"error: {reason}", file=sys.stderr, flush=True)
    return USER_ERROR
