"""The network inside a checkpoint of this project: its parameters and config, and no optimizer.

`gqa.checkpoints.checkpoint` reads and writes whole checkpoints, with what a training run needs
beside the network.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from gqa.checkpoints import checkpoint, pieces, step_folders
from gqa.model.config import Config
from gqa.runtime.errors import CheckpointError, UserError


class Network(NamedTuple):
    """A network with its parameters in float32, on one device.

    info: the JSON item `config` of the checkpoint. Its "vocabulary" is the hash of the vocabulary
        that the network was trained with.
    """

    params: dict
    config: Config
    info: dict[str, Any]


def is_checkpoint(path: str | Path) -> bool:
    """Return whether `load` would find a checkpoint there."""
    try:
        step_folders.find(path)
    except UserError:
        return False
    return True


def load(path: str | Path) -> Network:
    """Load the network of a step folder, or of the last step in a folder of steps.

    Raises:
        CheckpointError: if there is no checkpoint, or it has no network.
        DamagedCheckpoint: if a file is not what was saved.
    """
    step = step_folders.find(path)
    info = checkpoint.load_config(step)

    # Another program or version may have no network there, or a setting that Config does not have.
    try:
        config = Config(**info["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {step}: its config has no network; use another"
        ) from error

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for name, shape in pieces.shapes(config).items()
    }
    params = checkpoint.load(step, {"params": unflatten_dict(shapes, sep="/")})["params"]
    return Network(params, config, info)
