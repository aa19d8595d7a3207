"""What a job goes through in a bad month, in hours: run by hand, not by the test suite.

    python -m tests.soak --kills=100 --workdir=/somewhere/large

Runs the whole main job once in peace, then

- again while it is killed (SIGKILL, the process and its children) at random moments, over and over
  until there were so many kills; a job that is done sooner is begun anew,
- again while it is told to stop (SIGTERM) at random moments,
- again on disks of sizes that fill up at random moments, each enlarged when the job has said so,

and compares every parameter and every score to the last bit. Prints a summary and exits with
status 1 if anything was lost. Needs root for the small disks, leaves them out otherwise.
"""

import argparse
import collections
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.jobs import ROOT, differences, outputs

STAGE = re.compile(r"^(\w+)( \w+)? \(.*\): in ")


def main(argv: list[str]) -> int:
    """Run every part that is asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="configs/gqa8.py")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--disks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="to a signal, on average")
    parser.add_argument("--seed", type=int, default=0)
    options, more = parser.parse_known_args(argv)  # more: --config.key=value
    rng = random.Random(options.seed)
    job = [sys.executable, "launch.py", f"--config={options.config}", *more]
    options.workdir.mkdir(parents=True, exist_ok=True)

    whole = options.workdir / "whole"
    begun = time.monotonic()
    expect(start(job, whole, options.workdir / "whole.log"), options.workdir / "whole.log", 0)
    say(f"the job in peace: {time.monotonic() - begun:.0f} s")
    expected = outputs(whole)
    lost = kills(job, options, rng, expected)
    lost += stops(job, options, rng, expected)
    lost += disks(job, options, rng, expected)
    say("nothing was lost" if not lost else f"LOST: {lost} comparisons differ")
    return bool(lost)


def say(text: str) -> None:
    """One line of the summary."""
    print(f"soak: {text}", flush=True)


def start(job: list[str], workdir: Path, log: Path) -> subprocess.Popen:
    """The job in a process group of its own; what it prints is appended to `log`."""
    with open(log, "a") as file:
        command = [*job, f"--workdir={workdir}"]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def expect(process: subprocess.Popen, log: Path, *statuses: int) -> int:
    """Wait for the process; end everything here unless it ends with one of the statuses."""
    found = process.wait()
    if found not in statuses:
        sys.exit(f"soak: exit status {found}, not {statuses}; see {log}")
    return found


def stage_at_work(log: Path) -> str:
    """The kind of the stage that was begun last."""
    kinds = [match[1] for line in log.read_text().splitlines() if (match := STAGE.match(line))]
    return kinds[-1] if kinds else "none yet"


def compare(workdir: Path, expected: dict) -> int:
    """How many of the arrays and numbers differ; says which."""
    names = differences(outputs(workdir), expected)
    for name in names[:5]:
        say(f"{workdir}: {name} differs")
    return len(names)


def interrupted(job, options, rng, expected, count, signum, name) -> tuple[int, list[float], str]:
    """Signal the job `count` times, let it end, compare; begins anew what is done too soon."""
    lost, seconds, where = 0, [], collections.Counter()
    log = options.workdir / f"{name}.log"
    for turn in itertools.count():
        workdir = options.workdir / f"{name}-{turn}"
        while len(seconds) < count:
            took = interrupt(job, workdir, log, signum, rng.expovariate(1 / options.seconds))
            if took is None:
                break
            seconds.append(took)
            where[stage_at_work(log)] += 1
        expect(start(job, workdir, log), log, 0)
        lost += compare(workdir, expected)
        shutil.rmtree(workdir)
        if len(seconds) == count:
            break
    stages = ", ".join(f"{kind} {n}" for kind, n in where.most_common())
    return lost, seconds, f"{turn + 1} jobs, in {stages}"


def interrupt(job, workdir, log, signum, delay) -> float | None:
    """Signal a started job after `delay` seconds; the seconds to its end, None if it was done."""
    process = start(job, workdir, log)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    begun = time.monotonic()
    # Before the first line of Python is read, either signal simply ends it.
    if signum == signal.SIGKILL:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    if expect(process, log, 0, -signum, 128 + signum) == 0:
        return None
    return time.monotonic() - begun


def kills(job, options, rng, expected) -> int:
    """SIGKILL."""
    if not options.kills:
        return 0
    lost, seconds, where = interrupted(
        job, options, rng, expected, options.kills, signal.SIGKILL, "killed"
    )
    say(f"{len(seconds)} x SIGKILL ({where}): {lost} differences")
    return lost


def stops(job, options, rng, expected) -> int:
    """SIGTERM, and how long the job takes to be gone."""
    if not options.stops:
        return 0
    lost, seconds, where = interrupted(
        job, options, rng, expected, options.stops, signal.SIGTERM, "stopped"
    )
    say(
        f"{len(seconds)} x SIGTERM ({where}): gone after {max(seconds):.1f} s at most, "
        f"{lost} differences"
    )
    return lost


def disks(job, options, rng, expected) -> int:
    """A disk that is full `disks` times before the job is done."""
    if not options.disks or os.geteuid():
        return 0
    need = sum(f.stat().st_size for f in (options.workdir / "whole").rglob("*") if f.is_file())
    sizes = sorted(rng.uniform(0.02, 0.98) for _ in range(options.disks))
    disk = options.workdir / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    log, full = options.workdir / "disk.log", 0
    try:
        for share in sizes:
            resize(disk, int(share * need))
            full += expect(start(job, disk / "runs", log), log, 0, 2) == 2
        resize(disk, 4 * need)
        expect(start(job, disk / "runs", log), log, 0)
        lost = compare(disk / "runs", expected)
    finally:
        subprocess.run(["umount", disk], check=True)
    lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    say(f"disk full {full} times (of {need / 2**20:.0f} MiB): {lost} differences; it said")
    for line in lines:
        say(f"  {line}")
    return lost


def resize(disk: Path, size: int) -> None:
    """Give a tmpfs another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
