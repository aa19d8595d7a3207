"""The mesh of devices, the layout of a network on it, and whether a network fits it.

    ("data", "model")             or, with several slices,   ("slice", "data", "model")

"data" and "slice" split the batch; with `fsdp`, "data" also splits parameters and moments along
d_model, which slices keep whole. "model" splits heads, d_ff and the vocabulary. KV heads are split
over "model" where it divides their number K. Where K is less there are two ways to decode:

    replicate    each device holds a KV head, with the query heads there that share it
    batch        the cache is split by its rows instead, over "data" and "model"; queries are sent
                 to the devices of their rows, and results back (Pope et al., 2022)

On which devices the axes of each array lie is `gqa.runtime.sharding`.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gqa.runtime.errors import UserError

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


def check_layout(config: Any, layout: Layout, count: int, local_count: int) -> None:
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


def by_rows(num_kv_heads: int, layout: Layout) -> bool:
    """Whether the cache of so many KV heads is split by its rows alone."""
    if num_kv_heads % layout.model == 0:
        return False
    if layout.kv_heads == "auto":
        raise ValueError("mesh.kv_heads is auto; `choose` says what is meant")
    return layout.kv_heads == "batch"


def resolve_layout(
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
