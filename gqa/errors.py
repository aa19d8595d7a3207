"""The one exception that means the user, not the code, has something to change."""

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
