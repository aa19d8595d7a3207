"""The one exception that means the user, not the code, has something to change; and full disks."""

import errno


class UserError(Exception):
    """A mistake in a config, a path or a data file.

    The message is one line that names the key or the file and what would do; `launch.py` prints it
    and exits with status 2.
    """


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a disk or a quota is full."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # TensorStore and XLA give their own exceptions the system's words.
        if any(words in str(error) for words in ("No space left on device", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False
