"""Step folders: the folders `1000`, `2000` ... of a training run, each a finished checkpoint.

This file finds step folders, sets damaged ones aside and deletes the leftovers of a kill. It knows
names only: checkpoint.py reads and writes the contents, checksums.py tells whether they are intact.
"""

import shutil
from pathlib import Path

from gqa.runtime import checks, distributed
from gqa.runtime.errors import CheckpointError, ConfigError

# Names of unfinished saves and deletions: Orbax's, and the two of this package.
LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.deleted", "*.tmp")


def check_path(folder: Path, field: str = "checkpoint folder") -> None:
    """Refuse a folder whose checkpoints could be written but never read, and an address.

    Orbax looks for files by a pattern that begins with the folder's path, so that "[" in it means a
    set of characters; it fails on "**". TensorStore takes a backslash for a slash.

    Raises:
        ConfigError: naming the field and the path.
    """
    checks.check_local_path(field, folder)
    for character in ("[", "**", "\\"):
        if character in str(folder.absolute()):
            raise ConfigError(
                field,
                str(folder),
                'use a folder whose path has neither "[" nor "**" nor a backslash',
                f"has {character}, which Orbax and TensorStore do not read as it stands",
            )


def find(path: str | Path) -> Path:
    """Return the step folder that `path` means: itself, or the last step in it.

    Raises:
        CheckpointError: if there is no finished checkpoint.
    """
    path = Path(path)
    check_path(path)
    path = path.absolute()

    if (path / "params").is_dir():
        return path

    steps = finished(path)
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {path}; name a step folder (with params/) or its parent"
        )
    return steps[-1]


def finished(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a folder, in the order of their steps."""
    # `isdecimal` alone would accept the digits of every script.
    steps = [
        p
        for p in folder.glob("*")
        if p.name.isascii() and p.name.isdecimal() and (p / "params").is_dir()
    ]
    return sorted(steps, key=lambda p: int(p.name))


def set_aside(step: Path) -> None:
    """Rename a damaged step folder and all later ones, so that training resumes before it.

    The damaged one is kept as `STEP.damaged`, a later one as `STEP.later`. If later ones stayed,
    training would resume from them, and the run would end without the damaged step. Only the
    primary process renames; the others learn it when they next ask the primary.
    """
    if not distributed.is_primary():
        return
    later = [path for path in finished(step.parent) if int(path.name) > int(step.name)]

    # From the last one down, and the damaged one at the end: after a kill in between, the damaged
    # step is found again and the rest set aside.
    for path in reversed(later):
        path.rename(_unused(path, "later"))
    step.rename(_unused(step, "damaged"))


def _unused(path: Path, suffix: str) -> Path:
    """Return a name beside `path` that nothing has: `3.damaged`, then `3.damaged-2` ..."""
    names = [path.with_name(f"{path.name}.{suffix}")]
    while names[-1].exists():
        names.append(path.with_name(f"{path.name}.{suffix}-{len(names) + 1}"))
    return names[-1]


def delete(step: Path) -> None:
    """Delete a step folder; a kill meanwhile leaves no half of a checkpoint under its name."""
    _remove(step.rename(step.with_name(f"{step.name}.deleted")))


def clear(folder: Path) -> None:
    """Delete the leftovers of saves and deletions that a kill interrupted."""
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
