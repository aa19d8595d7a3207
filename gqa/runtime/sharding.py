"""Where arrays live: one table says over which axes of the mesh each axis of an array is split.

`gqa.runtime.mesh` makes the mesh, and says what its axes "slice", "data" and "model" are for.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, tree_map_with_path

from gqa.runtime.mesh import Layout, by_rows, make_mesh

# Logical axis -> axes of the mesh; those that are not here are whole everywhere.
TABLE = {
    "batch": ("slice", "data"),
    "rows": ("slice", "data", "model"),
    "embed": ("data",),  # with fsdp
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("model",)),
}
# Of each parameter, by its name; scanned layers put one more before them.
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
    """Which part of every batch this process reads, and of how many."""
    if not mesh.is_multi_process:
        return 0, 1
    rows: dict[int, set[int]] = {}  # first rows of the parts that each process holds
    places: Any = batch_sharding(mesh).devices_indices_map((mesh.size // mesh.shape["model"],))
    for device, (place,) in places.items():
        rows.setdefault(device.process_index, set()).add(place.start or 0)
    # Processes that the axis "model" joins read the same rows.
    parts = sorted({tuple(sorted(each)) for each in rows.values()})
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def param_shardings(tree: Any, mesh: Mesh, layout: Layout, params: Any = None) -> Any:
    """A NamedSharding for each leaf of parameters, scanned or not, by its name.

    For an optimizer state of `gqa.optim`, give the `params` it is of: moments follow them. Leaves
    are arrays or their shapes.
    """

    def on_leaf(path, leaf, state=None):
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
    if not axes:
        return ()
    whole = () if layout.fsdp else ("embed",)
    lead = (None,) * (len(shape) - len(axes))
    sizes = shape[len(lead) :]
    return lead + tuple(
        None if axis in whole else _entry(axis, size, mesh)
        for axis, size in zip(axes, sizes, strict=True)
    )


def _entry(axis: str | None, size: int, mesh) -> tuple[str, ...] | None:
    """The axes of the mesh for a logical axis of a size; those that do not divide it are none."""
    names = tuple(name for name in TABLE.get(axis or "", ()) if mesh.shape.get(name, 1) > 1)
    parts = math.prod(mesh.shape[name] for name in names)
    return names if names and size % parts == 0 else None


def _of_moments(state: Any, axes: tuple, shape: tuple, spec: tuple, mesh: Mesh) -> Any:
    """Adafactor's state of one parameter, which it sees as a matrix; see `gqa.optim`."""
    lead = len(shape) - len(axes)
    if "head_dim" in axes:  # heads * H are one side
        at = lead + axes.index("head_dim")
        shape = (*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])
        spec = (*spec[:at], *spec[at + 1 :])
    largest = lead + np.argsort(shape[lead:])  # as optax: v_row is without the last of them

    def on_leaf(path, moment):
        kept = list(range(len(shape)))
        if path[-1] in (GetAttrKey("v_row"), GetAttrKey("v_col")) and len(shape) - lead > 1:
            kept.remove(largest[-1 if path[-1] == GetAttrKey("v_row") else -2])
        if not spec or moment.shape != tuple(shape[i] for i in kept):
            return NamedSharding(mesh, PartitionSpec())  # a count, or there is no such moment
        return NamedSharding(mesh, PartitionSpec(*(spec[i] for i in kept)))

    return tree_map_with_path(on_leaf, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(tuple(n for n in TABLE["batch"] if n in mesh.shape)))


def num_parts(sharding: NamedSharding) -> int:
    """Into how many parts the first axis is split."""
    names = sharding.spec[0]
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


class Caches(NamedTuple):
    """Of what decoding reads: keys and values, rows first, of each layer; the mask over inputs."""

    own: list[NamedSharding]
    cross: list[NamedSharding]
    mask: NamedSharding


def cache_sharding(config: Any, mesh: Mesh, layout: Layout, fused: bool = False) -> Caches:
    """Of the caches of `gqa.inference` for a gqa.model.Config; `layout` as `choose` gives it.

    With `fused`, cross-attention's arrays are [B, S, K, H].
    """

    def on(*axes: str | None) -> NamedSharding:
        names = (tuple(n for n in TABLE.get(axis or "", ()) if n in mesh.shape) for axis in axes)
        return NamedSharding(mesh, PartitionSpec(*names))

    def kv(K: int, *before: None) -> NamedSharding:
        return on("rows") if by_rows(K, layout) else on("batch", *before, "kv_heads")

    own = [kv(K) for K in config.kv_heads("self_attention")]
    cross = [kv(K, *[None] * fused) for K in config.kv_heads("cross_attention")]
    some = any(by_rows(K, layout) for K in config.kv_heads("cross_attention"))
    return Caches(own, cross, on("rows" if some else "batch"))


def constrain(x: Array, *axes: str | None) -> Array:
    """x, its axes split as the table says of their names, under the mesh of `jax.set_mesh`.

    Without a mesh, as on a single device, x itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = (_entry(axis, size, mesh) for axis, size in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def repeat_heads(x: Array) -> Array:
    """KV heads [B, S, K, H], as many as devices along "model" if they were fewer: one on each."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["model"] % x.shape[2] == 0:
        x = jax.numpy.repeat(x, mesh.shape["model"] // x.shape[2], axis=2)
    return constrain(x, "batch", None, "kv_heads", None)


def put(tree: Any, shardings: Any) -> Any:
    """Every array where `shardings` say; each process gives the same arrays or global ones."""

    def on_leaf(x, sharding):
        if sharding.mesh.is_multi_process and getattr(x, "is_fully_addressable", True):
            whole = np.asarray(x)
            return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
        return jax.device_put(x, sharding)

    return jax.tree.map(on_leaf, tree, shardings)


def local_bytes(x: Any) -> int:
    """Of an array or its shape, what this process's devices hold."""
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        return x.size * x.dtype.itemsize
    a_device = math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return a_device * len(sharding.addressable_devices)


def share_copies(tree: Any) -> Any:
    """Arrays of which each process has its own copy as arrays of all, without moving anything."""
    processes = [
        [device for device in jax.devices() if device.process_index == index]
        for index in range(jax.process_count())
    ]

    def on_leaf(x):
        if not getattr(x, "is_fully_addressable", True):
            return x
        if not isinstance(getattr(x, "sharding", None), NamedSharding):
            x = jax.device_put(x, NamedSharding(make_mesh(local=True), PartitionSpec()))
        mesh = x.sharding.mesh
        order = [jax.local_devices().index(device) for device in mesh.devices.flat]
        stacked = np.array([[devices[i] for i in order] for devices in processes])
        stacked = stacked.reshape(-1, *mesh.devices.shape)
        at = NamedSharding(Mesh(stacked, ("process", *mesh.axis_names)), x.sharding.spec)
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, at, parts)

    return jax.tree.map(on_leaf, tree)


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split over "data" and slices."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
