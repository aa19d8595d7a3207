"""Run a config: the whole job, one stage of it, or a sweep.

    python launch.py --config=configs/gqa8.py
    python launch.py --config=configs/gqa8.py:mini --config.uptrain.alpha=0.1
    python launch.py --config=configs/gqa8.py --stage=evaluate --checkpoint=DIR
    python launch.py --config=configs/sweeps/groups.py --jobs=2
    python launch.py --config=configs/sweeps/groups.py --dry-run

Exit status: 0 done, 2 something to change in the command, the config or a file, 128 + signal
stopped by one, having saved what was done.
"""

import re
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.run import process
from gqa.runtime.checks import check_local_path
from gqa.runtime.errors import UserError


def main(argv: list[str]) -> int:
    """Parse, check, run; returns the exit status."""
    return process.status(lambda: _run(_parse(argv)))


def _parse(argv: list[str]) -> flags.FlagValues:
    _check_arguments(argv)
    try:
        values = _define(argv)
        rest = values(argv)[1:]
        # A config file that did not load says so when it is first looked into.
        named = values.config is not None and values.config.name is not None
    except UserError:
        raise
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_key(error, argv)) from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise UserError(str(error.args[0] if error.args else error)) from error
    except Exception as error:  # whatever else a config file does
        raise UserError(f"--config: {type(error).__name__}: {error}") from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options start with --")
    if not named:
        raise UserError("--config is missing; use e.g. --config=configs/gqa8.py")
    for key, value in config_flags.get_override_values(values["config"]).items():
        if isinstance(value, ConfigDict):
            raise UserError(f"--config.{key} is a section; set its keys, --config.{key}.KEY=VALUE")
    return values


def _check_arguments(argv: list[str]) -> None:
    """Refuse arguments that are not UTF-8, which no result could hold, and malformed keys."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{argument!r} is not UTF-8 text") from error
        key = re.match(r"--?(no)?config\.([^=]*)", argument)
        if key and not re.fullmatch(r"\w+(\.\w+)*", key[2]):
            raise UserError(f"{argument!r} names no key; use --config.SECTION.KEY=VALUE")


def _unknown_key(error: Exception, argv: list[str]) -> str:
    """Return a message that names the whole key; ml_collections names only the part not found."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    part, _, hint = str(error.args[0] if error.args else "").partition("\n")
    for argument in argv:
        key = re.match(r"--?(?:no)?(config\.[\w.]+)", argument)
        if key and part.strip("'") in key[1].split("."):
            return f"--{key[1]} is no key; {hint or 'configs/base.py lists them all'}"
    return f"--config: {type(error).__name__}: {error}"


def _define(argv: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    options: dict[str, Any] = {"flag_values": values}
    config_flags.DEFINE_config_file(
        "config", None, "configs/NAME.py[:argument]", sys_argv=argv, **options
    )
    flags.DEFINE_string("workdir", "runs/", "where everything is kept, and found again", **options)
    flags.DEFINE_string("stage", None, "only this stage and what it builds on", **options)
    flags.DEFINE_string("checkpoint", None, "with --stage=evaluate: what to score", **options)
    flags.DEFINE_string("executor", "local", "local, or slurm: one job a stage", **options)
    flags.DEFINE_integer("jobs", 1, "stages at a time on this machine", **options)
    flags.DEFINE_boolean("dry-run", False, "print the stages and do nothing", **options)
    return values


def _run(values: flags.FlagValues) -> None:
    # Imported after the flags are parsed, so that a mistake in them is reported at once.
    import jax

    from experiments import pipeline
    from experiments.aot import analysis
    from experiments.graph import validate
    from experiments.speed import benchmark
    from experiments.stages import initial_checkpoint
    from gqa.runtime import compilation_cache, distributed

    for name in ("workdir", "checkpoint"):
        check_local_path(f"--{name}", values[name].value or "")
    config, workdir, stage = values.config, Path(values.workdir), values.stage
    if stage == "aot" or config.experiment == "aot":
        analysis.run(config, workdir, stage)
        return
    distributed.initialize()
    experiments = {"pipeline": pipeline, "speed": benchmark}
    if config.experiment not in experiments:
        raise UserError(
            f"experiment={config.experiment!r}; use one of {', '.join(experiments)}, aot"
        )
    experiment = experiments[config.experiment]
    if experiment is benchmark and distributed.is_several():
        raise UserError("experiment=speed times one process; start no others")
    if stage not in (None, *experiment.KINDS):
        raise UserError(f"--stage={stage}; use one of {', '.join(experiment.KINDS)}, aot")
    if values.checkpoint and stage != "evaluate":
        raise UserError("--checkpoint goes with --stage=evaluate")
    options = pipeline.Options(values.executor, values.jobs, bool(values["dry-run"].value))
    pipeline.check_options(options)
    if experiment is pipeline:
        validate.check_paths(config)
        config = initial_checkpoint.adopted(config)
        pipeline.check(config, options)
    else:
        experiment.check(config)
    compilation_cache.enable()
    print(f"{config.name} on {jax.device_count()} x {jax.devices()[0].device_kind}", flush=True)
    if values.checkpoint:
        pipeline.score_checkpoint(config, workdir, Path(values.checkpoint))
    else:
        experiment.run(config, workdir, stage, options)


if __name__ == "__main__":
    process.start()
    sys.exit(main(sys.argv))
