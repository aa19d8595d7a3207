"""`results.jsonl`: every number that a run produces, one JSON object (a record) a line.

This is the only file that reads and writes it. Keys of a record:

    run, stage, task        where the number comes from; task is null if there is none
    stage_key               hash of all that determines the number; two numbers with one key are the
                            same measurement. Null in files that older versions wrote
    variant                 the settings of the network, from which labels are derived:
        size, seed
        num_heads                       query heads
        num_kv_heads                    KV heads of the decoder's self-attention
        num_kv_heads_cross_attention, num_kv_heads_encoder
        method                          conversion method, "none" without conversion
        alpha                           share of the pretraining steps that was uptrained
    metric, value, unit
    low, high, n            the interval and the number of examples; null if there is none
    commit, device, time    see `provenance`
    step                    only of a point of a learning curve
    example                 only of one prediction: its number; the texts stand beside it
"""

import contextlib
import fcntl
import functools
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from gqa.runtime.errors import UserError
from gqa.runtime.regular_files import open_regular, open_to_append

_SOURCE = Path(__file__).resolve().parent.parent.parent
# The longest line that is read. A record with a thousand replicates, or with the texts of one
# example, has less than a megabyte. In memory, 16 MiB of JSON take less than a gigabyte.
MAX_LINE_BYTES = 2**24
_CHUNK = 2**16  # bytes that are read at once to find where the last line begins


def append(path: str | os.PathLike, records: list[dict]) -> None:
    """Add `records` to the file at `path` in one write that has reached the disk on return.

    Raises:
        UserError: if `path` is a link or no regular file, which would be damaged.
    """
    # Serialise before the file is touched: NaN, which JSON does not have, raises here and leaves
    # the file as it was. NumPy numbers become Python's.
    lines = [json.dumps(r, allow_nan=False, default=lambda x: x.item()) + "\n" for r in records]

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open_to_append(path) as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)

        # The previous writer may have been killed in the middle of a line. New records must not be
        # joined to such a piece.
        _close_last_line(file, path)

        end = file.seek(0, os.SEEK_END)
        try:
            _write(file, "".join(lines).encode())
            os.fsync(file.fileno())
        except OSError as error:  # a full disk: all records or none
            file.truncate(end)
            error.filename = str(path)
            raise


def _write(file, content: bytes):
    # A system call may write only a part of the bytes.
    while content:
        content = content[file.write(content) :]


def _close_last_line(file, path):
    """Cut off a last line that a killed writer left half written, or end it if it is complete."""
    # Read backwards from the end, because the file may be large and a line is not.
    end = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start > 0 and b"\n" not in tail:
        if len(tail) > MAX_LINE_BYTES:
            raise UserError(
                f"{path}: its last line has more than {MAX_LINE_BYTES:,} bytes; remove the line"
            )
        size = min(_CHUNK, start)
        start -= size
        tail = os.pread(file.fileno(), size, start) + tail

    # From here `tail` is the last line alone, and empty if the file ends with the end of a line.
    start += tail.rfind(b"\n") + 1
    tail = tail[len(tail) - (end - start) :] if start < end else b""

    if tail and _parse(tail) is None:
        file.truncate(start)
    elif tail:
        # Only the end of the line is missing; the record is complete.
        file.write(b"\n")


def _parse(line):
    """Return the object in `line`, or None if the line is not one JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read(
    path: str | os.PathLike, wanted: Callable[[dict], bool] = lambda record: True
) -> list[dict]:
    """Read the records that are `wanted`; an unfinished last line is left out.

    Args:
        path: a file that `append` wrote, perhaps on another machine.
        wanted: returns whether a record is kept. A UserError that it raises about a record names
            the file and the line when it leaves this function.

    Raises:
        UserError: naming the file and the line, for a line that is no record.
    """
    records, number = [], 0
    try:
        file = open_regular(path)
    except UserError as error:
        raise UserError(f"{error}; run a stage that writes it first") from error
    with file:
        # A line that is too long shows by one byte more, and is never in memory as a whole.
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(f"longer than {MAX_LINE_BYTES:,} bytes")
                record = _parse(line)

                # A writer was killed in the last line, or is still writing it.
                if record is None and not line.endswith(b"\n"):
                    break

                if record is None:
                    raise UserError("not a JSON object")

                # Wrong types are named here, with the line, and not deep inside a report.
                _check(record)
                if wanted(record):
                    records.append(record)
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}; remove the line") from error
    return records


# Types of a record's fields. Fields that are not listed are not read by anything.
_TEXT, _TEXT_OR_NULL = (str,), (str, type(None))
_NUMBER, _NUMBER_OR_NULL = (int, float), (int, float, type(None))
_REQUIRED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("run", "stage", "metric", "unit", "commit", "device", "time"), _TEXT),
    "task": _TEXT_OR_NULL,
    "variant": (dict,),
    "value": _NUMBER,
}
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "stage_key": _TEXT_OR_NULL,
    **dict.fromkeys(("low", "high"), _NUMBER_OR_NULL),
    "n": (int, type(None)),
    **dict.fromkeys(("step", "example"), (int,)),
    "parent_value": _NUMBER,
    **dict.fromkeys(("parent_size", "inputs", "prediction"), _TEXT),
    **dict.fromkeys(("targets", "replicates"), (list,)),
}


def _check(record: dict[str, Any]) -> None:
    """Refuse a record with a field of a wrong type; fill in the fields that may be missing.

    Raises:
        UserError: naming the field and its value.
    """
    for name in _REQUIRED:
        if name not in record:
            raise UserError(f"has no field {name!r}")

    for name, value in record.items():
        types = (_REQUIRED | _OPTIONAL).get(name)
        if types is not None:
            _check_value(name, value, types)

    for name, value in record["variant"].items():
        if isinstance(value, dict | list):
            raise UserError(f"variant.{name:.40} is {_shortened(value)}")

    # So far these are known to be lists, but not of what.
    for name in ("targets", "replicates"):
        for value in record.get(name, ()):
            _check_value(name, value, _TEXT if name == "targets" else _NUMBER)

    # A report shows a prediction beside its input and its targets, so it needs all three.
    if "example" in record and not {"inputs", "targets", "prediction"} <= record.keys():
        raise UserError("is an example without inputs, targets and prediction")
    if record.get("targets") == []:
        raise UserError("has no targets")

    # A record may lack these fields. With null in their place, readers need no check.
    for name in ("stage_key", "low", "high", "n"):
        record.setdefault(name, None)


def _check_value(name: str, value: Any, types: tuple[type, ...]) -> None:
    # To Python, true and false are numbers.
    is_right = isinstance(value, types) and not isinstance(value, bool)
    if is_right and isinstance(value, int | float):
        # The report computes with floats, which end at 1.8e308.
        is_right = abs(value) < 1e300 and math.isfinite(value)
    if not is_right:
        raise UserError(f"{name} is {_shortened(value)}")


def _shortened(value: Any) -> str:
    # A list or an object is named and not shown, because it may be long, or nested more deeply than
    # `json.dumps` can follow.
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"

    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def of_stages(records: list[dict], keys: Collection[str]) -> list[dict]:
    """Keep the records of the stages with these keys, and of each key the last publication.

    A stage is published again if it had to be repeated, for example because its checkpoint was
    damaged. All records of one publication carry the same time.
    """
    planned = [record for record in records if record["stage_key"] in keys]
    last = {record["stage_key"]: record["time"] for record in planned}
    return [record for record in planned if record["time"] == last[record["stage_key"]]]


def latest(records: list[dict]) -> list[dict]:
    """Return the last record of each measurement, in the order in which these were written."""
    names = "run", "stage", "task", "metric", "step", "example"

    def key(record):
        # Text, because a dict cannot be a key; sorted, because the order of the settings means
        # nothing.
        variant = json.dumps(record["variant"], sort_keys=True)
        return variant, *(record.get(name) for name in names)

    kept: dict[tuple, dict] = {}
    for record in records:
        # Otherwise the record would stay at the place of the first record of its measurement.
        kept.pop(key(record), None)
        kept[key(record)] = record
    return list(kept.values())


def provenance() -> dict:
    """Return the fields that say what made a number and when: commit, device, time (ISO, UTC)."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"commit": _commit(), "device": _device(), "time": time}


@functools.cache
def _commit():
    """Describe the source tree; "-dirty" says that it has uncommitted changes."""
    command = ["git", "-C", str(_SOURCE), "describe", "--always", "--dirty", "--tags"]
    # Without the ceiling, a copy inside someone else's repository would report their commit.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(_SOURCE.parent)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


@functools.cache
def _device():
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {kind}"

    # The cores that this process may use. A container may have fewer than the machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    # JAX calls every processor "cpu". Linux knows its model; on other systems "cpu" remains.
    with contextlib.suppress(OSError):
        model_name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        kind = model_name[1] if model_name else platform.machine()
    return f"{kind}, {cores} core{'s' if cores != 1 else ''}"
