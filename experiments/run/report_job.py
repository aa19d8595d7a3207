"""Write the report of some stages, given by their keys; on a cluster, after the other jobs.

    python -m experiments.run.report_job WORKDIR WITHIN KEY ...

`experiments/pipeline.py` knows which stages belong to a config, and calls `write` itself where it
runs the stages on this machine.
"""

import functools
import sys
from collections.abc import Collection
from pathlib import Path

from experiments.graph.stage import Stage
from experiments.report import report
from experiments.run import process
from experiments.run.worker import RESULTS
from gqa.runtime.errors import UserError


def command(stages: list[Stage], workdir: Path, within: float) -> list[str]:
    """Return the command that writes the report of these stages."""
    keys = [stage.key for stage in stages]
    module = ["-m", "experiments.run.report_job"]
    return [sys.executable, *module, str(workdir.absolute()), str(within), *keys]


def write(workdir: Path, within: float, keys: Collection[str]) -> None:
    """Write the report into the workdir; print its answer, where it is, and what to try next."""
    print(report.run(workdir / RESULTS, workdir, keys, within))


def main(argv: list[str]) -> None:
    """Write the report that the arguments ask for."""
    if len(argv) < 4:
        raise UserError("usage: python -m experiments.run.report_job WORKDIR WITHIN KEY ...")
    _, workdir, within, *keys = argv
    write(Path(workdir), float(within), keys)


if __name__ == "__main__":
    process.start()
    sys.exit(process.status(functools.partial(main, sys.argv)))
