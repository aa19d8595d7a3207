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

from gqa.checkpoints import ocdbt_nodes, pieces, step_folders, stored_arrays
from gqa.checkpoints.pieces import Index, Source
from gqa.interop.safetensors_files import check_folder, naming
from gqa.model.activations import GATED_GELU, RELU
from gqa.model.config import Config
from gqa.runtime import hardware, regular_files
from gqa.runtime.errors import CheckpointError

# Our names of parameters, and T5X's names of arrays. First the parameters within a layer.
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
STEP_FOLDER = re.compile(STEP + "[0-9]{1,18}")
# The files of an OCDBT database.
DATABASE = re.compile(r"manifest\.ocdbt$|d/|ocdbt\.process_[^/]*/")
FLOATS = ("float32", "bfloat16", "float16", "float64")
MAX_TABLE = 2**24  # numbers of a position bias: T5's largest has 32 x 128, in 24 layers


class _Arrays:
    """The arrays of a checkpoint by name, without the prefix "target.".

    Args:
        folder: with the arrays.
        drivers: TensorStore's name of each array's format.
        files: that hold the arrays.
    """

    def __init__(self, folder: Path, drivers: dict[str, str], files: tuple[Path, ...]):
        self.drivers, self.files = drivers, files
        self._folder, self._spec = folder, stored_arrays.kvstore(folder)
        self._store = tensorstore.KvStore.open(self._spec).result()
        self._headers: dict[str, stored_arrays.Header] = {}

    def shape(self, name: str, *dimensions: int) -> tuple[int, ...]:
        """Return the shape of an array with one of these numbers of dimensions.

        Raises:
            CheckpointError: naming the array, if it is missing, is not of floating numbers, or has
                another number of dimensions.
        """
        if name not in self.drivers:
            raise CheckpointError(f"array {PREFIX}{name} is missing")
        if name not in self._headers:
            self._headers[name] = stored_arrays.read_header(
                self._store, f"{PREFIX}{name}", self.drivers[name]
            )

        header = self._headers[name]
        if header.dtype not in FLOATS:
            raise CheckpointError(
                f"array {PREFIX}{name} has dtype {header.dtype}; use one of {', '.join(FLOATS)}"
            )
        if 0 in header.shape or (dimensions and len(header.shape) not in dimensions):
            raise CheckpointError(f"array {PREFIX}{name} has shape {header.shape}, not one of T5's")
        return header.shape

    def read(self, name: str) -> np.ndarray:
        """Return an array in float32.

        Raises:
            CheckpointError: naming the array, if a part of it is missing or damaged, is larger
                than its shape says, or has numbers that are not finite.
        """
        where = f"{self._folder}: array {PREFIX}{name}"
        hardware.check_memory(4 * math.prod(self.shape(name)), where)
        with naming(self._folder):
            stored_arrays.check_chunks(self._store, f"{PREFIX}{name}", self._headers[name])

        spec = {"driver": self.drivers[name], "kvstore": self._spec | {"path": self._path(name)}}
        try:
            # Otherwise TensorStore would give zeros for a file that was not copied.
            array = tensorstore.open(spec | {"fill_missing_data_reads": False}, read=True).result()
            values = array.read().result()
        except ValueError as error:
            raise CheckpointError(f"{where} cannot be read; copy it again. {error}") from error

        # A number of 64 bits may be infinite in float32, which the check below reports.
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
        pieces.check_finite(values, where)
        return values

    def _path(self, name: str) -> str:
        return f"{self._spec.get('path', '')}{PREFIX}{name}/"


def open_folder(folder: str | os.PathLike) -> Source:
    """Open a T5X checkpoint, or the last one in a folder of several; arrays are read when asked.

    An array is read as a whole; with scanned layers it holds all layers of a stack.

    Raises:
        CheckpointError: for an array that is missing, not expected, or of a shape or dtype that
            does not fit.
    """
    top = Path(folder)
    check_folder(top)
    folder = _find(top)
    # The folder that the user has named may be a link. What somebody else put into it may not.
    if not folder.resolve().is_relative_to(top.resolve()):
        raise CheckpointError(f"{folder}: is a link out of {top}; name the folder it leads to")
    with naming(folder):
        arrays = _list(folder)
        stacks = {stack: _stack(arrays, stack) for stack in LAYERS}
        config = _config(arrays, stacks)

        # Every array must fit its parameter, and no array may be left over: it would belong to
        # another network than the one read.
        shapes = pieces.shapes(config)
        arrays_of = {name: _theirs(name, stacks, config) for name in shapes}
        for name, group in arrays_of.items():
            _check(arrays, group, name, shapes[name], stacks)
        known = {theirs for group in arrays_of.values() for theirs in group}
        if extra := sorted(arrays.drivers.keys() - known):
            raise CheckpointError(
                f"array {PREFIX}{extra[0]} is not one of T5's ({len(extra)} in all)"
            )
    chunks = {name: (1, *x[1:]) if "/layers/" in name else x for name, x in shapes.items()}
    read = functools.partial(_blocks, arrays, arrays_of, shapes)
    return Source(config, shapes, chunks, read, arrays.files)


def _find(folder: Path) -> Path:
    try:
        steps = [p for p in folder.glob(f"{STEP}*") if STEP_FOLDER.fullmatch(p.name)]
        if steps:
            folder = max(steps, key=lambda path: int(path.name.removeprefix(STEP)))
        for place in (folder / "state", folder):
            if (place / "manifest.ocdbt").exists() or next(place.glob(f"{PREFIX}*"), None):
                return place
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from error
    raise CheckpointError(f"{folder}: no T5X checkpoint; it would have folders {PREFIX}...")


def _list(folder: Path) -> _Arrays:
    folder = folder.absolute()
    step_folders.check_path(folder)
    is_database = (folder / "manifest.ocdbt").exists()
    if is_database:
        # A database mixes all arrays in its files, which may lie anywhere in the folder. The files
        # of T5X lie in these folders.
        files = regular_files.list_inside(folder, folder)
        files = [path for path in files if DATABASE.match(path.relative_to(folder).as_posix())]

        ocdbt_nodes.check(folder)
        try:
            store = tensorstore.KvStore.open(stored_arrays.kvstore(folder)).result()
            keys = [key.decode("utf-8", "replace") for key in store.list().result()]
        except ValueError as error:
            raise CheckpointError(f"its database cannot be read; copy it again. {error}") from error
    else:
        # The files that describe an array have a "z" in their names: .zarray, .zattrs, zarr.json.
        # The chunks, which may be many, do not.
        keys = [path.relative_to(folder).as_posix() for path in folder.glob(f"{PREFIX}*/*z*")]

    drivers = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
    driver_of = {
        key.removeprefix(PREFIX).removesuffix(end): driver
        for key in keys
        for end, driver in drivers.items()
        if key.startswith(PREFIX) and key.endswith(end)
    }
    if not is_database:
        tops = [folder / f"{PREFIX}{name}" for name in driver_of]
        files = [path for top in tops for path in regular_files.list_inside(folder, top)]
    return _Arrays(folder, driver_of, tuple(path for path in files if path.name != ".DS_Store"))


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
    indices = {
        int(match[1])
        for name in arrays.drivers
        if (match := re.match(rf"{stack}\.layers_([0-9]{{1,9}})\.", name))
    }
    if indices:
        prefix, scanned, layers = f"{stack}.layers_{{}}.", False, max(indices) + 1

        # Every index up to the largest must occur. Otherwise one array "layers_999999999" alone
        # would give a network of a billion layers.
        missing = next((i for i in range(len(indices)) if i not in indices), None)
        if missing is not None:
            raise CheckpointError(f"array {PREFIX}{stack}.layers_{missing}... is missing")
    else:
        prefix, scanned = f"{stack}.layers.", True
        if not any(name.startswith(prefix) for name in arrays.drivers):
            prefix = f"{stack}.{stack}."
        # The scale of a scanned norm is [D, L].
        layers = arrays.shape(f"{prefix}pre_mlp_layer_norm.scale", 2)[-1]

    places = [f"{place}{bias}" for place in (f"{stack}.", prefix) for bias in BIASES]
    # If there is no bias, the first place is the one that the error names as missing.
    bias = next((place for place in places if place.format(0) in arrays.drivers), places[0])
    return _Stack(prefix, layers, scanned, bias)


def _config(arrays: _Arrays, stacks: dict[str, _Stack]) -> Config:
    vocab_size, d_model = arrays.shape(OUTSIDE_LAYERS["embedding"], 2)
    decoder, encoder = stacks["decoder"], stacks["encoder"]

    # A position bias is [N, buckets]; [N, L, buckets] if scanned layers have one each.
    heads, *_, buckets = arrays.shape(decoder.bias.format(0), 2, 3)

    gated = f"{decoder.prefix}mlp.wi_0.kernel".format(0) in arrays.drivers
    wide = "mlp.wi_0.kernel" if gated else "mlp.wi.kernel"

    def size(stack: _Stack, name: str) -> int:
        """Return the number of outputs of a kernel of one layer."""
        # All numbers divided by the inputs and layers. That holds whether heads are flattened or
        # not, and wherever the axis of layers is.
        numbers = math.prod(arrays.shape(f"{stack.prefix}{name}".format(0)))
        return numbers // (d_model * (stack.layers if stack.scanned else 1))

    # A query kernel that is too small gives a head of 0, which Config refuses. `max` keeps the
    # divisions before it from failing.
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
        pattern = where.prefix + theirs.replace("wi_0", "wi_0" if config.is_gated else "wi")

    # A name without {} is the same for all layers: scanned layers, or a bias that they share.
    return list(dict.fromkeys(pattern.format(i) for i in range(where.layers)))


def _check(
    arrays: _Arrays,
    group: list[str],
    name: str,
    shape: tuple[int, ...],
    stacks: dict[str, _Stack],
) -> None:
    """Compare the shapes of arrays with the shape of our parameter that they make up."""
    if name.endswith(TABLE):
        _table(arrays, group)
        return

    # T5X flattens the heads of attention kernels, or does not.
    is_stacked = "/layers/" in name
    shape = shape[1:] if is_stacked else shape
    allowed = {shape}
    if name.endswith(("/query", "/key", "/value")):
        allowed.add((shape[0], shape[1] * shape[2]))
    elif name.endswith("/out"):
        allowed.add((shape[0] * shape[1], shape[2]))

    # Scanned layers lie along axis 1.
    stack = stacks.get(name.partition("/")[0])
    if is_stacked and stack is not None and stack.scanned:
        allowed = {(first, stack.layers, *rest) for first, *rest in allowed}
    for theirs in group:
        if arrays.shape(theirs) not in allowed:
            expected = " or ".join(map(str, sorted(allowed, key=len)))
            raise CheckpointError(
                f"array {PREFIX}{theirs} has shape {arrays.shape(theirs)}, expected {expected}"
            )


def _table(arrays: _Arrays, group: list[str]) -> np.ndarray:
    """Return the position bias of a stack [buckets, N]; theirs is [N, buckets] or has layers."""
    for name in group:
        if math.prod(arrays.shape(name, 2, 3)) > MAX_TABLE:
            raise CheckpointError(f"array {PREFIX}{name} has shape {arrays.shape(name)}, too large")

    # Each array as [N, 1 or layers, buckets], so that all copies of the bias lie along axis 1.
    stored = [arrays.read(name) for name in group]
    tables = np.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in stored], 1)
    if not np.array_equal(tables, np.broadcast_to(tables[:, :1], tables.shape)):
        raise CheckpointError(
            f"array {PREFIX}{group[0]} differs from layer to layer, as in umT5; our network has "
            "one position bias for all layers of a stack"
        )
    return tables[:, 0].T


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
        array = arrays.read(theirs)
        if "/layers/" not in name:
            yield (slice(None),), array.reshape(shape)
        elif re.search(r"\.layers_\d+\.", theirs):
            yield (i,), array.reshape(shape[1:])
        else:
            # Scanned: one array holds all layers along axis 1.
            for layer in range(shape[0]):
                yield (layer,), array[:, layer].reshape(shape[1:])
