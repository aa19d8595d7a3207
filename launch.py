"""Run a config: the whole job, or one stage of it.

    python launch.py --config=configs/gqa8.py
    python launch.py --config=configs/gqa8.py:mini --config.uptrain.alpha=0.1
    python launch.py --config=configs/gqa8.py --stage=evaluate --checkpoint=DIR

Exit status: 0 done, 2 something to change in the command, the config or a file.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gqa.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "What to run: configs/NAME.py[:argument].")
WORKDIR = flags.DEFINE_string("workdir", "runs/", "Where everything is kept, and found again.")
STAGE = flags.DEFINE_string("stage", None, "Only this stage and what it builds on.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "With --stage=evaluate: what to score.")


def main(argv: list[str]) -> int:
    """Parse, check, run; returns the exit status."""
    try:
        _parse(argv)
        _run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: list[str]) -> None:
    try:
        rest = flags.FLAGS(argv)[1:]
        config = CONFIG.value
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options start with --")
    if config is None:
        raise UserError("--config is missing; use e.g. --config=configs/gqa8.py")


def _run() -> None:
    import jax  # after the flags, so that a mistake in them is told at once

    from experiments import pipeline

    if STAGE.value not in (None, *pipeline.KINDS):
        raise UserError(f"--stage={STAGE.value}; use one of {', '.join(pipeline.KINDS)}")
    if CHECKPOINT.value and STAGE.value != "evaluate":
        raise UserError("--checkpoint goes with --stage=evaluate")
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    pipeline.check(config)
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
    print(f"{config.name} on {jax.device_count()} x {jax.devices()[0].device_kind}", flush=True)
    if CHECKPOINT.value:
        pipeline.evaluate_checkpoint(config, workdir, Path(CHECKPOINT.value))
    else:
        pipeline.run(config, workdir, STAGE.value)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
