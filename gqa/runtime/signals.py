"""Stop in order, and within half a minute, at SIGTERM, SIGINT or SIGHUP.

After the first signal `Interrupted` is raised: at once or, inside `deferred`, when the code there
asks. A second signal ends the process, and so does a watchdog if the main thread does not get to
the signal in time, because it sits in a compiler for example. The files on disk stay valid in all
cases, because everything is written under another name first.

If several processes must stop together and only one of them gets the signal, they agree first.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

# SIGHUP comes when a terminal is closed or a connection to it breaks.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 25.0  # seconds from the first signal to the end of the process by force
ECHO = 0.3  # seconds in which another signal counts as the first: timeout(1) sends its own twice
GRACE = 3.0  # seconds that are left at least after a checkpoint was saved


class Interrupted(BaseException):
    """The process was told to end; its exit status is 128 + `signum`.

    Not an Exception, because nothing has failed and no handler of failures should see it.
    """

    def __init__(self, signum: int, text: str):
        super().__init__(text)
        self.signum = signum


class _Watch:
    """The state that the signal handler, the watchdog and the main thread share."""

    def __init__(self):
        self.signum: int | None = None  # the first signal that this process was sent
        self.agreed: int | None = None  # the signal that all processes have agreed on
        self.deferred = False  # the handler raises nothing: the code inside `deferred` asks
        self.shared = False  # only the agreed signal counts
        self.saving = False  # the watchdog waits until a checkpoint is written


_watch = _Watch()


def install() -> None:
    """Take over `SIGNALS`; called once, by the main thread of the main program.

    A SIGHUP that is ignored stays ignored: the program was started with nohup, to go on when the
    terminal is closed.
    """
    # The watchdog reads from a socket, because Python's handlers do not run while the main thread
    # is in C++, whereas the wakeup descriptor is written to at once.
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_watchdog, args=(receiver,), name="watchdog", daemon=True).start()

    for signum in SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
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


def _watchdog(receiver: socket.socket) -> None:
    """End the process `PATIENCE` seconds after the first signal, or at the second one."""
    signum, begin = 0, 0.0
    end: float | None = None
    while True:
        # Before the first signal there is nothing to time; afterwards the clock is read often.
        receiver.settimeout(None if end is None else 0.1)
        with contextlib.suppress(TimeoutError):
            # Each byte is the number of a signal.
            for number in receiver.recv(16):
                if number not in SIGNALS:
                    continue
                if end is None:
                    signum, begin = number, time.monotonic()
                    end = begin + PATIENCE
                elif time.monotonic() > begin + ECHO:
                    os._exit(128 + number)

        # A checkpoint that is being written is finished first.
        if _watch.saving and end is not None:
            end = max(end, time.monotonic() + GRACE)
        if end is not None and time.monotonic() > end:
            os._exit(128 + signum)


def received() -> int:
    """Return the signal that was sent to this process, or 0."""
    return _watch.signum or 0


def agree(signum: int) -> None:
    """Record the signal that some process was sent and all have now learned of; 0 for none."""
    _watch.agreed = signum or None


def pending() -> bool:
    """Return whether a signal came that was deferred."""
    return _pending() is not None


def _pending() -> int | None:
    return _watch.agreed if _watch.shared else _watch.signum


@contextlib.contextmanager
def deferred(*, shared: bool = False) -> Iterator[None]:
    """Let the code inside ask for signals itself, by `pending` and `immediate`.

    Args:
        shared: whether a signal counts only after `agree` was called with it.
    """
    with _setting(deferred=True, shared=shared):
        yield

    # Inside another `deferred` the code there asks for the signal.
    if not _watch.deferred:
        _raise_pending()


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Inside `deferred`, raise `Interrupted` at once, also for a signal that came earlier."""
    # A signal of this process alone does not count where it is shared: the other processes would
    # wait for this one. So the handler raises nothing there.
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
    """Keep the watchdog from ending the process before the code inside has written its files."""
    _watch.saving = True
    try:
        yield
    finally:
        _watch.saving = False
