"""The one exception that means the user, not the code, has something to change; and full disks."""

import errno

LONGEST = 1000  # characters; what a message quotes may be a whole file


class UserError(Exception):
    """A mistake in a config, a path or a data file.

    The message is one line that names the key or the file and what would do; `launch.py` prints it
    and exits with status 2. Line breaks and control characters in what it quotes become spaces.
    """

    def __init__(self, message: str):
        printable = "".join(c if c.isprintable() else " " for c in message)
        line = " ".join(printable.split())
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]} ...")


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
