"""Keep compiled programs on disk, so that the next process need not compile them again.

A compiled program is native code, which whoever loads it runs. It is therefore kept in a private
folder of the user, and never in a folder that may be handed from one user to another.
"""

from pathlib import Path

import jax

from gqa.runtime.private_folders import in_cache, make_private


def enable() -> None:
    """Make JAX keep compiled programs in $JAX_COMPILATION_CACHE_DIR, or else ~/.cache/gqa/compiled.

    Nothing is kept where no folder can be made, which is said on stdout.

    Raises:
        UserError: if the folder belongs to another user, or others can write to it.
    """
    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if named and "://" in named:
        return  # JAX reads and writes a bucket itself, and the user has named it
    try:
        folder = Path(named).absolute() if named else in_cache("compiled")
        make_private(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        print(f"compiled programs are not kept: {error}", flush=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
