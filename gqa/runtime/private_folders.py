"""Folders from which code is loaded, so that nobody but their owner may write to them.

Compiled programs and pickles run with the rights of whoever loads them. They are kept in folders of
the user alone, and a folder that somebody else owns or can write to is refused.
"""

import os
import stat
from pathlib import Path

from gqa.runtime.errors import UserError


def in_cache(name: str) -> Path:
    """Return the folder `name` among this program's caches: ~/.cache/gqa/NAME by default.

    Raises:
        RuntimeError: if there is no home folder.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification wants a relative path ignored.
    root = Path(caches) if os.path.isabs(caches) else Path.home() / ".cache"
    return root / "gqa" / name


def make_private(folder: Path) -> None:
    """Make a folder for this user alone (mode 0700), or check the one that is there.

    Raises:
        UserError: if the folder belongs to another user, or its group or others can write to it.
        OSError: if the folder cannot be made.
    """
    # Whoever made the folder, its owner and mode are checked below. So nobody gains anything by
    # making it a moment earlier.
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise UserError(f"{folder}: not a folder; move it away") from None

    # The link is followed: a link is as good as the folder that it leads to.
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise UserError(
            f"{folder}: belongs to another user, who could put code in it that this program would "
            "run; delete it, or use another folder"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{folder}: others can write to it, and could put code in it that this program would "
            f"run; if you trust what is in it: chmod go-w {folder}; else delete it"
        )
