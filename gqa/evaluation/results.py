"""`results.jsonl`: every number that a run produces, one JSON object (a record) a line.

This is the only file that reads and writes it. Keys of a record:

    run, stage, task        where the number comes from; task is null if there is none
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
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import jax

from gqa.runtime.errors import UserError

_SOURCE = Path(__file__).resolve().parent.parent.parent


def append(path: str | os.PathLike, records: list[dict]) -> None:
    """Add `records` to the file at `path` in one write that has reached the disk on return."""
    lines = [json.dumps(r, allow_nan=False, default=lambda x: x.item()) + "\n" for r in records]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        _close_last_line(file)
        end = file.seek(0, os.SEEK_END)
        try:
            _write(file, "".join(lines).encode())
            os.fsync(file.fileno())
        except OSError as error:  # a full disk: all records or none
            file.truncate(end)
            error.filename = str(path)
            raise


def _write(file, content: bytes):
    while content:
        content = content[file.write(content) :]


def _close_last_line(file):
    """Cut off a last line that a killed writer left half written, or end it if it is complete."""
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    tail = content[start:]
    if tail and _parse(tail) is None:
        file.truncate(start)
    elif tail:
        file.write(b"\n")


def _parse(line):
    """Return the object in `line`, or None if the line is not one JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read(path: str | os.PathLike) -> list[dict]:
    """Read all records; an unfinished last line is left out."""
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run a stage that writes it first") from None
    records = [_parse(line) for line in lines]
    if lines and records[-1] is None and not lines[-1].endswith(b"\n"):
        records.pop()
    if None in records:
        number = records.index(None) + 1
        raise UserError(f"{path}:{number}: not a JSON object; remove the line")
    return records


def latest(records: list[dict]) -> list[dict]:
    """Keep the last record of each measurement, in the order written."""
    names = "run", "stage", "task", "metric", "step", "example"

    def key(record):
        variant = json.dumps(record["variant"], sort_keys=True)
        return variant, *(record.get(name) for name in names)

    kept: dict[tuple, dict] = {}
    for record in records:
        kept.pop(key(record), None)
        kept[key(record)] = record
    return list(kept.values())


def provenance() -> dict:
    """Return what produced a number and when: commit, device, and time (ISO, UTC)."""
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError):
        model_name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        kind = model_name[1] if model_name else platform.machine()
    return f"{kind}, {cores} core{'s' if cores != 1 else ''}"
