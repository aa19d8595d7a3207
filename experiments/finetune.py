"""Fine-tune on one task: constant rate, fresh optimizer, best validation loss (paper, 3.1)."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from experiments.stage import Job, Outcome, load_params, open_parent
from experiments.text import training
from experiments.training import run_training
from gqa import optim
from gqa.train import State


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section finetune, and task, seed and variant."""
    parent = open_parent(parents[0])
    config = dataclasses.replace(parent.config, dropout_rate=settings["dropout_rate"])

    def start() -> State:
        params = load_params(parent, job)
        return State(jnp.int32(0), params, optim.adafactor().init(params))

    return run_training(
        name,
        job,
        folder,
        training(job.text, settings["task"], settings, settings["seed"]),
        start=start,
        config=config,
        info=parent.info
        | {"task": settings["task"], "recipe": settings, "variant": settings["variant"]},
        recipe=settings,
        learning_rate=optim.constant(settings["learning_rate"]),
        steps=settings["steps"],
        keep="best",
    )
