"""Where arrays live: batches are split over all devices, parameters are on every one of them."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gqa.errors import UserError


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def check_batch(name: str, batch_size: int, num_microbatches: int = 1) -> None:
    """Raise a UserError unless every microbatch splits evenly over the devices."""
    unit = jax.device_count() * num_microbatches
    if batch_size < 1 or batch_size % unit:
        raise UserError(
            f"{name}={batch_size} does not split over {jax.device_count()} devices and "
            f"{num_microbatches} microbatches; use a multiple of {unit}"
        )


def replicate(tree, mesh: Mesh):
    """A copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split over "data"."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
