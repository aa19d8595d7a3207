"""Place arrays on devices: over which axes of the mesh each axis of an array is split.

`gqa/runtime/mesh.py` makes the mesh, and says what its axes "slice", "data" and "model" are for.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, tree_map_with_path

from gqa.runtime.mesh import Layout, by_rows, make_mesh

# Logical axis -> axes of the mesh that split it. An axis that is not listed is split over none.
TABLE = {
    "batch": ("slice", "data"),
    "rows": ("slice", "data", "model"),
    "embed": ("data",),  # only with Layout.fsdp
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("model",)),
}
# Logical axes of each parameter, by its name. Scanned layers have a layer axis before these.
AXES = {
    "embedding": ("vocab", "embed"),
    "logits": ("embed", "vocab"),
    "query": ("embed", "heads", "head_dim"),
    **dict.fromkeys(("key", "value"), ("embed", "kv_heads", "head_dim")),
    "out": ("heads", "head_dim", "embed"),
    **dict.fromkeys(("wi_0", "wi_1"), ("embed", "mlp")),
    "wo": ("mlp", "embed"),
    "scale": ("norm",),
    "table": ("buckets", "heads"),
    **dict.fromkeys(("key_pool", "value_pool"), ()),
}


def share(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count): this process reads part `index` of the `count` parts of a batch."""
    if not mesh.is_multi_process:
        return 0, 1

    # Which rows a process holds follows from the sharding of a batch with one row a device.
    rows: dict[int, set[int]] = {}  # by process
    places: Any = batch_sharding(mesh).devices_indices_map((mesh.size // mesh.shape["model"],))
    for device, (place,) in places.items():
        rows.setdefault(device.process_index, set()).add(place.start or 0)

    # Processes that share a network, along the axis "model", read the same rows: one part.
    parts = sorted({tuple(sorted(each)) for each in rows.values()})
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def param_shardings(tree: Any, mesh: Mesh, layout: Layout, params: Any = None) -> Any:
    """Return a NamedSharding for each leaf of a tree of parameters, by the leaf's name.

    Args:
        tree: parameters, with scanned layers or without, or an optimizer state of
            `gqa.training.optimizer`. Leaves are arrays or their shapes.
        params: for an optimizer state, the parameters that it belongs to. Moments are split like
            their parameters.
    """

    def on_leaf(path, leaf, state=None):
        # In inference a layer's weights are in one dict, and "self_key" is a "key" like any other.
        names = [key.key for key in path if isinstance(key, DictKey)]
        name = names[-1].removeprefix("self_").removeprefix("cross_")
        spec = _spec(AXES[name], leaf.shape, mesh, layout)
        if state is None:
            return NamedSharding(mesh, PartitionSpec(*spec))
        return _of_moments(state, AXES[name], leaf.shape, spec, mesh)

    if params is None:
        return tree_map_with_path(on_leaf, tree)
    return tree_map_with_path(on_leaf, params, tree)


def _spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, layout: Layout) -> tuple:
    """Return the entries of a PartitionSpec for a parameter with these logical axes."""
    if not axes:
        return ()

    # A scanned layer's parameters [L, ...] have an axis more than their name says, never split.
    unsplit = () if layout.fsdp else ("embed",)
    layer_axis = (None,) * (len(shape) - len(axes))
    sizes = shape[len(layer_axis) :]
    return layer_axis + tuple(
        None if axis in unsplit else _entry(axis, size, mesh)
        for axis, size in zip(axes, sizes, strict=True)
    )


def _entry(axis: str | None, size: int, mesh) -> tuple[str, ...] | None:
    """Return the axes of the mesh that split a logical axis; None if they do not divide `size`."""
    # Example: 16 heads on a mesh with model = 4 give ("model",); 6 heads, which 4 does not divide,
    # give None, and each device holds all of them.
    names = tuple(name for name in TABLE.get(axis or "", ()) if mesh.shape.get(name, 1) > 1)
    parts = math.prod(mesh.shape[name] for name in names)
    return names if names and size % parts == 0 else None


def _of_moments(state: Any, axes: tuple, shape: tuple, spec: tuple, mesh: Mesh) -> Any:
    """Return the shardings of Adafactor's moments of one parameter.

    Args:
        state: the moments, as `gqa.training.optimizer` keeps them.
        axes: logical axes of the parameter.
        shape: shape of the parameter.
        spec: entries of the parameter's PartitionSpec.
    """
    lead = len(shape) - len(axes)

    # Adafactor sees the parameter as a matrix, of which heads times head_dim is one side.
    if "head_dim" in axes:
        at = lead + axes.index("head_dim")
        shape = (*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])
        spec = (*spec[:at], *spec[at + 1 :])

    # A factored moment lacks one of the two largest axes: in optax v_row lacks the largest.
    largest = lead + np.argsort(shape[lead:])

    def on_leaf(path, moment):
        kept = list(range(len(shape)))
        if path[-1] in (GetAttrKey("v_row"), GetAttrKey("v_col")) and len(shape) - lead > 1:
            kept.remove(largest[-1 if path[-1] == GetAttrKey("v_row") else -2])
        if not spec or moment.shape != tuple(shape[i] for i in kept):
            # This leaf is a step count, or the placeholder of a moment that is not kept.
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*(spec[i] for i in kept)))

    return tree_map_with_path(on_leaf, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(tuple(n for n in TABLE["batch"] if n in mesh.shape)))


def num_parts(sharding: NamedSharding) -> int:
    """Return the number of parts into which the first axis is split."""
    names = sharding.spec[0]
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


class Caches(NamedTuple):
    """Shardings of what decoding reads.

    Args:
        self_attention: of the keys and values of each layer, whose first axis is the batch.
        cross_attention: likewise.
        mask: of the mask over inputs.
    """

    self_attention: list[NamedSharding]
    cross_attention: list[NamedSharding]
    mask: NamedSharding


def cache_sharding(config: Any, mesh: Mesh, layout: Layout, fused: bool = False) -> Caches:
    """Return the shardings of the KV caches of `gqa.inference`.

    Args:
        config: a gqa.Config.
        layout: a layout whose `kv_heads` is settled, by `gqa.runtime.mesh.resolve_layout`.
        fused: whether the arrays of cross-attention are [B, S, K, H]. Otherwise KV heads are
            their second axis.
    """

    def on(*axes: str | None) -> NamedSharding:
        names = (tuple(n for n in TABLE.get(axis or "", ()) if n in mesh.shape) for axis in axes)
        return NamedSharding(mesh, PartitionSpec(*names))

    # A cache that is split by rows uses all axes of the mesh for its first axis, so none is left
    # for the KV heads.
    def kv(K: int, *before: None) -> NamedSharding:
        return on("rows") if by_rows(K, layout) else on("batch", *before, "kv_heads")

    self_attention = [kv(K) for K in config.kv_heads("self_attention")]
    # In fused arrays the axis S stands before the KV heads, and is not split.
    cross_attention = [kv(K, *[None] * fused) for K in config.kv_heads("cross_attention")]
    some_by_rows = any(by_rows(K, layout) for K in config.kv_heads("cross_attention"))
    return Caches(self_attention, cross_attention, on("rows" if some_by_rows else "batch"))


def constrain(x: Array, *axes: str | None) -> Array:
    """Return x with its axes split as `TABLE` says, on the mesh that `jax.set_mesh` has set.

    Args:
        axes: a logical axis for each axis of x; None for an axis that is not split.

    Returns:
        x itself where no mesh is set, as on a single device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = (_entry(axis, size, mesh) for axis, size in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def repeat_heads(x: Array) -> Array:
    """Replicate the KV heads of x [B, S, K, H] until each device along "model" holds one."""
    # Example: K = 2 and model = 4 give the heads 0 0 1 1, one for each device.
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["model"] % x.shape[2] == 0:
        x = jax.numpy.repeat(x, mesh.shape["model"] // x.shape[2], axis=2)
    return constrain(x, "batch", None, "kv_heads", None)


def put(tree: Any, shardings: Any) -> Any:
    """Return the arrays of a tree, placed as `shardings` say.

    Args:
        tree: global arrays, or arrays that are equal in every process.
    """

    def on_leaf(x, sharding):
        # Where the mesh has devices of other processes, each process cuts the parts of its own
        # devices out of its copy of the array.
        if sharding.mesh.is_multi_process and getattr(x, "is_fully_addressable", True):
            whole = np.asarray(x)
            return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
        return jax.device_put(x, sharding)

    return jax.tree.map(on_leaf, tree, shardings)


def local_bytes(x: Any) -> int:
    """Return how many bytes of an array, or of its shape, the devices of this process hold."""
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        return x.size * x.dtype.itemsize
    bytes_per_device = math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return bytes_per_device * len(sharding.addressable_devices)


def share_copies(tree: Any) -> Any:
    """Return arrays that every process has a copy of as global arrays, without moving data."""
    processes = [
        [device for device in jax.devices() if device.process_index == index]
        for index in range(jax.process_count())
    ]

    def on_leaf(x):
        if not getattr(x, "is_fully_addressable", True):
            return x
        if not isinstance(getattr(x, "sharding", None), NamedSharding):
            x = jax.device_put(x, NamedSharding(make_mesh(local=True), PartitionSpec()))

        # The global mesh is the local one, in its order of devices, once for each process.
        mesh = x.sharding.mesh
        order = [jax.local_devices().index(device) for device in mesh.devices.flat]
        stacked = np.array([[devices[i] for i in order] for devices in processes])
        stacked = stacked.reshape(-1, *mesh.devices.shape)
        at = NamedSharding(Mesh(stacked, ("process", *mesh.axis_names)), x.sharding.spec)
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, at, parts)

    return jax.tree.map(on_leaf, tree)


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return a batch as global arrays, split over the axes "data" and "slice".

    Args:
        batch: the rows of this process, by the name of the array.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
