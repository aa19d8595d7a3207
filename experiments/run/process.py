"""What every process of ours begins with, and what becomes of what ends it."""

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from gqa.runtime import signals
from gqa.runtime.errors import UserError, disk_full

USER_ERROR = 2


def status(run: Callable[[], None]) -> int:
    """Run; returns the exit status, having said in one line what the user can do something about.

    0 done, 2 something to change in the command, the config, a file or the disk, 128 + signal
    stopped by it. One of several processes that fails ends here.
    """
    try:
        run()
    except UserError as error:
        return _say(f"error: {error}{_remedy(error)}", USER_ERROR)
    except signals.Interrupted as stop:
        return _say(f"stopped: {stop}", 128 + stop.signum)
    except Exception as error:
        if not disk_full(error):
            _leave(1, error)
            raise
        where = getattr(error, "filename", None)
        return _say(
            f"error: no space left on device{f' for {where}' if where else ''}; free some and run "
            "the same command again: what is finished is kept",
            USER_ERROR,
        )
    return 0


def _remedy(error: UserError) -> str:
    """The command that goes on, where an error knows a flag for that."""
    flag = getattr(error, "remedy", None)
    if flag is None or Path(sys.argv[0]).name != "launch.py":
        return ""
    return f": python {shlex.join([*sys.argv, flag])}"


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr, flush=True)
    _leave(code)
    return code


def _leave(code: int, error: Exception | None = None) -> None:
    if "jax" in sys.modules:  # else it has joined no others, and takes a second to import
        from gqa.runtime import distributed

        if error is not None and distributed.is_several():
            traceback.print_exception(error)
        distributed.leave(code)


def start() -> None:
    """What only a main program may do: own the memory allocator's settings, and the signals."""
    _start_with_huge_pages()
    signals.install()


def _start_with_huge_pages() -> None:
    """Have glibc, which reads this once at its start, back large arrays by huge pages.

    XLA on a CPU takes new memory for every step; with small pages a fifth of a training step went
    into their faults.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
