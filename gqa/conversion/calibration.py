"""Measure the covariances of the inputs of attentions, by running calibration batches.

closed_form.py and grouping.py weigh a direction of a layer's input by how much the input varies
along this direction. The only statistic they need is the uncentred covariance E[x x'] of each
input, a matrix [D, D] in float64. What attention reads of these inputs is measured on request, by
attended.py. Covariances are yielded one layer at a time, because those of a large network would not
fit in memory together. Letters are those of gqa/model/attention.py.
"""

from collections.abc import Generator, Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gqa.conversion.attended import AttendedCovariance, Reading, attended_covariance
from gqa.model.attention import Segments
from gqa.model.config import Config
from gqa.model.layers import RelativePositionBias, RMSNorm
from gqa.model.transformer import DecoderLayer, EncoderLayer, Transformer, each_layer, shift_right
from gqa.runtime.errors import UserError

TOKENS = 65_536  # default number of calibration tokens

# The attentions of the network, and the stack and the module that hold their kernels.
ATTENTIONS = {
    "encoder": ("encoder", "attention"),
    "self_attention": ("decoder", "self_attention"),
    "cross_attention": ("decoder", "cross_attention"),
}


class InputCovariance(NamedTuple):
    """The covariances of the inputs of one attention of one layer.

    Attributes:
        attention: "encoder", "self_attention" or "cross_attention".
        keys: [D, D] float64, the mean of x x' over the `num_keys` tokens x from which keys and
            values are computed. None if nothing was measured.
        queries: [D, D] float64, the same mean over the `num_queries` tokens from which queries are
            computed. In self-attention these are the same tokens.
        attended: what the query heads read of these tokens, for the method "prune" and the space
            "attention"; None if this was not measured.
    """

    attention: str
    layer: int
    keys: Float[np.ndarray, "D D"] | None
    queries: Float[np.ndarray, "D D"] | None
    num_keys: int
    num_queries: int
    attended: AttendedCovariance | None = None


def check_finite(covariance: InputCovariance) -> None:
    """Raise a UserError if a covariance has NaN or an infinite number.

    Finite parameters can have such covariances, if activations overflow.
    """
    for matrix in (covariance.keys, covariance.queries, *(covariance.attended or ())):
        if matrix is not None and not np.isfinite(matrix).all():
            raise UserError(
                f"the input covariance of {covariance.attention} in layer {covariance.layer} has "
                "NaN or infinity: the network's activations overflow; use a method that needs no "
                'calibration, such as "mean", or another checkpoint'
            )


class _Activations(NamedTuple):
    """A batch on its way through a stack.

    Attributes:
        x: [B, T, D], the input of the next layer.
        real: [B, T], false where a position is padding.
        shared: further arguments of every layer: position bias, segments, the encoder's output.
    """

    x: Array
    real: np.ndarray
    shared: tuple


def input_covariances(
    params: dict,
    config: Config,
    batches: Iterable[dict[str, Any]],
    attentions: Sequence[str] = ("self_attention", "cross_attention"),
    attended: bool = False,
) -> Generator[InputCovariance, dict | None, None]:
    """Yield the `InputCovariance` of each of `attentions`, layer by layer; padding is left out.

    The host holds the activations [tokens, D] of all batches and one layer's covariances.
    `list(input_covariances(...))` keeps them all, to convert more than once. With `attended` they
    come with what the query heads attend to, a matrix [D, D] for each head.

    A caller that converts on the way may `send` new kernels for the attention that was just
    yielded, a dict of arrays with keys and values [D, K, H] for any K that divides the heads. The
    batches then continue through these kernels, so later covariances are those of the network as
    converted so far.
    """
    # The encoder: embed all batches, then send them through it layer by layer. The decoder reads
    # the batches again, so they are kept in a list.
    batches = list(batches)

    # Any, because jitted functions take NumPy arrays too, and `Array` does not say so.
    sources: list[Any] = [_source(batch, config.pad_token_id) for batch in batches]
    embed = jax.jit(partial(Transformer(config).apply, method="embed"))

    # Batches of one length share a position bias.
    activations, bias = [], cache(partial(_shared_bias, params["encoder"], config, True))
    for batch, source in zip(batches, sources, strict=True):
        S, packed = source.shape[1], "inputs_segments" in batch
        shared: tuple = (bias(S), Segments(source, source, packed))
        x = embed({"params": params}, batch["inputs"])
        activations.append(_Activations(x, source > 0, shared))
    activations = yield from _stack(
        "encoder", params, config, activations, attentions, attended, None
    )

    # All cross-attentions make keys and values from the encoder's normalised output, so its
    # covariance is measured once.
    norm = RMSNorm(jnp.dtype(config.dtype))
    encoded: list[Any] = [
        norm.apply({"params": params["encoder"]["norm"]}, r.x) for r in activations
    ]
    memory = None
    if "cross_attention" in attentions:
        memory = second_moment(encoded, [r.real for r in activations])

    # The decoder, which reads the targets one position later and the encoder's output.
    activations, bias = [], cache(partial(_shared_bias, params["decoder"], config, False))
    for batch, source, y in zip(batches, sources, encoded, strict=True):
        targets, packed = batch["targets"], "targets_segments" in batch
        segments: Any = batch["targets_segments"] if packed else np.ones_like(targets)
        self_segments = Segments(segments, segments, packed) if packed else None
        shared = (y, bias(targets.shape[1]), self_segments, Segments(segments, source, packed))
        start = config.decoder_start_token_id
        previous = shift_right(targets, start, batch.get("targets_positions"))
        x = embed({"params": params}, previous)
        activations.append(_Activations(x, targets != config.pad_token_id, shared))
    yield from _stack("decoder", params, config, activations, attentions, attended, memory)


def _source(batch: dict, pad: int) -> np.ndarray:
    """Return the segment of each input position [B, S]; 0 is padding."""
    inputs = np.asarray(batch["inputs"])
    return np.asarray(batch.get("inputs_segments", (inputs != pad).astype(np.int32)))


def _shared_bias(stack: dict, config: Config, bidirectional: bool, length: int) -> Any:
    """Return the position bias of all layers of a stack, or None if each has its own."""
    if config.position_bias_per_layer:
        return None
    return _bias(stack, config, bidirectional, length)


def _bias(owner: dict, config: Config, bidirectional: bool, length: int) -> Any:
    """Return the position bias of a stack, or of a layer, for sequences of `length`."""
    module = RelativePositionBias(
        config.num_heads, config.num_buckets, config.max_distance, bidirectional
    )
    return module.apply({"params": owner["position_bias"]}, length, length)


def _stack(
    stack: str,
    params: dict,
    config: Config,
    activations: list[_Activations],
    attentions: Sequence[str],
    attended: bool,
    memory: tuple[np.ndarray, int] | None,
) -> Generator[InputCovariance, dict | None, list[_Activations]]:
    """Yield the covariances of a stack's layers, and return the activations after the last.

    `memory` is the covariance of the encoder's output and its number of tokens.
    """
    for index, layer in enumerate(each_layer(params[stack])):
        layer_config = config.at_layer(index) if stack == "decoder" else config
        activations = yield from _layer(
            stack, layer, layer_config, activations, attentions, attended, memory, index
        )
    return activations


def _layer(
    stack: str,
    layer: dict,
    config: Config,
    activations: list[_Activations],
    attentions: Sequence[str],
    attended: bool,
    memory: tuple[np.ndarray, int] | None,
    index: int,
) -> Generator[InputCovariance, dict | None, list[_Activations]]:
    """Yield the covariances of one layer, and return the activations behind the layer.

    When a caller replaces kernels of the layer, the layer runs again. So the covariance of a
    decoder's cross-attention is measured behind the converted self-attention.
    """
    module = EncoderLayer if stack == "encoder" else DecoderLayer

    # The outputs of the layer with its present kernels; None before it has run with them.
    results = None
    for name, (_, attention) in ATTENTIONS.items():
        if name not in attentions or attention not in layer:
            continue
        results = results or [_run(module, config, layer, r.x, r.shared) for r in activations]

        # An attention reads x after the norm of the same name.
        normed = [norms[f"{attention}_norm"] for _, norms in results]
        queries, count = second_moment(normed, [r.real for r in activations])
        keys, num_keys = (queries, count)
        if name == "cross_attention" and memory is not None:
            keys, num_keys = memory

        read = None
        if attended:
            readings = map(partial(_reading, name, layer, config), activations, normed)
            read = attended_covariance(layer[attention], readings, name == "self_attention")

        new_kernels = yield InputCovariance(name, index, keys, queries, num_keys, count, read)
        if new_kernels is not None:
            layer = layer | {attention: _repeated(new_kernels, layer[attention])}
            results = None
    results = results or [_run(module, config, layer, r.x, r.shared) for r in activations]
    return [r._replace(x=x) for r, (x, _) in zip(activations, results, strict=True)]


def _reading(name: str, layer: dict, config: Config, batch: _Activations, x: Array) -> Reading:
    """Return what attention `name` of a layer reads of a batch; x [B, T, D] is its normed input."""
    if name == "cross_attention":
        encoded, _, _, cross_segments = batch.shared
        return Reading(x, encoded, batch.real, None, cross_segments)

    *_, bias, segments = batch.shared if name == "encoder" else batch.shared[:3]
    if config.position_bias_per_layer:
        bias = _bias(layer, config, name == "encoder", x.shape[1])
    return Reading(x, x, batch.real, bias, segments)


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    module: type[nn.Module], config: Config, params: dict, x: Array, shared: tuple
) -> tuple[Array, dict[str, Array]]:
    """Return a layer's output [B, T, D], and the output of each of its norms by name.

    The norms are read out of the layer as it is (`capture_intermediates`), so that calibration does
    not repeat the order of a layer's parts.
    """
    (x, _), captured = module(config, train=False).apply(
        {"params": params},
        x,
        *shared,
        capture_intermediates=lambda module, _: isinstance(module, RMSNorm),
        mutable=["intermediates"],
    )
    return x, {name: calls["__call__"][0] for name, calls in captured["intermediates"].items()}


def _repeated(new: dict, old: dict) -> dict:
    """Repeat new KV heads to the old number, so that the layer's compiled shapes stay the same."""
    times = old["key"].shape[1] // new["key"].shape[1]
    wide = {name: jnp.repeat(jnp.asarray(new[name]), times, axis=1) for name in ("key", "value")}
    return new | wide


def second_moment(
    xs: Sequence[Float[Array, "_ _ D"]], real: Sequence[Bool[np.ndarray, "_ _"]]
) -> tuple[Float[np.ndarray, "D D"], int]:
    """Return the mean of x x' over all real positions, [D, D] in float64, and their number.

    Args:
        xs: activations [B, T, D] of each batch.
        real: [B, T] of each batch, false where a position is padding.
    """
    total, count = np.zeros((xs[0].shape[-1],) * 2), 0
    for x, mask in zip(xs, real, strict=True):
        # On the host in float64: the small eigenvalues would be lost in a sum in float32.
        tokens = np.asarray(x, np.float64)[mask]
        total += tokens.T @ tokens
        count += len(tokens)
    return total / max(count, 1), count
