"""The errors of the library: mistakes that the user can correct, each told in one line.

The library names its own parameters and fields, never a flag of a command line or a key of a
config file; `experiments` adds those. Any other exception that leaves the library is a defect of
this program and keeps its traceback. Single checks of values are in `gqa.runtime.checks`.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A message may quote a whole file; a terminal should not show more characters of it than this.
MAX_MESSAGE_LENGTH = 1000
MAX_VALUE_LENGTH = 100
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk or a quota


class UserError(Exception):
    """A mistake in a setting, a path or a file that the user can correct.

    The message is one line that names the setting or the file, and says what would do. Command
    lines print it and exit with status 2. Line breaks and control characters in what the message
    quotes become spaces.
    """

    def __init__(self, message: str):
        printable = "".join(c if c.isprintable() else " " for c in message)
        line = " ".join(printable.split())
        if len(line) > MAX_MESSAGE_LENGTH:
            line = f"{line[:MAX_MESSAGE_LENGTH]} ..."
        super().__init__(line)


class ConfigError(UserError):
    """A setting has a value that cannot be used.

    The message reads `FIELD=VALUE REASON; ADVICE`, such as
    `num_kv_heads=3 does not divide num_heads=16; use one of 1, 2, 4, 8, 16`.

    Args:
        field: name of the parameter or dataclass field.
        value: the value that was refused.
        advice: what would do, such as "use one of 1, 2, 4".
        reason: what is wrong with the value, where the advice does not say so already.
    """

    def __init__(self, field: str, value: Any, advice: str, reason: str = ""):
        self.field, self.value, self.advice, self.reason = field, value, advice, reason
        space = " " if reason else ""
        super().__init__(f"{field}={_shown(value)}{space}{reason}; {advice}")

    def renamed(self, field: str) -> "ConfigError":
        """Return the same error under another name: the key that the user has set."""
        return ConfigError(field, self.value, self.advice, self.reason)


@contextlib.contextmanager
def renamed_fields(prefix: str) -> Iterator[None]:
    """Put `prefix` before the field of any ConfigError inside.

    With the prefix "mesh." an error about `model=3` becomes one about `mesh.model=3`, the key that
    the user has set.
    """
    try:
        yield
    except ConfigError as error:
        raise error.renamed(f"{prefix}{error.field}") from error


class CheckpointError(UserError):
    """A checkpoint is missing, or is not one that can be used here."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is not as it was saved.

    Args:
        step: the checkpoint's folder.
        fault: which file differs, and how.
    """

    def __init__(self, step: Path, fault: str):
        self.step, self.fault = step, fault
        super().__init__(
            f"checkpoint {step} is damaged: {fault}; restore its files, or start from another "
            "checkpoint"
        )


class DivergedError(UserError):
    """Training stopped because the loss is not finite, or far above its mean.

    Args:
        message: which run, which loss, and what can be done.
        step: the step whose loss it is.
        last_good: the last checkpoint with a validation loss; None where training had none.
        rollback_allowed: whether going back to `last_good` is still open to the user: it was not
            asked for. False once the allowed number of rollbacks is used up.
    """

    def __init__(self, message: str, step: int, last_good: Path | None, rollback_allowed: bool):
        self.step, self.last_good, self.rollback_allowed = step, last_good, rollback_allowed
        super().__init__(message)


class OutOfDiskError(UserError):
    """A disk or a quota is full; the message says what was being written."""


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, means that a disk is full."""
    return _means(error, FULL)


def _means(error: BaseException | None, codes: tuple[int, ...]) -> bool:
    """Return whether an error, or one that it was raised from, has one of the system's codes."""
    # An error can be among its own causes, so the errors that were looked at are remembered.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in codes:
            return True

        # TensorStore and XLA raise exceptions of their own that quote the system's words.
        if any(os.strerror(code) in str(error) for code in codes):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def reporting_full_disk(activity: str, kept: str) -> Iterator[None]:
    """Raise an OutOfDiskError for any error inside that means a full disk, or a file at its limit.

    Args:
        activity: what is being done, such as "saving checkpoint /runs/3".
        kept: what the user need not worry about, such as "earlier checkpoints are intact".
    """
    try:
        yield
    except Exception as error:
        # An inner call has said already what was being written, more precisely than this one.
        if isinstance(error, OutOfDiskError):
            raise
        if is_disk_full(error):
            reason, advice = "no space left on device", "free space"
        elif _means(error, (errno.EFBIG,)):
            reason, advice = "file too large", "raise the limit on the size of files (ulimit -f)"
        else:
            raise
        raise OutOfDiskError(
            f"{reason} while {activity}; {advice} and run the same command again; {kept}"
        ) from error


def _shown(value: Any) -> str:
    """Return a value for a message; Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"<a number of {value.bit_length()} bits>"
    return f"{value!r:.{MAX_VALUE_LENGTH}}"
