"""Where arrays live: batches are split over all devices, parameters are on every one of them."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gqa.errors import UserError


def make_mesh(*, local: bool = False) -> Mesh:
    """All devices of all processes along one axis, "data"; or, if `local`, of this process."""
    devices = jax.local_devices() if local else jax.devices()
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and of how many."""
    return (jax.process_index(), jax.process_count()) if mesh.is_multi_process else (0, 1)


def check_batch(name: str, batch_size: int, num_microbatches: int = 1) -> None:
    """Raise a UserError unless every microbatch splits evenly over the devices."""
    unit = jax.device_count() * num_microbatches
    if batch_size < 1 or batch_size % unit:
        raise UserError(
            f"{name}={batch_size} does not split over {jax.device_count()} devices and "
            f"{num_microbatches} microbatches; use a multiple of {unit}"
        )


def replicate(tree, mesh: Mesh):
    """A copy of every array on every device; each process gives the same arrays."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)

    def spread(x):  # which `device_put` would first compare between all processes
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(spread, tree)


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split over "data"."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
