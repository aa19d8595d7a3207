"""SIGTERM and SIGINT: what is under way is left in order, and within half a minute.

After the first signal `Interrupted` is raised: at once or, inside `deferred`, when the code there
asks. A second signal, or a main thread that does not get to it (it may sit in a compiler), ends the
process. What is on disk is then what it was: everything is written under another name first.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 25.0  # seconds from the first signal to the end of the process by force
ECHO = 0.3  # seconds in which another signal is the first's: timeout(1) sends its own twice
GRACE = 3.0  # of them at least, after a checkpoint that took longer was saved


class Interrupted(BaseException):
    """The process was told to end; exit with status 128 + `signum`. Not a mistake of anybody's."""

    def __init__(self, signum: int, text: str):
        super().__init__(text)
        self.signum = signum


class _Watch:
    """What the signal handler, the watchdog and the main thread know of each other."""

    def __init__(self):
        self.signum: int | None = None
        self.deferred = False
        self.saving = False


_watch = _Watch()


def install() -> None:
    """Take over SIGTERM and SIGINT; called once, by the main thread of the main program."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    # The only way to learn of a signal while the main thread is in C++.
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_watchdog, args=(ours,), name="watchdog", daemon=True).start()
    for signum in SIGNALS:
        signal.signal(signum, _handle)


def _handle(signum: int, frame: object) -> None:
    del frame
    if _watch.signum is None:
        _watch.signum = signum
        if not _watch.deferred:
            raise Interrupted(signum, _text(signum))


def _text(signum: int) -> str:
    name = signal.Signals(signum).name
    return f"interrupted by {name}; the same command goes on from where it was"


def _watchdog(ours: socket.socket) -> None:
    """Give the main thread its time after the first signal, and none after the second."""
    signum = begin = end = None
    while True:
        ours.settimeout(None if end is None else 0.1)
        with contextlib.suppress(TimeoutError):
            for number in ours.recv(16):
                if number not in SIGNALS:
                    continue
                if end is None:
                    signum, begin = number, time.monotonic()
                    end = begin + PATIENCE
                elif time.monotonic() > begin + ECHO:
                    os._exit(128 + number)
        if _watch.saving and end is not None:
            end = max(end, time.monotonic() + GRACE)
        if end is not None and time.monotonic() > end:
            os._exit(128 + signum)


def pending() -> bool:
    """Whether a signal came that was deferred."""
    return _watch.signum is not None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let what is inside ask for signals itself, by `pending` and `immediate`."""
    with _deferring(True):
        yield
    if not _watch.deferred:
        _raise_pending()


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Inside `deferred`: raise `Interrupted` here and now, also for a signal from before."""
    with _deferring(False):
        _raise_pending()
        yield


def _raise_pending() -> None:
    if _watch.signum is not None:
        raise Interrupted(_watch.signum, _text(_watch.signum))


@contextlib.contextmanager
def _deferring(value: bool) -> Iterator[None]:
    before, _watch.deferred = _watch.deferred, value
    try:
        yield
    finally:
        _watch.deferred = before


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Keep the watchdog from ending the process before what is inside is on disk."""
    _watch.saving = True
    try:
        yield
    finally:
        _watch.saving = False
