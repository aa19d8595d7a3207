"""The seal of a checkpoint's folder: sizes and checksums of its files, to notice and name damage.

`checksums.json` in the folder has the size and SHA-256 of every other file, and the metrics of the
checkpoint. The seal guards against accidents, not against somebody who can write into the folder.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gqa.runtime import atomic_files, regular_files
from gqa.runtime.errors import DamagedCheckpoint, UserError

NAME = "checksums.json"
# Files that file managers put into every folder they show. Nothing reads them, so they are no
# damage. "._" begins the names of the files in which macOS keeps attributes on foreign disks.
OF_FILE_MANAGERS = (".DS_Store", "Thumbs.db", "desktop.ini")


def write(step: Path, metrics: dict[str, float] | None) -> None:
    """Seal a complete checkpoint; `metrics` is None when none were measured."""
    files = _files(step)
    _put(step, dict(zip(files, _digests(step, files), strict=True)), metrics)


def amend(step: Path, metrics: dict[str, float] | None) -> None:
    """Put metrics into the seal of a checkpoint that had none."""
    _put(step, _read(step)["files"], metrics)


def is_sealed(step: Path) -> bool:
    """Return whether there is a seal, intact or not."""
    return (step / NAME).exists()


def metrics(step: Path) -> dict[str, float] | None:
    """Return the metrics of a checkpoint.

    Raises:
        DamagedCheckpoint: when the seal is missing or has changed.
    """
    return _read(step)["metrics"]


def verify(step: Path, items: Iterable[str]) -> None:
    """Compare the names and sizes of all files, and the contents of the files of some items.

    Args:
        items: names of folders in `step`; the contents of the files beside these folders are
            compared too.

    Raises:
        DamagedCheckpoint: naming the first file, relative to `step`, that is missing, new or
            different.
    """
    sealed, present = _read(step)["files"], _files(step)

    for name in sorted(sealed.keys() | present.keys()):
        if name not in present:
            raise DamagedCheckpoint(step, f"{name} is missing")
        if name not in sealed:
            raise DamagedCheckpoint(step, f"{name} was added")
        if present[name] != sealed[name][0]:
            raise DamagedCheckpoint(
                step, f"{name} has {present[name]} bytes instead of {sealed[name][0]}"
            )

    # Hashing takes most of the time, so items that are not asked for are left out.
    # "params/d/1234" belongs to the item "params", and a file beside the items to "".
    wanted = ("", *items)
    names = [name for name in sealed if name.rpartition("/")[0].split("/")[0] in wanted]
    for name, digest in zip(names, _digests(step, names), strict=True):
        if digest != sealed[name]:
            raise DamagedCheckpoint(step, f"the contents of {name} have changed")


def _files(step: Path) -> dict[str, int]:
    """Return the sizes of all files but the seal, by their names relative to `step`."""
    sizes = {}
    for folder, folders, names in os.walk(step):
        for name in folders + names:
            path = Path(folder, name)
            state, relative = path.lstat(), path.relative_to(step).as_posix()
            # A link could lead out of the folder, and reading a pipe might never end.
            if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
                raise DamagedCheckpoint(step, f"{relative} is neither a file nor a folder")

            if name in OF_FILE_MANAGERS or name.startswith("._"):
                continue
            if stat.S_ISREG(state.st_mode) and relative != NAME:
                sizes[relative] = state.st_size
    return sizes


def _digests(step: Path, names: Iterable[str]) -> list[list]:
    """Return [size, SHA-256] of each file; they are read in threads."""

    def digest(name: str) -> list:
        try:
            with regular_files.open_regular(step / name) as file:
                digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
                return [os.fstat(file.fileno()).st_size, digest.hexdigest()]
        except OSError as error:
            raise DamagedCheckpoint(step, f"{name}: {error.strerror}") from error
        except UserError as error:
            raise DamagedCheckpoint(step, str(error)) from error

    # Threads help, because reading and hashing release Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, names))


def _read(step: Path) -> dict:
    path = step / NAME
    if not path.is_file() or path.is_symlink():
        raise DamagedCheckpoint(step, f"{NAME} is missing")
    try:
        seal = regular_files.read_json(path)
        # The seal could be damaged itself. Its own checksum is of everything but that checksum.
        digest = seal.pop("sha256", None)
        intact = digest == _digest(seal) and _has_files(seal) and _has_metrics(seal)
    except (UserError, RecursionError):
        intact = False
    if not intact:
        raise DamagedCheckpoint(step, f"the contents of {NAME} have changed")
    return seal


def _has_files(seal: dict) -> bool:
    """Return whether a seal has a size and a checksum for each of its files."""
    files = seal.get("files")
    # The exact types, because true and false are numbers to `isinstance`.
    return isinstance(files, dict) and all(
        isinstance(entry, list) and [type(part) for part in entry] == [int, str]
        for entry in files.values()
    )


def _has_metrics(seal: dict) -> bool:
    """Return whether the metrics of a seal are numbers, or were not measured."""
    metrics = seal.get("metrics", ...)
    if isinstance(metrics, dict):
        return all(type(value) in (int, float) for value in metrics.values())
    return metrics is None


def _put(step: Path, files: dict[str, list], metrics: dict[str, float] | None) -> None:
    seal = {"metrics": metrics, "files": files}
    content = json.dumps(seal | {"sha256": _digest(seal)}, indent=1)

    # The temporary file lies beside the folder, because a kill must not leave a file in the folder
    # that is not in the seal.
    atomic_files.write(step / NAME, content, step.parent)


def _digest(seal: dict) -> str:
    """Return the checksum of the seal itself, which is one of its fields."""
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
