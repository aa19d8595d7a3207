"""Keep compiled programs on disk, so that the next process need not compile them again.

A compiled program is native code, which whoever loads it runs. It is therefore kept in a private
folder of the user, and never in a folder that may be handed from one user to another.

JAX can bound the cache itself (jax_compilation_cache_max_size), but not where programs were kept
before without a bound, or a process was killed between the two files of a program: then it keeps no
more programs. So this module deletes old programs when a process starts.
"""

import contextlib
import os
from pathlib import Path

import jax

from gqa.runtime.private_folders import in_cache, make_private

# Bytes of compiled programs that are kept. The default job compiles about 10 MB.
MAX_BYTES = 2**30


def enable() -> None:
    """Make JAX keep compiled programs in $JAX_COMPILATION_CACHE_DIR, or else ~/.cache/gqa/compiled.

    Nothing is kept where no folder can be made, which is said on stdout. In the default folder the
    programs that were not used for longest are deleted beyond MAX_BYTES. A folder that the user has
    named may serve other programs, so nothing is deleted there.

    Raises:
        UserError: if the folder belongs to another user, or others can write to it.
    """
    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if named and "://" in named:
        return  # JAX reads and writes a bucket itself, and the user has named it
    try:
        folder = Path(named).absolute() if named else in_cache("compiled")
        make_private(folder)
        if not named:
            _delete_old(folder, MAX_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        print(f"compiled programs are not kept: {error}", flush=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _delete_old(folder: Path, most: int) -> None:
    """Delete the files that were not read for longest; the others have at most `most` bytes."""
    files = []
    for entry in os.scandir(folder):
        # Another process may delete the same files now. Deleting one that a process reads is
        # harmless: the process has it open, or compiles the program again.
        with contextlib.suppress(FileNotFoundError):
            state = entry.stat(follow_symlinks=False)
            # Linux notes the first read after a write, and then one a day. A disk that is mounted
            # without these times has that of the write.
            files.append((max(state.st_atime, state.st_mtime), state.st_size, entry.path))

    # The newest come first; what does not fit behind them goes.
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > most:
            Path(path).unlink(missing_ok=True)
