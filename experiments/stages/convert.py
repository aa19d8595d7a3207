"""Convert a pretrained checkpoint to fewer KV heads (paper, section 2.1); no training."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np

from experiments.stages.stage import NATS, Job, Outcome, Parent, load_state, open_parent, record
from experiments.stages.text import Training, training
from gqa import conversion
from gqa.checkpoints import checkpoint
from gqa.conversion import Conversion, calibration
from gqa.conversion.calibration import InputCovariance
from gqa.conversion.optimizer_state import convert_optimizer_state
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
    conversion = _convert(state.params, parent.config, settings, heads, batches, input_covariances)
    params, config = conversion.params, conversion.config
    jax.block_until_ready(params)
    seconds = time.monotonic() - begun + earlier
    opt_state = convert_optimizer_state(
        state.opt_state, state.params, conversion, settings["optimizer"]
    )
    before, after = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, params))
    print(f"{name}: {before:,} -> {after:,} parameters, optimizer state: {settings['optimizer']}")

    loss = loop.make_validation(config, job.mesh)(params, data.validation())
    divergence = loop.make_divergence(parent.config, config, job.mesh)
    apart = divergence(state.params, params, data.validation())
    print(f"{name}: validation loss {loss:.3f}, KL to the parent {apart:.3f}")
    step = int(state.step)
    info = parent.info | {"model": config.__dict__, "variant": settings["variant"]}
    info["orders"] = {name: order.tolist() for name, order in conversion.head_orders.items()}
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
) -> tuple[Iterable[InputCovariance], float]:
    """Return the parent's covariances, and the seconds an earlier stage took to measure them.

    They do not depend on the order of heads, and the stages that a process does in turn have them
    in common. Those of a large network are measured wherever they are wanted, a layer at a time.
    """
    config = parent.config
    measured = _MeasuredAnew(params, config, batches, attentions)
    whole = settings["grouping"] in conversion.MEASURED or "per_layer_budget" in settings
    as_converted = settings.get("sequential") and not whole
    matrices = config.num_encoder_layers + 2 * config.num_decoder_layers
    if not batches or as_converted or matrices * 8 * config.d_model**2 > KEPT:
        return measured, 0.0
    kept = _kept(parent.path, len(batches), attentions)
    if kept:
        input_covariances, seconds = kept[0]
        return input_covariances, seconds
    begun = time.monotonic()
    input_covariances = list(measured)
    kept.append((input_covariances, time.monotonic() - begun))
    return input_covariances, 0.0


@dataclasses.dataclass(frozen=True)
class _MeasuredAnew:
    """Covariances of a network that is too large to keep them: each iteration measures again."""

    params: dict
    config: Config
    batches: list[dict]
    attentions: tuple[str, ...]

    def __iter__(self) -> Iterator[InputCovariance]:
        return calibration.input_covariances(
            self.params, self.config, self.batches, self.attentions
        )


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
    input_covariances: Iterable[InputCovariance],
) -> Conversion:
    """Convert the parameters as the settings say."""
    s = settings
    weighing = {"space": s.get("space", "weight"), "shrinkage": s.get("shrinkage", 0.0)}
    by_activations = weighing["space"] != "weight"
    if "per_layer_budget" in s:
        heads = conversion.per_layer_kv_heads(
            params,
            config,
            heads,
            s["per_layer_budget"],
            input_covariances=input_covariances if by_activations else None,
            **weighing,
        )
    sequential = bool(s.get("sequential"))
    measured = s["grouping"] in conversion.MEASURED or (by_activations and not sequential)
    return conversion.convert(
        params,
        config,
        heads,
        s["method"],
        s["seed"],
        input_covariances=input_covariances if measured else None,
        batches=batches if sequential else None,
        grouping=s["grouping"],
        renorm=s["renorm"],
        **weighing,
    )


def _batches(data: Training, tokens: int) -> tuple[list[dict], int]:
    """Training batches, never those of the evaluation, with at least so many input tokens."""
    batches, seen = [], 0
    while seen < tokens:
        batches.append(next(data.batches))
        seen += int((batches[-1]["inputs"] > 0).sum())
    return batches, seen
