"""Files that are never half written: a reader sees the whole new file, or the whole old one.

Reading files of strangers is in regular_files.py.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def writing(path: str | os.PathLike, folder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file to write to; rename it to `path` at the end.

    After an error the temporary file is deleted. An OSError, such as of a full disk, names `path`.
    A link at `path` is replaced and not followed.

    Args:
        folder: where the temporary file lies, on the same disk; the folder of `path` by default.
    """
    path = Path(path)
    # Nobody can guess the name, so nobody can put a link there that the file would be written to.
    # The end of a long name is left out, because a name has at most 255 bytes.
    name = f"{path.name.encode()[:200].decode(errors='ignore')}.{secrets.token_hex(8)}.tmp"
    temporary = (folder or path.parent) / name
    try:
        # Unlike tempfile's, the file gets the permissions that the user's umask says.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike, content: str | bytes, folder: Path | None = None) -> None:
    """Write a whole file, as `writing` does; text is encoded as UTF-8."""
    with writing(path, folder) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
