"""How a main program starts, and how an exception becomes one line and an exit status.

This is the one place that adds the flag of `launch.py` which helps against an error of the library.
"""

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from gqa.runtime import signals
from gqa.runtime.command_line import (
    check_environment,
    close_output,
    describe_failure,
    flush_output,
)
from gqa.runtime.errors import DamagedCheckpoint, DivergedError


def status(run: Callable[[], None]) -> int:
    """Call `run` and return the exit status; what the user can act on is printed in one line.

    0 is done, 2 something to change in the command, the config, a file or the disk, 128 + signal
    an interruption. One of several processes that fails ends here and does not return.
    """
    # A notebook names a backend of its own for figures, which its child processes do not have.
    os.environ["MPLBACKEND"] = "agg"
    try:
        check_environment()
        run()
        flush_output()
    except (Exception, signals.Interrupted, KeyboardInterrupt) as error:
        failure = describe_failure(error)
        if failure is None:
            # One of several processes prints the traceback and ends in `_leave`.
            _leave(1, error)
            raise
        code, line = failure
        if isinstance(error, BrokenPipeError):
            close_output()
        return _say(f"{line}{_remedy(error)}", code)
    return 0


def _remedy(error: BaseException) -> str:
    """Return the flag, and from launch.py the whole command, with which a stopped run goes on.

    An error that sums up the failures of several stages has the first failure as its cause.
    """
    if isinstance(error.__cause__, DamagedCheckpoint | DivergedError):
        error = error.__cause__
    if isinstance(error, DamagedCheckpoint):
        flag = "--config.checkpoint.on_damage=previous"
        effect = "sets it aside and goes on from the checkpoint before"
    elif isinstance(error, DivergedError) and error.rollback_allowed:
        flag = "--config.train.on_divergence=rollback"
        effect = "goes on from there, without the batches since"
    elif isinstance(error, DivergedError):
        return " (--config.train.max_rollbacks=N)"
    else:
        return ""

    # Only launch.py is a command that the user typed. It starts the other programs itself.
    if Path(sys.argv[0]).name != "launch.py":
        return f"; {flag} {effect}"
    return f"; {flag} {effect}: python {shlex.join([*sys.argv, flag])}"


def _say(text: str, code: int) -> int:
    if text:
        # A terminal that has gone away takes no more lines; the status says enough.
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
    _leave(code)
    return code


def _leave(code: int, error: BaseException | None = None) -> None:
    if "jax" in sys.modules:  # else it has joined no others, and takes a second to import
        from gqa.runtime import distributed

        if error is not None and distributed.is_several():
            traceback.print_exception(error)
        distributed.leave(code)


def start() -> None:
    """Set up what only a main program may change: the memory allocator and the signal handlers."""
    _start_with_huge_pages()
    signals.install()


def _start_with_huge_pages() -> None:
    """Start this program again with glibc told to back large arrays by huge pages.

    glibc reads the variable once, when a process starts. XLA on a CPU allocates new memory in every
    step, and with small pages the page faults took a fifth of a training step.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
