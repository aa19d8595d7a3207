"""Mutation testing: small faults put into the code on purpose, and whether the tests notice them.

    python -m tests.mutants                        every mutant of tests/mutations/*.toml
    python -m tests.mutants --only=loss --jobs=2   those whose file or name contains "loss"

A mutant replaces one piece of source text, `old`, by another, `new`, in one file, and names the
test files that should fail because of it. It is killed if one of them does, and survives if all of
them pass. A mutant that cannot change any result says so in `equivalent` and is not run.

Each mutant is tried in a copy of the repository, so the working tree is never touched. The exit
status is 0 if at least 95% of the mutants that are not equivalent were killed, else 1.
"""

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("configs", "experiments", "gqa", "tests", "launch.py", "pyproject.toml")
REQUIRED_SCORE = 0.95
TIMEOUT = 600  # seconds for the tests of one mutant; a mutant that never ends is killed, too


class Mutant(NamedTuple):
    """One fault: replace `old`, which occurs once in `file`, by `new`; `tests` should then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    equivalent: str = ""


def load(only: str = "") -> list[Mutant]:
    """The mutants whose file or name contains `only`.

    Raises:
        ValueError: for a mutant whose `old` does not occur exactly once in its file.
    """
    mutants = []
    for path in sorted((ROOT / "tests" / "mutations").glob("*.toml")):
        mutants += [Mutant(**entry) for entry in tomllib.loads(path.read_text())["mutant"]]
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text().count(mutant.old)
        if count != 1:
            raise ValueError(f"{mutant.file}: {count} places for the mutant {mutant.name!r}")
    return [m for m in mutants if only in m.file or only in m.name]


def survives(mutant: Mutant) -> bool:
    """Apply the mutant to a copy of the repository and run its tests there; whether all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for source in ROOT.glob("requirements*.txt"):
            shutil.copy(source, copy)

        target = copy / mutant.file
        target.write_text(target.read_text().replace(mutant.old, mutant.new))

        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *mutant.tests]
        try:
            done = subprocess.run(
                command, cwd=copy, capture_output=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return False
    # 1: a test failed. 2: the mutant cannot even be imported, which every test notices.
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"mutant {mutant.name!r}: pytest ended with {done.returncode}")
    return done.returncode == 0


def main(argv: list[str]) -> int:
    """Run the mutants and print the survivors and the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a mutant's name or file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    options = parser.parse_args(argv)

    mutants = load(options.only)
    tried = [mutant for mutant in mutants if not mutant.equivalent]
    survivors = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutant, survived in zip(tried, pool.map(survives, tried), strict=True):
            print(f"{'survived' if survived else 'killed':8}  {mutant.file}  {mutant.name}")
            if survived:
                survivors.append(mutant)

    killed = len(tried) - len(survivors)
    score = killed / max(len(tried), 1)
    equivalent = len(mutants) - len(tried)
    print(f"{killed} of {len(tried)} mutants killed ({score:.1%}); {equivalent} equivalent")
    return 0 if score >= REQUIRED_SCORE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
