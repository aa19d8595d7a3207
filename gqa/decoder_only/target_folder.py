"""The folder that a conversion writes: its record, and the files of an interrupted run.

The record says which source and settings the folder belongs to, and which files are finished. It
holds the sizes and times of the source's files, so that a run never continues with weights that
have changed meanwhile. convert.py writes the files.
"""

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gqa.decoder_only.layout import find_projection
from gqa.interop import safetensors_files
from gqa.interop.safetensors_files import Tensors
from gqa.runtime import regular_files
from gqa.runtime.errors import UserError

RECORD = "gqa_conversion.json"
Record = dict[str, Any]


def find_record(
    old: Tensors, target: Path, settings: dict[str, Any], is_converted: bool
) -> Record | None:
    """Return the record of an interrupted run, or None if the folder is new or empty.

    Nothing is written.

    Args:
        old: the tensors of the source.
        settings: of the conversion.
        is_converted: whether the conversion changes the number of KV heads. Otherwise no layer has
            errors.

    Raises:
        UserError: if the folder cannot become that of this conversion, or its record is damaged.
    """
    _check_place(old.folder, target)
    if not target.exists() or all(_is_temporary(path) for path in target.iterdir()):
        return None

    # A folder without a record has none of its keys either, so it is refused below.
    path = target / RECORD
    earlier = regular_files.read_json(path) if path.exists() else {}
    fresh = _fresh(old, settings)
    if any(earlier.get(key) != fresh[key] for key in ("source", *settings)):
        raise UserError(f"{target} holds something else; name a new or empty folder")

    # The folder belongs to this conversion, so continue from the files that are done.
    record = fresh | {key: earlier.get(key) for key in ("done", "errors")}
    fault = _fault(record, old, is_converted)
    if fault:
        raise UserError(f"{path} is damaged: {fault}; delete {target} and convert again")
    return record


def _fault(record: Record, old: Tensors, is_converted: bool) -> str | None:
    """Return what no conversion would have noted in a record, if anything."""
    done, errors = record["done"], record["errors"]
    if not isinstance(done, dict) or not isinstance(errors, dict):
        return "done and errors are no objects"

    # The errors of a layer are noted with the first of its projections, and written with its file.
    places = [find_projection(name) for name in old if old[name].file in done]
    layers = {str(place[0]) for place in places if place and is_converted}
    if errors.keys() != layers:
        return f"it has errors of {len(errors)} layers where {len(layers)} are finished"

    keys = {"norm", "mean", "first"} | ({"svd"} & {record["method"]})
    for layer, sides in errors.items():
        if not isinstance(sides, dict) or sides.keys() != {"k", "v"}:
            return f"the errors of layer {layer} are not those of k and v"
        for side, values in sides.items():
            has_keys = isinstance(values, dict) and values.keys() == keys
            # JSON as Python reads it may hold NaN and infinity. True and false are numbers, too.
            if not has_keys or not all(
                type(value) in (int, float) and 0 <= value < math.inf for value in values.values()
            ):
                return f"the errors of {side} in layer {layer} are {values!r:.80}"
    return None


def start_record(old: Tensors, target: Path, settings: dict[str, Any]) -> Record:
    """Write the record of a conversion that begins, and return it."""
    record = _fresh(old, settings)
    write_record(target, record)
    return record


def write_record(target: Path, record: Record) -> None:
    """Write the record as it is now."""
    safetensors_files.write_json(target / RECORD, record)


@contextlib.contextmanager
def opened(target: Path) -> Iterator[None]:
    """Create the folder, keep other conversions out of it, and delete half-written files.

    Raises:
        UserError: if another process writes to the folder.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; name a folder elsewhere") from error

    # The lock is on the folder itself: a file for it would be left over. A kill releases it.
    descriptor = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{target}: another process writes to it; wait for its end") from error
        except OSError:
            # Some network file systems have no locks. Everything but the lock works there.
            pass

        # Only now: without the lock these could be another process's.
        for path in target.iterdir():
            if _is_temporary(path):
                path.unlink()
        yield
    finally:
        os.close(descriptor)


def is_finished(path: Path, record: Record) -> bool:
    """Return whether an earlier run has written this file whole."""
    return path.is_file() and record["done"].get(path.name) == os.stat(path).st_size


def _fresh(old: Tensors, settings: dict[str, Any]) -> Record:
    """Return the record of a conversion that has done nothing yet."""
    stats = {file: os.stat(old.folder / file) for file in {old[name].file for name in old}}
    source = {file: [stat.st_size, stat.st_mtime_ns] for file, stat in sorted(stats.items())}
    return {"source": source, **settings, "done": {}, "errors": {}}


def _check_place(source: Path, target: Path) -> None:
    """Refuse a folder that cannot be written, or that is the source or a part of it."""
    if target.is_symlink() and not target.exists():
        raise UserError(f"{target}: is a link that leads nowhere; name a new or empty folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; name a new or empty folder")
    if target.exists() and source.samefile(target):
        raise UserError(f"{target} is the model itself; name another folder")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} lies in the model's folder; name a folder outside of it")

    # A conversion may read for minutes before it writes, so look where it would write first.
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{target}: {place} is a file; name a folder elsewhere")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{target}: {place} cannot be written; name a folder elsewhere")


def _is_temporary(path: Path) -> bool:
    """Return whether a file is one that `atomic_files` has not renamed yet."""
    return path.suffix == ".tmp" and path.is_file() and not path.is_symlink()
