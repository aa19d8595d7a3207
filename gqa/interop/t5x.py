"""T5 checkpoints of T5X: its trees' names, each array a zarr folder, scanned layers or not.

A T5X checkpoint has no config, but the names and shapes of its arrays determine the network: its
sizes, whether the MLP is gated, whether the logits are tied. Where layers are scanned, they lie
along axis 1 of their arrays. Checkpoints of Hugging Face are read in huggingface/.
"""

import functools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore

from gqa.checkpoints import pieces
from gqa.checkpoints.pieces import Index, Source
from gqa.interop.safetensors_files import naming
from gqa.model.config import GATED_GELU, RELU, Config
from gqa.runtime.errors import UserError

# Our names of parameters, and T5X's names of arrays. This table holds within a layer.
ATTENTION = {"query": "query", "key": "key", "value": "value", "out": "out"}
MLP = {"mlp_norm/scale": "pre_mlp_layer_norm.scale"} | {
    f"mlp/{name}": f"mlp.{name}.kernel" for name in ("wi_0", "wi_1", "wo")
}
ENCODER_LAYER = {
    "attention_norm/scale": "pre_attention_layer_norm.scale",
    **{f"attention/{ours}": f"attention.{theirs}.kernel" for ours, theirs in ATTENTION.items()},
    **MLP,
}
DECODER_LAYER = {
    "self_attention_norm/scale": "pre_self_attention_layer_norm.scale",
    "cross_attention_norm/scale": "pre_cross_attention_layer_norm.scale",
    **{f"self_attention/{x}": f"self_attention.{y}.kernel" for x, y in ATTENTION.items()},
    **{
        f"cross_attention/{x}": f"encoder_decoder_attention.{y}.kernel"
        for x, y in ATTENTION.items()
    },
    **MLP,
}
LAYERS = {"encoder": ENCODER_LAYER, "decoder": DECODER_LAYER}
OUTSIDE_LAYERS = {
    "embedding": "token_embedder.embedding",
    "encoder/norm/scale": "encoder.encoder_norm.scale",
    "decoder/norm/scale": "decoder.decoder_norm.scale",
    "logits": "decoder.logits_dense.kernel",
}
# T5X's names of a position bias, which a stack has once or in each layer.
BIASES = ("relpos_bias.rel_embedding", "relative_posemb.rel_embedding")
TABLE = "position_bias/table"
PREFIX, STEP = "target.", "checkpoint_"


class _Arrays(NamedTuple):
    """The arrays of a checkpoint: the kvstore that has them, and each array's zarr driver."""

    store: dict
    drivers: dict[str, str]

    def open(self, name: str) -> tensorstore.TensorStore:
        if name not in self.drivers:
            raise UserError(f"array {PREFIX}{name} is missing")
        store = self.store | {"path": f"{self.store['path']}{PREFIX}{name}/"}
        try:
            return tensorstore.open(
                {"driver": self.drivers[name], "kvstore": store}, read=True
            ).result()
        except ValueError as error:
            raise UserError(f"array {PREFIX}{name}: {error}") from error


def open_folder(folder: str | os.PathLike) -> Source:
    """Open a T5X checkpoint, or the last one in a folder of several; arrays are read when asked.

    An array is read as a whole; with scanned layers it holds all layers of a stack.

    Raises:
        UserError: for an array that is missing, not expected, or of a shape that does not fit.
    """
    folder = _find(Path(folder))
    with naming(folder):
        arrays = _list(folder)
        stacks = {stack: _stack(arrays, stack) for stack in LAYERS}
        config = _config(arrays, stacks)
        shapes = pieces.shapes(config)
        arrays_of = {name: _theirs(name, stacks, config) for name in shapes}
        for name, group in arrays_of.items():
            _check(arrays, group, name, shapes[name])
        known = {theirs for group in arrays_of.values() for theirs in group}
        if extra := sorted(arrays.drivers.keys() - known):
            raise UserError(f"array {PREFIX}{extra[0]} is not one of T5's ({len(extra)} in all)")
    chunks = {name: (1, *x[1:]) if "/layers/" in name else x for name, x in shapes.items()}
    return Source(config, chunks, functools.partial(_blocks, arrays, arrays_of, shapes))


def _find(folder: Path) -> Path:
    try:
        steps = [p for p in folder.glob(f"{STEP}*") if p.name.removeprefix(STEP).isdecimal()]
        if steps:
            folder = max(steps, key=lambda path: int(path.name.removeprefix(STEP)))
        for place in (folder / "state", folder):
            if (place / "manifest.ocdbt").exists() or next(place.glob(f"{PREFIX}*"), None):
                return place
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    raise UserError(f"{folder}: no T5X checkpoint; it would have folders {PREFIX}...")


def _list(folder: Path) -> _Arrays:
    store = {"driver": "file", "path": f"{folder.absolute()}/"}
    if (folder / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": ""}
        keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
    else:
        keys = [path.relative_to(folder).as_posix() for path in folder.glob(f"{PREFIX}*/*z*")]
    drivers = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
    driver_of = {
        key.removeprefix(PREFIX).removesuffix(end): driver
        for key in keys
        for end, driver in drivers.items()
        if key.startswith(PREFIX) and key.endswith(end)
    }
    return _Arrays(store, driver_of)


class _Stack(NamedTuple):
    """The names of the arrays of a stack.

    Attributes:
        prefix: of the arrays of a layer: "encoder.layers_{}.", or "encoder.encoder." if scanned.
        bias: the array of the position bias.
    """

    prefix: str
    layers: int
    scanned: bool
    bias: str


def _stack(arrays: _Arrays, stack: str) -> _Stack:
    indices = [
        int(match[1])
        for name in arrays.drivers
        if (match := re.match(rf"{stack}\.layers_(\d+)\.", name))
    ]
    if indices:
        prefix, scanned, layers = f"{stack}.layers_{{}}.", False, max(indices) + 1
    else:
        prefix, scanned = f"{stack}.layers.", True
        if not any(name.startswith(prefix) for name in arrays.drivers):
            prefix = f"{stack}.{stack}."
        layers = arrays.open(f"{prefix}pre_mlp_layer_norm.scale").shape[-1]
    places = [f"{place}{bias}" for place in (f"{stack}.", prefix) for bias in BIASES]
    # If there is no bias, the first place is the one that the error names as missing.
    bias = next((place for place in places if place.format(0) in arrays.drivers), places[0])
    return _Stack(prefix, layers, scanned, bias)


def _config(arrays: _Arrays, stacks: dict[str, _Stack]) -> Config:
    vocab_size, d_model = arrays.open(OUTSIDE_LAYERS["embedding"]).shape
    decoder, encoder = stacks["decoder"], stacks["encoder"]
    heads, *_, buckets = arrays.open(decoder.bias.format(0)).shape
    gated = f"{decoder.prefix}mlp.wi_0.kernel".format(0) in arrays.drivers
    wide = "mlp.wi_0.kernel" if gated else "mlp.wi.kernel"

    def size(stack: _Stack, name: str) -> int:
        """Return the number of outputs of a kernel of one layer."""
        numbers = math.prod(arrays.open(f"{stack.prefix}{name}".format(0)).shape)
        return numbers // (d_model * (stack.layers if stack.scanned else 1))

    head_dim = size(decoder, "self_attention.query.kernel") // heads
    return Config(
        vocab_size,
        d_model,
        size(decoder, wide),
        heads,
        head_dim,
        encoder.layers,
        decoder.layers,
        size(encoder, "attention.key.kernel") // max(head_dim, 1),
        size(decoder, "self_attention.key.kernel") // max(head_dim, 1),
        size(decoder, "encoder_decoder_attention.key.kernel") // max(head_dim, 1),
        activation=GATED_GELU if gated else RELU,
        tied_logits=OUTSIDE_LAYERS["logits"] not in arrays.drivers,
        num_buckets=buckets,
    )


def _theirs(name: str, stacks: dict[str, _Stack], config: Config) -> list[str]:
    """Return the arrays of one of our parameters: one, or one for each layer if not scanned."""
    if name in OUTSIDE_LAYERS:
        return [OUTSIDE_LAYERS[name]]
    stack, _, rest = name.partition("/")
    where = stacks[stack]
    pattern = where.bias
    if rest != TABLE:
        theirs = LAYERS[stack][rest.removeprefix("layers/")]
        pattern = where.prefix + theirs.replace(
            "wi_0", "wi" if config.activation == RELU else "wi_0"
        )
    return list(dict.fromkeys(pattern.format(i) for i in range(where.layers)))


def _check(arrays: _Arrays, group: list[str], name: str, shape: tuple[int, ...]) -> None:
    if name.endswith(TABLE):
        _table(arrays, group)
        return
    numbers = math.prod(shape) // (len(group) if "/layers/" in name else 1)
    for theirs in group:
        stored = arrays.open(theirs).shape
        if math.prod(stored) != numbers:
            raise UserError(
                f"array {PREFIX}{theirs} has shape {stored}, expected {numbers} numbers"
            )


def _table(arrays: _Arrays, group: list[str]) -> np.ndarray:
    """Return the position bias of a stack [buckets, N]; theirs is [N, buckets] or has layers."""
    stored = [arrays.open(name).read().result() for name in group]
    tables = np.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in stored], 1)
    if not np.array_equal(tables, np.broadcast_to(tables[:, :1], tables.shape)):
        raise UserError(
            f"array {PREFIX}{group[0]} differs from layer to layer, as in umT5; our network has "
            "one position bias for all layers of a stack"
        )
    return tables[:, 0].T.astype(np.float32)


def _blocks(
    arrays: _Arrays,
    arrays_of: dict[str, list[str]],
    shapes: dict[str, tuple[int, ...]],
    name: str,
) -> Iterator[tuple[Index, np.ndarray]]:
    shape, group = shapes[name], arrays_of[name]
    if name.endswith(TABLE):
        yield (slice(None),), _table(arrays, group)
        return
    for i, theirs in enumerate(group):
        array = arrays.open(theirs).read().result().astype(np.float32, copy=False)
        if "/layers/" not in name:
            yield (slice(None),), array.reshape(shape)
        elif re.search(r"\.layers_\d+\.", theirs):
            yield (i,), array.reshape(shape[1:])
        else:
            for layer in range(shape[0]):
                yield (layer,), array[:, layer].reshape(shape[1:])
