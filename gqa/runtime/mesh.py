"""The mesh of devices, the layout of a network on it, and whether a network fits it.

    ("data", "model")             or, with several slices,   ("slice", "data", "model")

The axes "data" and "slice" split the batch. With `fsdp`, "data" also splits parameters and moments
along d_model; every slice holds a whole copy of them. "model" splits heads, d_ff, the vocabulary,
and the K KV heads where it divides K. Where K is smaller there are two ways to decode:

    replicate    each device holds one KV head, and the query heads that share this KV head
    batch        the cache is split by its rows instead, over "data" and "model"; queries are sent
                 to the devices of their rows, and results back (Pope et al., 2022)

Over which axes of the mesh each array is split is in `gqa/runtime/sharding.py`.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gqa.runtime.checks import check_choice
from gqa.runtime.errors import ConfigError

KV_HEADS = ("auto", "replicate", "batch")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a network is spread over devices.

    Args:
        model: number of devices along the axis "model".
        fsdp: whether the axis "data" splits parameters and optimizer moments, too.
        slices: number of TPU slices, which split nothing but the batch.
        kv_heads: how to decode with fewer KV heads than `model`: one of `KV_HEADS`.
    """

    model: int = 1
    fsdp: bool = False
    slices: int = 1
    kv_heads: str = "auto"

    def within(self, count: int) -> "Layout":
        """Return this layout restricted to the `count` local devices of one process."""
        # The axis "model" gets as many devices as divide both numbers: model = 8 on 4 devices
        # becomes 4, and model = 2 stays 2.
        return dataclasses.replace(self, model=math.gcd(self.model, count))


WHOLE = Layout()


def make_mesh(layout: Layout = WHOLE, *, devices=None, local: bool = False) -> Mesh:
    """Return the mesh of a layout over all devices of all processes.

    Args:
        devices: use these devices instead.
        local: use the devices of this process instead, as one slice.

    Raises:
        ConfigError: if `layout` does not divide the devices.
    """
    slices = 1 if local else layout.slices
    if devices is None:
        devices = jax.local_devices() if local else jax.devices()
    _check_mesh(layout.model, slices, len(devices))
    shape = (len(devices) // slices // layout.model, layout.model)

    # On TPUs neighbours in the mesh should be neighbours in the torus; elsewhere order is free.
    if devices[0].platform != "tpu":
        arranged = np.reshape(devices, (slices, *shape))
    elif slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            (1, *shape), (slices, 1, 1), devices, allow_split_physical_axes=True
        )

    # With one slice there is no axis "slice", so most code sees a mesh of two axes.
    names = ("slice", "data", "model") if slices > 1 else ("data", "model")
    arranged = arranged.reshape((slices, *shape)[-len(names) :])
    return Mesh(arranged, names, axis_types=(AxisType.Auto,) * len(names))


def _check_mesh(model: int, slices: int, count: int) -> None:
    # Both pairs are computed before the first one is checked, so slices = 0 must not divide here.
    for name, size, of in (("slices", slices, count), ("model", model, count // max(slices, 1))):
        if size < 1 or of % size:
            where = "there are" if name == "slices" else "a slice has"
            raise ConfigError(
                name,
                size,
                f"use one of {_join(divisors(of))}",
                f"does not divide the {of} devices {where}",
            )


def check_layout(config: Any, layout: Layout, count: int, local_count: int) -> None:
    """Refuse a layout into which a network does not split.

    Args:
        config: a gqa.Config.
        count: number of all devices.
        local_count: number of devices of one process.

    Raises:
        ConfigError: naming the field of `layout`, and the values that would do.
    """
    check_choice("kv_heads", layout.kv_heads, KV_HEADS)
    _check_mesh(1, layout.slices, count)
    slice_size = count // layout.slices

    # Processes along "model" read the same rows, all others rows of their own. A process that did
    # a bit of both would have to read the rows of several others.
    fit = [n for n in divisors(slice_size) if n % local_count == 0 or local_count % n == 0]
    fit = [n for n in fit if not _first_odd_size(config, n)]
    if layout.model not in fit:
        odd = _first_odd_size(config, layout.model) if layout.model > 0 else ""
        devices = f"the {slice_size} devices, {local_count} a process"
        raise ConfigError(
            "model",
            layout.model,
            f"use one of {_join(fit)}",
            f"does not divide {odd or devices}",
        )

    data = slice_size // layout.model
    if layout.fsdp and config.d_model % data:
        fit = [n for n in fit if config.d_model % (slice_size // n) == 0]
        more = f", or {_join(fit)} devices along the axis model" if fit else ""
        raise ConfigError(
            "fsdp",
            layout.fsdp,
            f"use False{more}",
            f"would split d_model={config.d_model} over the {data} devices of the axis data, "
            "which do not divide it",
        )


def _first_odd_size(config: Any, model: int) -> str:
    """Return the first size of a network that `model` does not divide; empty if there is none."""
    for name in ("num_heads", "d_ff", "vocab_size"):
        if getattr(config, name) % model:
            return f"{name}={getattr(config, name)}"

    # KV heads are either split or repeated. With model = 4: K = 8 gives each device two heads, K =
    # 2 puts each head on two devices, and K = 3 fits neither way.
    for name in ("encoder", "self_attention", "cross_attention"):
        for K in config.kv_heads(name):
            if K % model and model % K:
                return f"num_kv_heads_{name}={K}, nor is it a multiple"
    return ""


def divisors(n: int) -> list[int]:
    """Return the divisors of n, ascending: the numbers of KV heads or devices it splits into."""
    # Divisors come in pairs k and n / k, the smaller of which is at most the square root.
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})


def _join(values) -> str:
    return ", ".join(map(str, values))


def check_batch(
    batch_size: int,
    num_microbatches: int = 1,
    layout: Layout = WHOLE,
    count: int | None = None,
) -> None:
    """Refuse a batch whose microbatches do not split evenly over the devices.

    Args:
        batch_size: rows of a batch.
        count: number of devices; None for all devices of this run.

    Raises:
        ConfigError: naming `batch_size`.
    """
    # The devices along "model" work on the same rows, so together they are one part.
    parts = (count or jax.device_count()) // layout.model
    unit = parts * num_microbatches
    if batch_size < 1 or batch_size % unit:
        raise ConfigError(
            "batch_size",
            batch_size,
            f"use a multiple of {unit}",
            f"does not split over {parts} devices or groups of them and {num_microbatches} "
            "microbatches",
        )


def check_rows(batch_size: int, config: Any, layout: Layout, count: int) -> None:
    """Refuse a batch whose cache is to be split by its rows and does not split over the devices.

    Args:
        batch_size: rows that are generated at once.
        config: a gqa.Config.
        count: number of devices that generate.

    Raises:
        ConfigError: naming `batch_size`.
    """
    heads = (*config.kv_heads("self_attention"), *config.kv_heads("cross_attention"))
    fewer = any(K % layout.model for K in heads)
    if layout.kv_heads == "batch" and fewer and batch_size % count:
        raise ConfigError(
            "batch_size",
            batch_size,
            f"use a multiple of {count}, or a layout that replicates KV heads",
            f"does not split over the {count} devices that generate it, which a cache split by "
            "its batch needs",
        )


def by_rows(num_kv_heads: int, layout: Layout) -> bool:
    """Return whether the cache of `num_kv_heads` KV heads is split by its rows alone.

    Raises:
        ValueError: if `layout` leaves it open; `resolve_layout` settles it.
    """
    if num_kv_heads % layout.model == 0:
        return False
    if layout.kv_heads == "auto":
        raise ValueError("Layout.kv_heads is auto; resolve_layout settles it")
    return layout.kv_heads == "batch"


def resolve_layout(
    config: Any, layout: Layout, mesh: Mesh, batch_size: int, inputs_length: int, length: int
) -> Layout:
    """Return `layout` with `kv_heads="auto"` replaced by the way that moves fewer bytes a token.

    Args:
        config: a gqa.Config.
        batch_size: rows that are generated at once.
        inputs_length: positions of the cache of cross-attention.
        length: positions of the cache of self-attention.
    """
    if layout.kv_heads != "auto":
        return layout

    # Add up both ways over all layers: their numbers of KV heads and their lengths may differ.
    replicate = batch = 0.0
    lengths = {"cross_attention": inputs_length, "self_attention": length}
    pairs = [(K, lengths[name]) for name in lengths for K in config.kv_heads(name)]
    for K, positions in pairs:
        moved = bytes_moved(K, config.num_heads, config.head_dim, positions, layout.model)
        replicate, batch = replicate + moved["replicate"], batch + moved["batch"]

    # Splitting by rows also needs equally many rows on each device.
    better = batch < replicate and batch_size % mesh.size == 0
    return dataclasses.replace(layout, kv_heads="batch" if better else "replicate")


def bytes_moved(K: int, N: int, head_dim: int, positions: int, model: int) -> dict[str, float]:
    """Return the bytes that a device moves for a token, in one layer, by the way of decoding.

    Counted per row of the batch that "data" gives to the device, with 2 bytes a number. A device
    reads keys and values: with "replicate" one KV head of every row, or K / `model` of them if
    that is more; with "batch" all K KV heads of a `model`-th of the rows. In the latter case it
    also receives the queries of its rows from the other devices, and sends the results back.

    Args:
        K: KV heads.
        N: query heads.
        positions: length of the cache.
        model: devices along the axis "model".
    """
    # Keys and values have 2 bytes a number, and so have the queries that are sent and the results
    # that come back. A device keeps the queries of its own rows, one part in `model`.
    head = 2 * 2 * positions * head_dim
    sent = 2 * 2 * (N / model) * head_dim * (1 - 1 / model)
    return {"replicate": head * max(1, K / model), "batch": head * K / model + sent}
