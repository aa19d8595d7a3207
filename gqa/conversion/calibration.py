"""Second moments of what attention reads, by sending calibration batches through the layers.

Conversions in closed form weigh a direction of a layer's input by how much the input moves along
it. All they need of the data are the second moments E[x x'] of these inputs, a matrix [D, D] each,
in float64. They come one layer at a time, since those of a large network would not fit together.
The letters are those of `gqa/model/attention.py`.
"""

from collections.abc import Generator, Iterable, Sequence
from functools import cache, partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gqa.model.attention import Segments
from gqa.model.config import Config
from gqa.model.layers import RelativePositionBias, RMSNorm
from gqa.model.transformer import DecoderLayer, EncoderLayer, Transformer, each_layer, shift_right

TOKENS = 65_536  # to calibrate on, where nothing else is asked for

# The attentions of the network and where their kernels are in the tree.
ATTENTIONS = {
    "encoder": ("encoder", "attention"),
    "self_attention": ("decoder", "self_attention"),
    "cross_attention": ("decoder", "cross_attention"),
}


class InputCovariance(NamedTuple):
    """What one attention ("encoder", "self_attention" or "cross_attention") of one layer reads.

    keys [D, D] is the mean of x x' over the tokens x that its keys and values are made of, queries
    [D, D] over those of its queries; both float64, over `num_keys` and `num_queries` tokens.
    """

    attention: str
    layer: int
    keys: np.ndarray
    queries: np.ndarray
    num_keys: int
    num_queries: int


class _Rows(NamedTuple):
    """A batch on its way: x [B, T, D], which positions are real [B, T], what all layers read."""

    x: np.ndarray
    real: np.ndarray
    shared: tuple


def input_covariances(
    params: dict,
    config: Config,
    batches: Iterable[dict[str, np.ndarray]],
    attentions: Sequence[str] = ("self_attention", "cross_attention"),
) -> Generator[InputCovariance, dict | None, None]:
    """Yield the `InputCovariance` of each of `attentions`, layer by layer; padding does not count.

    The activations of all batches are held on the host, [tokens, D] of them, and one layer's
    covariances at a time. `list(input_covariances(...))` keeps all, to convert with more than once.

    A caller that converts as it goes may `send` the new kernels of the attention it was just given
    (a dict of arrays, keys and values [D, K, H] for any K that divides the heads): the batches then
    go on through these, and what follows are the covariances of the network as converted so far.
    """
    batches = list(batches)
    sources = [_source(batch) for batch in batches]
    embed = jax.jit(partial(Transformer(config).apply, method="embed"))
    rows, bias = [], cache(partial(_bias, params["encoder"], config, True))
    for batch, source in zip(batches, sources, strict=True):
        S, packed = source.shape[1], "inputs_segments" in batch
        shared = (bias(S), Segments(source, source, packed))
        rows.append(_Rows(embed({"params": params}, batch["inputs"]), source > 0, shared))
    rows = yield from _stack("encoder", params, config, rows, attentions, None)
    norm = RMSNorm(jnp.dtype(config.dtype))
    encoded = [norm.apply({"params": params["encoder"]["norm"]}, r.x) for r in rows]
    memory = (
        second_moment(encoded, [r.real for r in rows]) if "cross_attention" in attentions else None
    )

    rows, bias = [], cache(partial(_bias, params["decoder"], config, False))
    for batch, source, y in zip(batches, sources, encoded, strict=True):
        targets, packed = batch["targets"], "targets_segments" in batch
        segments = batch["targets_segments"] if packed else np.ones_like(targets)
        own = Segments(segments, segments, packed) if packed else None
        shared = (y, bias(targets.shape[1]), own, Segments(segments, source, packed))
        x = embed({"params": params}, shift_right(targets, batch.get("targets_positions")))
        rows.append(_Rows(x, targets > 0, shared))
    yield from _stack("decoder", params, config, rows, attentions, memory)


def _source(batch: dict) -> np.ndarray:
    """Segments [B, S] of the inputs, 0 being padding."""
    inputs = np.asarray(batch["inputs"])
    return np.asarray(batch.get("inputs_segments", (inputs > 0).astype(np.int32)))


def _bias(stack: dict, config: Config, bidirectional: bool, length: int) -> Array:
    c = config
    module = RelativePositionBias(c.num_heads, c.num_buckets, c.max_distance, bidirectional)
    return module.apply({"params": stack["position_bias"]}, length, length)


def _stack(stack: str, params: dict, config: Config, rows: list[_Rows], attentions, memory):
    """Send rows through all layers of a stack; yields covariances, returns the rows that come
    out.
    """
    for index, layer in enumerate(each_layer(params[stack])):
        own = config.at_layer(index) if stack == "decoder" else config
        rows = yield from _layer(stack, layer, own, rows, attentions, memory, index)
    return rows


def _layer(stack, layer: dict, config: Config, rows: list[_Rows], attentions, memory, index: int):
    """`_stack` for one layer, which runs again from its input whenever its kernels change."""
    module = EncoderLayer if stack == "encoder" else DecoderLayer
    results = None
    for name, (_, attention) in ATTENTIONS.items():
        if name not in attentions or attention not in layer:
            continue
        results = results or [_run(module, config, layer, r.x, r.shared) for r in rows]
        normed = [captured[f"{attention}_norm"] for _, captured in results]
        queries, count = second_moment(normed, [r.real for r in rows])
        keys, num_keys = memory if name == "cross_attention" else (queries, count)
        new = yield InputCovariance(name, index, keys, queries, num_keys, count)
        if new is not None:
            layer = layer | {attention: _repeated(new, layer[attention])}
            results = None
    results = results or [_run(module, config, layer, r.x, r.shared) for r in rows]
    return [r._replace(x=x) for r, (x, _) in zip(rows, results, strict=True)]


@partial(jax.jit, static_argnums=(0, 1))
def _run(module: type[nn.Module], config: Config, params: dict, x: Array, shared: tuple):
    """A layer's output [B, T, D] and what each of its norms gave, by name."""
    (x, _), captured = module(config, train=False).apply(
        {"params": params},
        x,
        *shared,
        capture_intermediates=lambda module, _: isinstance(module, RMSNorm),
        mutable=["intermediates"],
    )
    return x, {name: calls["__call__"][0] for name, calls in captured["intermediates"].items()}


def _repeated(new: dict, old: dict) -> dict:
    """Kernels with as many KV heads as before, the same function: each head once a member."""
    times = old["key"].shape[1] // new["key"].shape[1]
    wide = {name: jnp.repeat(jnp.asarray(new[name]), times, axis=1) for name in ("key", "value")}
    return new | wide


def second_moment(xs: Sequence[Array], real: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """Mean [D, D] of x x' over the real positions of xs [B, T, D], in float64, and their number."""
    total, count = np.zeros((xs[0].shape[-1],) * 2), 0
    for x, mask in zip(xs, real, strict=True):
        tokens = np.asarray(x, np.float64)[mask]
        total += tokens.T @ tokens
        count += len(tokens)
    return total / max(count, 1), count
