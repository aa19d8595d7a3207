"""Train the multi-head parent from scratch, or take another program's in its place."""

from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.stages import initial_checkpoint
from experiments.stages.stage import NATS, Job, Outcome, load_params, open_parent, record
from experiments.stages.text import Training, training
from experiments.stages.training import run_training
from gqa.checkpoints.checkpoint import Checkpoints
from gqa.model import transformer
from gqa.model.config import Config
from gqa.runtime import hardware
from gqa.training import loop, optimizer


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section pretrain, and model, seed and variant; init where given."""
    del parents  # there are none
    config = Config(**settings["model"] | {"dropout_rate": settings["dropout_rate"]})
    if "init" not in settings:
        size = transformer.count_params(config)
        # Parameters and their gradients, in float32.
        hardware.check_memory(8 * size, f"training a network of {size:,} parameters")
    data = training(job.text, settings["task"], settings, settings["seed"])
    if "init" in settings:
        return _take(name, settings, folder, config, data, job)
    # Each device makes its own part, since the whole may fit on none.
    placed = loop.shardings(loop.abstract(config, job.mesh, job.layout))
    start = jax.jit(lambda: loop.init(config, settings["seed"]), out_shardings=placed)
    return run_training(
        name,
        job,
        folder,
        data,
        start=start,
        config=config,
        info={"recipe": settings, "variant": settings["variant"]},
        recipe=settings,
        learning_rate=optimizer.rsqrt(settings["warmup"], settings["scale"]),
        steps=settings["steps"],
        keep="last",
    )


def _take(
    name: str, settings: dict, folder: Path, config: Config, data: Training, job: Job
) -> Outcome:
    """Put the parameters into a checkpoint at step `pretrain.steps`, where uptraining goes on.

    Its data and Adafactor's moments are at their beginning: other programs' are not to be had.
    """
    source = initial_checkpoint.open_source(settings["init"])
    initial_checkpoint.check_network(settings["init"], source.config, config)
    step, checkpoints = settings["steps"], folder / "checkpoints"
    with Checkpoints(checkpoints) as saved:
        if saved.latest is None:
            moments = loop.abstract(config, job.mesh, job.layout).opt_state
            info = {"recipe": settings, "variant": settings["variant"]}
            info |= {"model": config.__dict__, "vocabulary": job.text.tokenizer.hash}
            items = {"opt_state": jax.tree.map(_zeros, moments), "config": info}
            saved.write(step, source, items | {"data": data.batches.get_state()})
        if saved.measured is None:
            params = load_params(open_parent(checkpoints), job)
            loss = loop.make_validation(config, job.mesh)(params, data.validation())
            print(f"{name}: {settings['init']['folder']}, validation loss {loss:.3f}", flush=True)
            saved.measure(step, {"validation_loss": loss})
        loss = saved.metric(step)
    records = [
        record("validation_loss", loss, NATS, n=data.validation_size),
        record("steps", 0, "steps"),
    ]
    return Outcome(records, str(step))


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype, device=x.sharding)
