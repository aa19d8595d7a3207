"""Convert a pretrained checkpoint to fewer KV heads (paper, section 2.1); no training."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments.stage import NATS, Job, Outcome, load_state, open_parent, record
from experiments.text import Training, training
from gqa import calibrate, checkpoint, convert, model, optim, train
from gqa.convert import grouping


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section convert, num_kv_heads for each attention, seed and variant."""
    parent = open_parent(parents[0])
    state, data_state = load_state(parent, job)
    recipe = parent.info["recipe"]
    data = training(job.text, recipe["task"], recipe, recipe["seed"])
    begun = time.monotonic()
    heads = {n: K for n, K in settings["num_kv_heads"].items() if parent.config.num_heads > K}
    batches, tokens = _batches(data, settings.get("calibration_tokens", 0))
    moments = partial(calibrate.moments, batches=batches, attentions=tuple(heads))
    orders = _orders(state.params, parent.config, settings, heads, moments)
    regrouped = grouping.permuted(state.params, orders)
    params, config = _convert(regrouped, parent.config, settings, heads, batches, moments)
    jax.block_until_ready(params)
    seconds = time.monotonic() - begun
    opt_state = grouping.permuted_moments(state.opt_state, state.params, orders)
    opt_state, old = (model.cut(tree, config) for tree in (opt_state, regrouped))
    opt_state = optim.convert_state(opt_state, old, params, settings["optimizer"])
    before, after = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, params))
    print(f"{name}: {before:,} -> {after:,} parameters, optimizer state: {settings['optimizer']}")

    loss = train.make_validation(config, job.mesh)(params, data.validation())
    divergence = train.make_divergence(parent.config, config, job.mesh)
    apart = divergence(state.params, params, data.validation())
    print(f"{name}: validation loss {loss:.3f}, KL to the parent {apart:.3f}")
    step = int(state.step)
    info = parent.info | {"model": config.__dict__, "variant": settings["variant"]}
    info["orders"] = {attention: order.tolist() for attention, order in orders.items()}
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
            *_by_layer(name, config, settings),
        ],
        str(step),
    )


def _by_layer(name: str, config: model.Config, settings: dict) -> list[dict]:
    """The KV heads of each layer, where they were spread."""
    records = []
    for attention in settings.get("spread", ()):
        heads = config.kv_heads(attention)
        print(f"{name}: KV heads by layer of {attention}: {' '.join(map(str, heads))}")
        records += [record(f"kv_heads_{attention}_{i}", K, "KV heads") for i, K in enumerate(heads)]
    return records


def _orders(
    params: dict, config: model.Config, settings: dict, heads: dict[str, int], moments: Callable
) -> dict[str, np.ndarray]:
    """The order of heads that the grouping wants, for `grouping.permuted`."""
    measured = settings["grouping"] in convert.MEASURED
    found = moments(params, config) if measured else None
    return convert.orders(params, heads, settings["grouping"], settings["seed"], found)


def _convert(
    params: dict,
    config: model.Config,
    settings: dict,
    heads: dict[str, int],
    batches: list[dict],
    moments: Callable,
) -> tuple[dict, model.Config]:
    """Converted parameters and their config, of parameters whose heads are in that order."""
    s = settings
    weigh = {"space": s.get("space", "weight"), "shrinkage": s.get("shrinkage", 0.0)}
    measured = weigh["space"] != "weight"
    if "spread" in s:
        found = moments(params, config) if measured else None
        heads = convert.spread(params, config, heads, s["spread"], moments=found, **weigh)
    given = {"batches": batches} if s.get("sequential") else {}
    if measured and not given:
        given = {"moments": moments(params, config)}
    more = given | weigh | {"renorm": s["renorm"]}
    return convert.convert(params, config, heads, s["method"], s["seed"], **more)


def _batches(data: Training, tokens: int) -> tuple[list[dict], int]:
    """Training batches, never those of the evaluation, with at least so many input tokens."""
    batches, seen = [], 0
    while seen < tokens:
        batches.append(next(data.batches))
        seen += int((batches[-1]["inputs"] > 0).sum())
    return batches, seen
