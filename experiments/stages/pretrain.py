"""Train a network from scratch, or take another program's checkpoint in its place.

The network is the multi-head parent, or a grouped one that is compared with converted networks.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.stages import initial_checkpoint
from experiments.stages.folder import NATS, Outcome, StageFolder, record
from experiments.stages.inputs import CheckpointInfo, Job, load_params, open_parent
from experiments.stages.settings import InitialCheckpoint, PretrainSettings
from experiments.stages.text import Training, training
from experiments.stages.training import TrainingSpec, run_training
from experiments.stages.typed_json import to_json
from gqa.checkpoints.checkpoint import Checkpoints
from gqa.model import transformer
from gqa.runtime import hardware
from gqa.runtime.errors import CheckpointError, UserError
from gqa.training import training_step


def run(
    label: str, settings: PretrainSettings, folder: StageFolder, parents: list[Path], job: Job
) -> Outcome:
    """Pretrain a network on span corruption, or on examples, for `settings.recipe.steps` steps."""
    del parents  # pretraining builds on nothing
    if settings.vocabulary not in (None, job.text.tokenizer.hash):
        raise UserError(
            "the vocabulary has changed since this stage was planned; put back the old file of "
            "text.vocabulary, or the old text if the vocabulary was trained on it, or run the same "
            "command again"
        )

    recipe = settings.recipe
    config = dataclasses.replace(settings.model, dropout_rate=recipe.dropout_rate)
    if settings.initial_checkpoint is None:
        # Parameters and their gradients take 4 bytes each, in float32.
        size = transformer.count_params(config)
        hardware.check_memory(8 * size, f"training a network of {size:,} parameters")

    data = training(job.text, recipe)
    info = CheckpointInfo(config, job.text.tokenizer.hash, recipe, settings.variant)
    if settings.initial_checkpoint is not None:
        return _take(label, settings.initial_checkpoint, folder, info, data, job)

    # Each device makes its own part of the parameters, because the whole may fit on none.
    placed = training_step.shardings(training_step.abstract(config, job.mesh, job.layout))
    start = jax.jit(lambda: training_step.init(config, recipe.seed), out_shardings=placed)
    return run_training(label, job, folder, data, start, TrainingSpec(info, recipe, recipe.steps))


def _take(
    label: str,
    initial: InitialCheckpoint,
    folder: StageFolder,
    info: CheckpointInfo,
    data: Training,
    job: Job,
) -> Outcome:
    """Save another program's parameters as a checkpoint at step `pretrain.steps`.

    Uptraining goes on from that step, so its learning rate is that of a network pretrained for
    `pretrain.steps` steps. The place in the data and Adafactor's moments are at their beginning:
    other programs' checkpoints do not have them in a form that could be read.
    """
    source = initial_checkpoint.open_source(initial)
    initial_checkpoint.check_network(initial, source.config, info.model)
    step = info.recipe.steps
    with Checkpoints(folder.checkpoints) as checkpoints:
        # A stage that was killed between writing and measuring has the checkpoint already.
        if checkpoints.latest is None:
            moments = training_step.abstract(info.model, job.mesh, job.layout).opt_state
            items = {
                "opt_state": jax.tree.map(_zeros, moments),
                "config": to_json(info),
                "data": data.batches.get_state(),
            }
            checkpoints.write(step, source, items)

            # The files are read piece by piece, for minutes. If another checkpoint replaced them
            # meanwhile, the new one may be a mixture of the two.
            try:
                initial_checkpoint.check_contents(initial, source)
            except CheckpointError:
                checkpoints.discard_after(None)
                raise

        if checkpoints.measured is None:
            params = load_params(open_parent(folder.checkpoints), job)
            loss = training_step.make_validation(info.model, job.mesh)(params, data.validation())
            print(f"{label}: {initial.folder}, validation loss {loss:.3f}", flush=True)
            checkpoints.measure(step, {"validation_loss": loss})
        loss = checkpoints.metric(step)

    records = [
        record("validation_loss", loss, NATS, n=data.validation_size),
        # This run has trained nothing, whatever `pretrain.steps` says of the checkpoint.
        record("steps", 0, "steps"),
    ]
    return Outcome(records, str(step))


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype, device=x.sharding)
