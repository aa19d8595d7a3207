"""Fine-tune on one task: constant rate, fresh optimizer, best validation loss (paper, 3.1)."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from experiments.stages.folder import Outcome, StageFolder
from experiments.stages.inputs import Job, load_params, open_parent
from experiments.stages.settings import FinetuneSettings
from experiments.stages.text import training
from experiments.stages.training import TrainingSpec, run_training
from gqa.training import optimizer
from gqa.training.training_step import State


def run(
    label: str, settings: FinetuneSettings, folder: StageFolder, parents: list[Path], job: Job
) -> Outcome:
    """Train the parent's parameters on the examples of `settings.recipe.task`."""
    parent, recipe = open_parent(parents[0]), settings.recipe
    # Fine-tuning has a dropout rate of its own, while the parent's config has that of pretraining.
    info = dataclasses.replace(
        parent.info,
        model=dataclasses.replace(
            parent.config, dropout_rate=recipe.dropout_rate, remat=job.setup.remat
        ),
        recipe=recipe,
        variant=settings.variant,
        task=recipe.task,
    )

    def start() -> State:
        params = load_params(parent, job)
        return State(jnp.int32(0), params, optimizer.adafactor().init(params))

    spec = TrainingSpec(info, recipe, recipe.steps, keep="best")
    return run_training(label, job, folder, training(job.text, recipe, "finetune"), start, spec)
