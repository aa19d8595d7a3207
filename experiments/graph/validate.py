"""Refuse a config that could not run, in one line, before anything is computed or written.

The library checks its own arguments; here its errors get the config's key. Checks that need more
than one section of the config, or its files, are made here alone.
"""

import errno
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.graph.plan import WHERE, converted_config, parent_config, target_heads
from experiments.stages import text
from experiments.stages.variant import NOT_CONVERTED
from gqa import conversion
from gqa.data import tasks, tokenizer
from gqa.data.examples import SPLITS
from gqa.runtime.checks import check_local_path, check_whole_number
from gqa.runtime.errors import ConfigError, UserError, renamed_fields
from gqa.runtime.mesh import Layout, check_batch, check_layout, check_rows
from gqa.training import progress
from gqa.training.profiling import parse_window

# Whole numbers that may be 0, where 0 mostly means "all" or "the default".
ZERO_TOO = (
    *("seed", "evaluate.examples", "evaluate.top_k", "train.max_rollbacks"),
    *("model.vocab_size", "finetune.inputs_length", "finetune.targets_length"),
    *("slurm.gpus_per_node", "slurm.cpus_per_task", "slurm.mem_gb", "slurm.timeout_min"),
)
# Keys that name files or folders, some of them several, separated by commas.
PATHS = (
    *("init.huggingface", "init.t5x", "text.vocabulary", "text.data_dir"),
    *("files.train", "files.validation", "files.test", "documents.train", "documents.validation"),
)
CHOICES = {
    "convert.method": (*conversion.METHODS, NOT_CONVERTED),
    "convert.space": conversion.SPACES,
    "convert.grouping": conversion.GROUPINGS,
    "convert.optimizer": ("map", "reset"),
    "convert.where": tuple(WHERE),
    "evaluate.split": SPLITS,
    "evaluate.search": ("greedy", "beam", "sample"),
    "evaluate.cache_dtype": ("", "float32", "bfloat16"),
    "checkpoint.on_damage": ("stop", "previous"),
    "train.on_divergence": ("stop", "rollback"),
    "wandb.mode": progress.MODES,
    "text.vocabulary_model": ("", *tokenizer.MODEL_TYPES),
}


def check(config: ConfigDict, devices: tuple[int, int] | None = None) -> None:
    """Refuse a config of the main job that could not run; `check_text` checks its text.

    Args:
        devices: how many devices the job will have in all, and in each process; None for the
            devices of this machine.

    Raises:
        UserError: naming the key and what would do.
    """
    check_keys(config)

    # Both networks have to fit the devices, because both are trained and both generate.
    layout = Layout(**config.mesh)
    count, local_count = devices or (jax.device_count(), jax.local_device_count())
    for network in (parent_config(config), converted_config(config)):
        with renamed_fields("mesh."):
            check_layout(network, layout, count, local_count)
        # A process generates on its own devices alone, unless a network is split over more.
        generate = max(local_count, layout.model)
        with renamed_fields("evaluate."):
            check_rows(config.evaluate.batch_size, network, layout, generate)

    for section in ("pretrain", "finetune"):
        _check_batch(section, config[section], layout, count)
    with renamed_fields("evaluate."):
        check_batch(config.evaluate.batch_size, 1, layout, count)
    progress.check(config.wandb.mode)


def check_keys(config: ConfigDict) -> None:
    """Refuse values that no machine and no text would make right.

    Raises:
        UserError: naming the key and what would do.
    """
    # Numbers come first, because the checks below compute with them.
    check_numbers(config)
    values = dict(flatten(config))
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            known = ", ".join(choice or "nothing" for choice in choices)
            raise UserError(f"{name}={values[name]!r}; use one of {known}")
    _check_fractions(config)
    _check_profile(config)
    _check_conversion(config)


def check_paths(config: ConfigDict) -> None:
    """Refuse URLs, and names that no file can have, where the config names files or folders."""
    values = dict(flatten(config))
    for key in PATHS:
        for path in text.split_names(str(values.get(key, ""))):
            check_local_path(key, path)
            try:
                os.lstat(path)
            except OSError as error:  # a file that is missing is named by its reader
                if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                    raise ConfigError(
                        key, path, "use another path", error.strerror or ""
                    ) from error


def check_text(config: ConfigDict) -> None:
    """Refuse tasks, files and vocabularies that could not be used, having read them all.

    Raises:
        UserError: naming the key, or the file and line, and what would do.
    """
    _check_tasks(config)
    _check_vocabulary(config)


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a config, such as pretrain.steps, with its value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_numbers(config: ConfigDict) -> None:
    """Refuse counts below 1, negative rates, and numbers that no int32 holds."""
    for name, value in flatten(config):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = 0 if name in ZERO_TOO or name.endswith("_token_id") else 1
        if isinstance(value, int):
            check_whole_number(name, value, least)
        elif not 0 <= value < math.inf:
            raise UserError(f"{name}={value}; use 0 or more")


def _check_conversion(config: ConfigDict) -> None:
    """Refuse a conversion that the library would refuse, naming the config's key."""
    section = config.convert
    if section.per_layer_budget and config.mesh.model > 1:
        raise UserError("convert.per_layer_budget=True goes with mesh.model=1 alone")
    parent = parent_config(config)  # here, because its errors name keys of another section
    if section.method == NOT_CONVERTED:
        _check_from_scratch(config)
        return
    # The library names its arguments, which are keys of this section.
    with renamed_fields("convert."):
        if section.per_layer_budget:
            conversion.check_per_layer(section.method, section.grouping)
        conversion.check(
            parent,
            dict(target_heads(config)),
            section.method,
            section.space,
            section.grouping,
            section.renorm,
        )


def _check_from_scratch(config: ConfigDict) -> None:
    """Refuse numbers of KV heads that no network has, and a network that is trained already."""
    for key, folder in config.init.items():
        if folder:
            raise UserError(
                f"convert.method={NOT_CONVERTED!r} trains a network from scratch, but "
                f"init.{key}={folder!r} is a trained one; use another method, or no init.{key}"
            )
    with renamed_fields("convert."):
        converted_config(config)


def _check_profile(config: ConfigDict) -> None:
    with renamed_fields("train."):
        if config.train.profile:
            parse_window(config.train.profile)


def _check_fractions(config: ConfigDict) -> None:
    if config.uptrain.alpha > 1:
        raise UserError(f"uptrain.alpha={config.uptrain.alpha}; use a fraction from 0 to 1")
    if config.convert.shrinkage > 1:
        raise UserError(f"convert.shrinkage={config.convert.shrinkage}; use a value from 0 to 1")
    if not 0 < config.evaluate.top_p <= 1:
        raise UserError(f"evaluate.top_p={config.evaluate.top_p}; use more than 0 and at most 1")
    for section in ("pretrain", "finetune"):
        rate = config[section].dropout_rate
        if rate >= 1:
            raise UserError(f"{section}.dropout_rate={rate}; use a value in [0, 1)")


def _check_batch(section: str, training: ConfigDict, layout: Layout, count: int) -> None:
    size, parts = training.batch_size, training.num_microbatches
    if size % parts:
        raise UserError(
            f"{section}.batch_size={size} does not split over num_microbatches={parts}; "
            f"use a multiple of {parts}"
        )
    with renamed_fields(f"{section}."):
        check_batch(size, parts, layout, count)


def _check_tasks(config: ConfigDict) -> None:
    """Refuse unknown tasks under the key that names them, and files that will be missed."""
    tuned = text.split_names(config.finetune.tasks)
    for key, names in (("pretrain.task", (config.pretrain.task,)), ("finetune.tasks", tuned)):
        for name in names:
            if name not in tasks.names():
                known = ", ".join(tasks.names())
                raise UserError(f"{key}: task={name!r} is unknown; choose from {known}")
    text.check(config)

    # Fail now and not at the last stage, hours later.
    split = config.evaluate.split
    for name in tuned:
        splits = getattr(tasks.get(name), "SPLITS", SPLITS)
        if split not in splits:
            known = " or ".join(splits)
            raise UserError(f"evaluate.split={split!r}: {name} has no answers in it; use {known}")
    if "files" in tuned and not config.files[split]:
        raise UserError(f"files.{split} names no file, evaluate.split={split!r} needs one")


def _check_vocabulary(config: ConfigDict) -> None:
    # A row of the embedding for each id: those of a vocabulary that is given, or the fewest that
    # training one needs.
    section, least = text.model_section(config), tokenizer.SMALLEST
    if path := config.text.vocabulary:
        vocabulary = tokenizer.shape(os.path.abspath(path))
        least = vocabulary.num_ids
        # Rows would be padded, or texts ended, with a token that the network reads as a word.
        for name, token in (("pad", vocabulary.special.pad), ("eos", vocabulary.special.eos)):
            if section[f"{name}_token_id"] != token:
                raise UserError(
                    f"text.vocabulary={path}: its {name} has id {token}, the checkpoint's "
                    f"{name}_token_id is {section[f'{name}_token_id']}; name its own vocabulary"
                )
    size = section["vocab_size"]
    if size < least:
        raise UserError(f"model.vocab_size={size} is too small; use {least} or more")
