"""What a config may not say: refused in one line, before any compute and before any writing."""

import math

from ml_collections import ConfigDict

from experiments import evaluate
from experiments.plan import parent_config, target_heads
from gqa import convert, model, sharding
from gqa.errors import UserError
from gqa.tasks import SPLITS

ALL_IF_ZERO = ("evaluate.examples", "evaluate.top_k")
DEFAULT_IF_ZERO = (
    "slurm.gpus_per_node",
    "slurm.cpus_per_task",
    "slurm.mem_gb",
    "slurm.timeout_min",
)
MAY_BE_ZERO = (*ALL_IF_ZERO, *DEFAULT_IF_ZERO)


def check(config: ConfigDict) -> None:
    """Refuse, in one line and before any compute, what could not run."""
    parent = parent_config(config)
    heads = target_heads(config)
    convert.check(parent, heads, config.convert.method)
    if config.convert.optimizer not in ("map", "reset"):
        raise UserError(f"convert.optimizer={config.convert.optimizer!r}; use map or reset")
    if not 0 <= config.uptrain.alpha <= 1:
        raise UserError(f"uptrain.alpha={config.uptrain.alpha}; use a fraction from 0 to 1")
    if config.evaluate.split not in SPLITS:
        raise UserError(f"evaluate.split={config.evaluate.split!r}; use one of {', '.join(SPLITS)}")
    check_numbers(config)
    evaluate.check(config.evaluate)
    for section in ("pretrain", "finetune"):
        training = config[section]
        model.Config(**{**parent.__dict__, "dropout_rate": training.dropout_rate})
        sharding.check_batch(
            f"{section}.batch_size", training.batch_size, training.num_microbatches
        )
    sharding.check_batch("evaluate.batch_size", config.evaluate.batch_size)


def check_numbers(config: ConfigDict) -> None:
    """Counts are 1 or more, rates not negative; 0 may stand for all or for the default."""
    for section, settings in config.items():
        for key, value in settings.items() if isinstance(settings, ConfigDict) else ():
            name = f"{section}.{key}"
            least = 0 if isinstance(value, float) or name in MAY_BE_ZERO else 1
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not least <= value < math.inf:
                raise UserError(f"{name}={value}; use {least} or more")
