"""Convert a pretrained checkpoint to fewer KV heads (paper, section 2.1); no training."""

import time
from pathlib import Path

import jax
import numpy as np

from experiments.stage import NATS, Job, Outcome, load_state, open_parent, record
from experiments.text import Training, training
from gqa import calibrate, checkpoint, convert, model, optim, train


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section convert, num_kv_heads for each attention, seed and variant."""
    parent = open_parent(parents[0])
    state, data_state = load_state(parent, job)
    recipe = parent.info["recipe"]
    data = training(job.text, recipe["task"], recipe, recipe["seed"])
    begun = time.monotonic()
    params, config, tokens = _convert(state.params, parent.config, settings, data)
    jax.block_until_ready(params)
    seconds = time.monotonic() - begun
    opt_state = optim.convert_state(state.opt_state, state.params, params, settings["optimizer"])
    before, after = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, params))
    print(f"{name}: {before:,} -> {after:,} parameters, optimizer state: {settings['optimizer']}")

    loss = train.make_validation(config, job.mesh)(params, data.validation())
    divergence = train.make_divergence(parent.config, config, job.mesh)
    apart = divergence(state.params, params, data.validation())
    print(f"{name}: validation loss {loss:.3f}, KL to the parent {apart:.3f}")
    step = int(state.step)
    info = parent.info | {"model": config.__dict__, "variant": settings["variant"]}
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        if checkpoints.latest is None:  # else a run was killed between this and its last line
            items = {"params": params, "opt_state": opt_state, "data": data_state, "config": info}
            checkpoints.save(step, items, {"validation_loss": loss})
    scales = convert.query_scale(state.params, params)
    scale = max((x for each in scales.values() for x in each), key=lambda x: abs(np.log(x)))
    return Outcome(
        [
            record("validation_loss", loss, NATS, n=data.validation_size),
            record("kl_to_parent", apart, NATS, n=data.validation_size),
            record("convert_seconds", seconds, "s"),
            record("calibration_tokens", tokens, "tokens"),
            record("query_scale", float(scale), "RMS of queries by the parent's"),
        ],
        str(step),
    )


def _convert(
    params: dict, config: model.Config, settings: dict, data: Training
) -> tuple[dict, model.Config, int]:
    """Converted parameters, their config, and how many input tokens it was calibrated on."""
    moments = batches = None
    tokens = 0
    if "calibration_tokens" in settings:
        attentions = [n for n, K in settings["num_kv_heads"].items() if config.num_heads > K]
        batches, tokens = _batches(data, settings["calibration_tokens"])
        if not settings.get("sequential"):
            moments, batches = calibrate.moments(params, config, batches, attentions), None
    params, config = convert.convert(
        params,
        config,
        settings["num_kv_heads"],
        settings["method"],
        settings["seed"],
        moments=moments,
        batches=batches,
        space=settings.get("space", "weight"),
        grouping=settings["grouping"],
        renorm=settings["renorm"],
        shrinkage=settings.get("shrinkage", 0.0),
    )
    return params, config, tokens


def _batches(data: Training, tokens: int) -> tuple[list[dict], int]:
    """Training batches, never those of the evaluation, with at least so many input tokens."""
    batches, seen = [], 0
    while seen < tokens:
        batches.append(next(data.batches))
        seen += int((batches[-1]["inputs"] > 0).sum())
    return batches, seen
