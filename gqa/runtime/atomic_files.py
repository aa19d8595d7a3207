"""Files that are never half written: a reader sees the whole new file, or the whole old one.

Reading files of strangers is in regular_files.py.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name to write a file under; rename it to `path` at the end.

    After an error the temporary file is deleted. An OSError, such as of a full disk, names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a whole file; text is encoded as UTF-8."""
    with writing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
