"""The one exception that means the user, not the code, has something to change."""


class UserError(Exception):
    """A mistake in a config, a path or a data file.

    The message is one line that names the key or the file and what would do; `launch.py` prints it
    and exits with status 2.
    """


def disk_full(error):
    return False
