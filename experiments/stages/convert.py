"""Convert a pretrained checkpoint to fewer KV heads (paper, section 2.1); no training."""

import time
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np

from experiments.stages.stage import NATS, Job, Outcome, Parent, load_state, open_parent, record
from experiments.stages.text import Training, training
from gqa import conversion
from gqa.checkpoints import checkpoint
from gqa.conversion import calibration, grouping
from gqa.conversion.calibration import InputCovariance
from gqa.conversion.optimizer_state import convert_state
from gqa.model import transformer
from gqa.model.config import Config
from gqa.training import loop

KEPT = 2**30  # bytes of input_covariances, at most, that stay for the next stage of the same parent


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section convert, num_kv_heads for each attention, seed and variant."""
    parent = open_parent(parents[0])
    state, data_state = load_state(parent, job)
    recipe = parent.info["recipe"]
    data = training(job.text, recipe["task"], recipe, recipe["seed"])
    heads = {n: K for n, K in settings["num_kv_heads"].items() if parent.config.num_heads > K}
    begun = time.monotonic()
    batches, tokens = _batches(data, settings.get("calibration_tokens", 0))
    input_covariances, earlier = _calibrated(parent, state.params, settings, tuple(heads), batches)
    found = input_covariances() if settings["grouping"] in conversion.MEASURED else None
    orders = conversion.orders(state.params, heads, settings["grouping"], settings["seed"], found)
    regrouped = grouping.permuted(state.params, orders)
    params, config = _convert(regrouped, parent.config, settings, heads, batches, input_covariances)
    jax.block_until_ready(params)
    seconds = time.monotonic() - begun + earlier
    opt_state = grouping.permuted_moments(state.opt_state, state.params, orders)
    opt_state, old = (transformer.cut(tree, config) for tree in (opt_state, regrouped))
    opt_state = convert_state(opt_state, old, params, settings["optimizer"])
    before, after = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, params))
    print(f"{name}: {before:,} -> {after:,} parameters, optimizer state: {settings['optimizer']}")

    loss = loop.make_validation(config, job.mesh)(params, data.validation())
    divergence = loop.make_divergence(parent.config, config, job.mesh)
    apart = divergence(state.params, params, data.validation())
    print(f"{name}: validation loss {loss:.3f}, KL to the parent {apart:.3f}")
    step = int(state.step)
    info = parent.info | {"model": config.__dict__, "variant": settings["variant"]}
    info["orders"] = {attention: order.tolist() for attention, order in orders.items()}
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        if checkpoints.latest is None:  # else a run was killed between this and its last line
            items = {"params": params, "opt_state": opt_state, "data": data_state, "config": info}
            checkpoints.save(step, items, {"validation_loss": loss})
    scales = conversion.query_scale(state.params, params)
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


def _by_layer(name: str, config: Config, settings: dict) -> list[dict]:
    """The KV heads of each layer, where they were spread."""
    records = []
    for attention in settings.get("per_layer_budget", ()):
        heads = config.kv_heads(attention)
        print(f"{name}: KV heads by layer of {attention}: {' '.join(map(str, heads))}")
        records += [record(f"kv_heads_{attention}_{i}", K, "KV heads") for i, K in enumerate(heads)]
    return records


def _calibrated(
    parent: Parent, params: dict, settings: dict, attentions: tuple[str, ...], batches: list[dict]
) -> tuple[Callable[[], Iterable[InputCovariance]], float]:
    """What gives the parent's covariances, and the seconds an earlier stage took to measure them.

    They do not depend on the order of heads, and the stages that a process does in turn have them
    in common. Those of a large network are measured wherever they are wanted, a layer at a time.
    """
    config = parent.config
    measure = partial(calibration.input_covariances, params, config, batches, attentions)
    whole = settings["grouping"] in conversion.MEASURED or "per_layer_budget" in settings
    as_converted = settings.get("sequential") and not whole
    matrices = config.num_encoder_layers + 2 * config.num_decoder_layers
    if not batches or as_converted or matrices * 8 * config.d_model**2 > KEPT:
        return measure, 0.0
    kept = _kept(parent.path, len(batches), attentions)
    if kept:
        input_covariances, seconds = kept[0]
        return lambda: input_covariances, seconds
    begun = time.monotonic()
    input_covariances = list(measure())
    kept.append((input_covariances, time.monotonic() - begun))
    return lambda: input_covariances, 0.0


@lru_cache(maxsize=1)
def _kept(path: Path, batches: int, attentions: tuple[str, ...]) -> list:
    """The place for what was measured of a checkpoint; empty at first."""
    del path, batches, attentions
    return []


def _convert(
    params: dict,
    config: Config,
    settings: dict,
    heads: dict[str, int],
    batches: list[dict],
    input_covariances: Callable[[], Iterable[InputCovariance]],
) -> tuple[dict, Config]:
    """Converted parameters and their config, of parameters whose heads are in that order."""
    s = settings
    weigh = {"space": s.get("space", "weight"), "shrinkage": s.get("shrinkage", 0.0)}
    measured = weigh["space"] != "weight"
    if "per_layer_budget" in s:
        found = input_covariances() if measured else None
        heads = conversion.per_layer_kv_heads(
            params, config, heads, s["per_layer_budget"], input_covariances=found, **weigh
        )
    given = {"batches": batches} if s.get("sequential") else {}
    if measured and not given:
        given = {"input_covariances": input_covariances()}
    more = given | weigh | {"renorm": s["renorm"]}
    return conversion.convert(params, config, heads, s["method"], s["seed"], **more)


def _batches(data: Training, tokens: int) -> tuple[list[dict], int]:
    """Training batches, never those of the evaluation, with at least so many input tokens."""
    batches, seen = [], 0
    while seen < tokens:
        batches.append(next(data.batches))
        seen += int((batches[-1]["inputs"] > 0).sum())
    return batches, seen
