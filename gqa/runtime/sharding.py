"""Where arrays live: one table says over which axes of the mesh each axis of an array is split.

    ("data", "model")             or, with several slices,   ("slice", "data", "model")

"data" and "slice" split the batch; with `fsdp`, "data" also splits parameters and moments along
d_model, which slices keep whole. "model" splits heads, d_ff and the vocabulary. KV heads are split
over it where it divides their number K. Where K is less there are two ways to decode:

    replicate    a KV head on each device, with the query heads there that share it
    batch        the cache is split by its rows instead, over "data" and "model"; queries are sent
                 to their rows, and back (Pope et al., 2022)
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, tree_map_with_path

from gqa.runtime.errors import UserError

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
KV_HEADS = ("auto", "replicate", "batch")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a network is spread; the fields are the config's section `mesh`."""

    model: int = 1  # devices along "model"
    fsdp: bool = False
    slices: int = 1
    kv_heads: str = "auto"  # where there are fewer than `model`; of `KV_HEADS`

    def within(self, count: int) -> "Layout":
        """The same on so many devices of one process, where "model" may go beyond them."""
        return dataclasses.replace(self, model=math.gcd(self.model, count))


WHOLE = Layout()


def make_mesh(layout: Layout = WHOLE, *, devices=None, local: bool = False) -> Mesh:
    """All devices of all processes, or those given; or, if `local`, of this process as one slice.

    Raises:
        UserError: where `layout` does not divide them.
    """
    slices = 1 if local else layout.slices
    if devices is None:
        devices = jax.local_devices() if local else jax.devices()
    _check_mesh(layout.model, slices, len(devices))
    shape = (len(devices) // slices // layout.model, layout.model)
    if devices[0].platform != "tpu":
        arranged = np.reshape(devices, (slices, *shape))
    elif slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            (1, *shape), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    names = ("slice", "data", "model") if slices > 1 else ("data", "model")
    arranged = arranged.reshape((slices, *shape)[-len(names) :])
    return Mesh(arranged, names, axis_types=(AxisType.Auto,) * len(names))


def _check_mesh(model: int, slices: int, count: int) -> None:
    for name, size, of in (("slices", slices, count), ("model", model, count // max(slices, 1))):
        if size < 1 or of % size:
            where = "there are" if name == "slices" else "a slice has"
            raise UserError(
                f"mesh.{name}={size} does not divide the {of} devices {where}; "
                f"use one of {_listed(divisors(of))}"
            )


def check(config: Any, layout: Layout, count: int, local_count: int) -> None:
    """Raise a UserError unless a network of `config` splits over so many devices.

    `config` is a gqa.model.Config; a process has `local_count` of the `count` devices.
    """
    if layout.kv_heads not in KV_HEADS:
        raise UserError(f"mesh.kv_heads={layout.kv_heads!r}; use one of {_listed(KV_HEADS)}")
    _check_mesh(1, layout.slices, count)
    a_slice = count // layout.slices
    # Processes read rows of their own or all the same ones.
    fit = [n for n in divisors(a_slice) if n % local_count == 0 or local_count % n == 0]
    fit = [n for n in fit if not _odd_sizes(config, n)]
    if layout.model not in fit:
        odd = _odd_sizes(config, layout.model) if layout.model > 0 else ""
        raise UserError(
            f"mesh.model={layout.model} does not divide "
            f"{odd or f'the {a_slice} devices, {local_count} a process'}; use one of {_listed(fit)}"
        )
    data = a_slice // layout.model
    if layout.fsdp and config.d_model % data:
        fit = [n for n in fit if config.d_model % (a_slice // n) == 0]
        more = f" or mesh.model={_listed(fit)}" if fit else ""
        raise UserError(
            f"mesh.fsdp=True: model.d_model={config.d_model} does not split over the {data} "
            f"devices of the axis data; use mesh.fsdp=False{more}"
        )


def _odd_sizes(config: Any, model: int) -> str:
    """The first size of a network that `model` devices do not divide; empty if there is none."""
    for name in ("num_heads", "d_ff", "vocab_size"):
        if getattr(config, name) % model:
            return f"model.{name}={getattr(config, name)}"
    for name in ("encoder", "self_attention", "cross_attention"):
        for K in config.kv_heads(name):
            if K % model and model % K:
                return f"num_kv_heads_{name}={K}, nor is it a multiple"
    return ""


def divisors(n: int) -> list[int]:
    """The numbers of KV heads or devices that n can be split into, ascending."""
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})


def _listed(values) -> str:
    return ", ".join(map(str, values))


def share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and of how many."""
    if not mesh.is_multi_process:
        return 0, 1
    sharding, rows = batch_sharding(mesh), {}
    places = sharding.devices_indices_map((mesh.size // mesh.shape["model"],))
    for device, (place,) in places.items():
        rows.setdefault(device.process_index, set()).add(place.start or 0)
    # Processes that the axis "model" joins read the same rows.
    parts = sorted({tuple(sorted(each)) for each in rows.values()})
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def check_batch(
    name: str,
    batch_size: int,
    num_microbatches: int = 1,
    layout: Layout = WHOLE,
    count: int | None = None,
) -> None:
    """Raise a UserError unless every microbatch splits evenly over all devices, or `count`."""
    parts = (count or jax.device_count()) // layout.model
    unit = parts * num_microbatches
    if batch_size < 1 or batch_size % unit:
        raise UserError(
            f"{name}={batch_size} does not split over {parts} devices or groups of them and "
            f"{num_microbatches} microbatches; use a multiple of {unit}"
        )


def check_rows(name: str, batch_size: int, config: Any, layout: Layout, count: int) -> None:
    """Raise a UserError unless a cache that is split by its rows splits over `count` devices."""
    heads = (*config.kv_heads("self_attention"), *config.kv_heads("cross_attention"))
    fewer = any(K % layout.model for K in heads)
    if layout.kv_heads == "batch" and fewer and batch_size % count:
        raise UserError(
            f"mesh.kv_heads='batch': {name}={batch_size} does not split over the {count} devices "
            f"that generate it; use a multiple of {count}, or mesh.kv_heads=replicate"
        )


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
    names = tuple(name for name in TABLE.get(axis, ()) if mesh.shape.get(name, 1) > 1)
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
        names = (tuple(n for n in TABLE.get(axis, ()) if n in mesh.shape) for axis in axes)
        return NamedSharding(mesh, PartitionSpec(*names))

    def kv(K: int, *before: None) -> NamedSharding:
        return on("rows") if by_rows(K, layout) else on("batch", *before, "kv_heads")

    own = [kv(K) for K in config.kv_heads("self_attention")]
    cross = [kv(K, *[None] * fused) for K in config.kv_heads("cross_attention")]
    some = any(by_rows(K, layout) for K in config.kv_heads("cross_attention"))
    return Caches(own, cross, on("rows" if some else "batch"))


def by_rows(num_kv_heads: int, layout: Layout) -> bool:
    """Whether the cache of so many KV heads is split by its rows alone."""
    if num_kv_heads % layout.model == 0:
        return False
    if layout.kv_heads == "auto":
        raise ValueError("mesh.kv_heads is auto; `choose` says what is meant")
    return layout.kv_heads == "batch"


def choose(
    config: Any, layout: Layout, mesh: Mesh, batch_size: int, inputs_length: int, length: int
) -> Layout:
    """`layout` with "auto" settled: the way a device moves fewer bytes a token."""
    if layout.kv_heads != "auto":
        return layout
    replicate = batch = 0.0
    lengths = {"cross_attention": inputs_length, "self_attention": length}
    pairs = [(K, lengths[name]) for name in lengths for K in config.kv_heads(name)]
    for K, positions in pairs:
        moved = bytes_moved(K, config.num_heads, config.head_dim, positions, layout.model)
        replicate, batch = replicate + moved["replicate"], batch + moved["batch"]
    better = batch < replicate and batch_size % mesh.size == 0
    return dataclasses.replace(layout, kv_heads="batch" if better else "replicate")


def bytes_moved(K: int, N: int, head_dim: int, positions: int, model: int) -> dict[str, float]:
    """Bytes a device moves for a token, a layer and each row of the batch that "data" gives it.

    It reads keys and values of 2 bytes. With "replicate" there is one head of every row, or K /
    `model`; with "batch" all K of a `model`-th of the rows, whose queries it gets from the others,
    and sends them what attention gives.
    """
    head = 2 * 2 * positions * head_dim
    sent = 2 * 2 * (N / model) * head_dim * (1 - 1 / model)
    return {"replicate": head * max(1, K / model), "batch": head * K / model + sent}


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
