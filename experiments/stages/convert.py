"""Convert a pretrained checkpoint to fewer KV heads (paper, section 2.1); no training.

The conversion itself is `gqa.conversion`. This stage loads the parent, measures its activations
where the method needs them, and saves the grouped network with its optimizer state and the place in
the data.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.stages.folder import NATS, Outcome, StageFolder, record
from experiments.stages.inputs import Job, Parent, load_state, open_parent, pretrain_recipe
from experiments.stages.settings import ConvertSettings
from experiments.stages.text import Training, training
from experiments.stages.typed_json import to_json
from gqa import conversion
from gqa.checkpoints import checkpoint
from gqa.conversion import Conversion, calibration
from gqa.conversion.calibration import InputCovariance
from gqa.conversion.optimizer_state import convert_optimizer_state
from gqa.model.config import Config
from gqa.training import training_step

# Bytes of input covariances, at most, that stay in memory for the next stage of the same parent.
LARGEST_KEPT = 2**30


def run(
    label: str, settings: ConvertSettings, folder: StageFolder, parents: list[Path], job: Job
) -> Outcome:
    """Convert the parent to the KV heads of `settings.variant`, and compare the two networks."""
    variant, parent = settings.variant, open_parent(parents[0])
    state, data_state = load_state(parent, job)
    data = training(job.text, pretrain_recipe(parent, job))
    heads = {name: K for name, K in variant.heads.items() if parent.config.num_heads > K}

    # The time of a conversion is from the first calibration batch to the last converted array.
    begun = time.monotonic()
    batches, tokens = _calibration_batches(data, variant.calibration_tokens, parent.config)
    input_covariances, earlier_seconds = _measured(
        parent, state.params, settings, tuple(heads), batches
    )
    converted = _convert(state.params, parent.config, settings, heads, batches, input_covariances)
    params, config = converted.params, converted.config
    # JAX returns before the arrays are computed; the clock would stop too early.
    jax.block_until_ready(params)
    seconds = time.monotonic() - begun + earlier_seconds

    # Uptraining goes on with Adafactor's state, so the state has to fit the new parameters.
    opt_state = convert_optimizer_state(
        state.opt_state, state.params, converted, settings.optimizer
    )
    before, after = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, params))
    print(f"{label}: {before:,} -> {after:,} parameters, optimizer state: {settings.optimizer}")

    # Both numbers are taken before any uptraining, so they show what the conversion alone costs.
    loss = training_step.make_validation(config, job.mesh)(params, data.validation())
    divergence = training_step.make_divergence(parent.config, config, job.mesh)
    kl = divergence(state.params, params, data.validation())
    print(f"{label}: validation loss {loss:.3f}, KL to the parent {kl:.3f}")
    scale = _query_scale(state.params, params)

    # Uptraining with a learned pooling reorders the parent's heads again, and needs their order.
    info = dataclasses.replace(
        parent.info,
        model=config,
        variant=variant,
        head_orders={name: order.tolist() for name, order in converted.head_orders.items()},
    )
    with checkpoint.Checkpoints(folder.checkpoints) as checkpoints:
        # A stage that was killed after this checkpoint, before its outcome, is run again.
        if checkpoints.latest is None:
            items = {"params": params, "opt_state": opt_state, "data": data_state}
            items["config"] = to_json(info)
            # The step stays the parent's, so that the learning rate of uptraining goes on from it.
            checkpoints.save(parent.step, items, {"validation_loss": loss})
    return Outcome(
        [
            record("validation_loss", loss, NATS, n=data.validation_size),
            record("kl_to_parent", kl, NATS, n=data.validation_size),
            record("convert_seconds", seconds, "s"),
            record("calibration_tokens", tokens, "tokens"),
            record("query_scale", scale, "RMS of queries by the parent's"),
            *_heads_by_layer(label, config, settings),
        ],
        str(parent.step),
    )


def _query_scale(old: dict, new: dict) -> float:
    """Return how much larger than the parent's the queries are, in the layer that changed most."""
    scales = conversion.query_scale(old, new).values()
    # Queries that shrink to a half have changed as much as queries that double: hence the
    # logarithm.
    return float(max((x for layers in scales for x in layers), key=lambda x: abs(np.log(x))))


def _heads_by_layer(label: str, config: Config, settings: ConvertSettings) -> list[dict]:
    """Return the number of KV heads of each layer, where a budget was spread over the layers."""
    records = []
    for attention in settings.cache_lengths or ():
        heads = config.kv_heads(attention)
        print(f"{label}: KV heads by layer of {attention}: {' '.join(map(str, heads))}")
        records += [record(f"kv_heads_{attention}_{i}", K, "KV heads") for i, K in enumerate(heads)]
    return records


class _Measured(NamedTuple):
    """The input covariances of a checkpoint, what was measured, and the seconds it took.

    The first four fields identify the measurement.
    """

    checkpoint: Path
    num_batches: int
    attentions: tuple[str, ...]
    attended: bool
    input_covariances: list[InputCovariance]
    seconds: float


# The covariances that were measured last. They do not depend on method or order of heads, so the
# conversions of one parent that a process does in turn share them.
_last_measured: _Measured | None = None


@dataclasses.dataclass(frozen=True)
class _MeasuredAnew:
    """Covariances of a network that is too large to keep them: each iteration measures again."""

    params: dict
    config: Config
    batches: list[dict]
    attentions: tuple[str, ...]
    attended: bool

    def __iter__(self) -> Iterator[InputCovariance]:
        return calibration.input_covariances(
            self.params, self.config, self.batches, self.attentions, self.attended
        )


def _measured(
    parent: Parent,
    params: dict,
    settings: ConvertSettings,
    attentions: tuple[str, ...],
    batches: list[dict],
) -> tuple[Iterable[InputCovariance], float]:
    """Return the parent's covariances, and the seconds an earlier stage took to measure them.

    The seconds are 0.0 if this stage measures the covariances itself. The covariances of a large
    network are not kept: they are measured wherever they are wanted, a layer at a time.
    """
    global _last_measured
    config, variant = parent.config, settings.variant
    attended = conversion.needs_attended(
        variant.method, variant.space or "weight", variant.per_layer_budget
    )
    measured_anew = _MeasuredAnew(params, config, batches, attentions, attended)
    # Sequential conversion measures the network as converted so far, unless something before it
    # needs the covariances of the whole parent.
    needs_parent = variant.grouping in conversion.MEASURED or variant.per_layer_budget
    # Each attention has one matrix [D, D] of float64. For example, 24 encoder and 24 decoder layers
    # with D = 1024 have 72 matrices of 8 MiB, which are kept; with D = 4096 they are not.
    # What each head attends to is a matrix for every head besides.
    matrices = config.num_encoder_layers + 2 * config.num_decoder_layers
    matrices *= 1 + attended * config.num_heads
    num_bytes = matrices * 8 * config.d_model**2
    if not batches or (variant.sequential and not needs_parent) or num_bytes > LARGEST_KEPT:
        return measured_anew, 0.0

    kept, identity = _last_measured, (parent.path, len(batches), attentions, attended)
    if kept is not None and kept[:4] == identity:
        return kept.input_covariances, kept.seconds

    begun = time.monotonic()
    input_covariances = list(measured_anew)
    _last_measured = _Measured(*identity, input_covariances, time.monotonic() - begun)
    return input_covariances, 0.0


def _convert(
    params: dict,
    config: Config,
    settings: ConvertSettings,
    heads: dict[str, int],
    batches: list[dict],
    input_covariances: Iterable[InputCovariance],
) -> Conversion:
    """Convert the parameters as the settings say."""
    variant = settings.variant
    space, shrinkage = variant.space or "weight", variant.shrinkage or 0.0
    by_activations = space != "weight"

    # One number of KV heads for each attention becomes a number for each layer. In the space
    # "weight" a layer's loss follows from its kernels alone, without covariances.
    num_kv_heads: Mapping[str, int | tuple[int, ...]] = heads
    if settings.cache_lengths is not None:
        num_kv_heads = conversion.per_layer_kv_heads(
            params,
            config,
            heads,
            settings.cache_lengths,
            input_covariances=input_covariances if by_activations else None,
            space=space,
            shrinkage=shrinkage,
        )

    # A sequential conversion measures each layer itself, from `batches`, once the layers before it
    # are converted. Only a grouping that compares activations still needs the parent's covariances.
    grouping = variant.grouping or "contiguous"
    measured = grouping in conversion.MEASURED or (
        conversion.needs_input_covariances(variant.method, space) and not variant.sequential
    )
    return conversion.convert(
        params,
        config,
        dict(num_kv_heads),
        variant.method,
        variant.seed,
        input_covariances=input_covariances if measured else None,
        batches=batches if variant.sequential else None,
        space=space,
        grouping=grouping,
        renorm=variant.renorm,
        shrinkage=shrinkage,
    )


def _calibration_batches(
    data: Training, tokens: int | None, config: Config
) -> tuple[list[dict], int]:
    """Return training batches with at least `tokens` input tokens in all, and how many they have.

    They are the next batches that uptraining would see, never those of the validation.
    """
    batches: list[dict] = []
    num_tokens = 0
    while num_tokens < (tokens or 0):
        batches.append(next(data.batches))
        num_tokens += int((batches[-1]["inputs"] != config.pad_token_id).sum())
    return batches, num_tokens
