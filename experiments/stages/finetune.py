"""Fine-tune on one task: constant rate, fresh optimizer, best validation loss (paper, 3.1)."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from experiments.stages.stage import Job, Outcome, load_params, open_parent
from experiments.stages.text import training
from experiments.stages.training import run_training
from gqa.training import optimizer
from gqa.training.loop import State


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section finetune, and task, seed and variant."""
    parent = open_parent(parents[0])
    config = dataclasses.replace(parent.config, dropout_rate=settings["dropout_rate"])

    def start() -> State:
        params = load_params(parent, job)
        return State(jnp.int32(0), params, optimizer.adafactor().init(params))

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
        learning_rate=optimizer.constant(settings["learning_rate"]),
        steps=settings["steps"],
        keep="best",
    )
