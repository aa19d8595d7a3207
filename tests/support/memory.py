"""Peak memory of this process, above what it had before."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextlib.contextmanager
def peak():
    """Yield an object whose `nbytes` is, in the end, the peak of RSS above RSS at the start.

    The system keeps the peak, so nothing between two looks is missed.
    """
    try:
        CLEAR.write_text("5")  # the peak starts again from the present size
    except OSError:
        pytest.skip("only Linux tells the peak of a process anew")
    start, result = psutil.Process().memory_info().rss, SimpleNamespace(nbytes=None)
    yield result
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    result.nbytes = 1024 * int(line.split()[1]) - start
