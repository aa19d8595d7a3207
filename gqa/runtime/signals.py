"""SIGTERM and SIGINT: what is under way is left in order, and within half a minute.

After the first signal `Interrupted` is raised: at once or, inside `deferred`, when the code there
asks. A second signal, or a main thread that does not get to it (it may sit in a compiler), ends the
process. What is on disk is then what it was: everything is written under another name first.

Of several processes that must stop together, one alone may get the signal: they agree on it first.
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
        self.agreed: int | None = None  # of all processes, what the first of them was sent
        self.deferred = False
        self.shared = False
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
    signum, begin = 0, 0.0
    end: float | None = None
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


def received() -> int:
    """The signal that was sent to this process, or 0."""
    return _watch.signum or 0


def agree(signum: int) -> None:
    """Say what all processes have learned of: the signal that one of them was sent, or 0."""
    _watch.agreed = signum or None


def pending() -> bool:
    """Whether a signal came that was deferred."""
    return _pending() is not None


def _pending() -> int | None:
    return _watch.agreed if _watch.shared else _watch.signum


@contextlib.contextmanager
def deferred(*, shared: bool = False) -> Iterator[None]:
    """Let what is inside ask for signals itself, by `pending` and `immediate`.

    With `shared` a signal is pending once `agree` was called with it, and raised only then.
    """
    with _setting(deferred=True, shared=shared):
        yield
    if not _watch.deferred:
        _raise_pending()


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Inside `deferred`: raise `Interrupted` here and now, also for a signal from before."""
    with _setting(deferred=_watch.shared):
        _raise_pending()
        yield


def _raise_pending() -> None:
    signum = _pending()
    if signum is not None:
        raise Interrupted(signum, _text(signum))


@contextlib.contextmanager
def _setting(**values: bool) -> Iterator[None]:
    before = {name: getattr(_watch, name) for name in values}
    vars(_watch).update(values)
    try:
        yield
    finally:
        vars(_watch).update(before)


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Keep the watchdog from ending the process before what is inside is on disk."""
    _watch.saving = True
    try:
        yield
    finally:
        _watch.saving = False
