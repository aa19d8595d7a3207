"""Orbax checkpoints as a stranger may craft them: addresses in a database, sealed anew."""

import shutil

import jax.numpy as jnp
import tensorstore

from gqa.checkpoints import checkpoint, checksums, ocdbt_nodes, stored_arrays
from gqa.checkpoints.checkpoint import Checkpoints


def save(folder):
    """Save an array of 6 numbers and one of 2 x 3 as step 1; return the folder of the step."""
    with Checkpoints(folder) as checkpoints:
        params = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((2, 3))}}
        checkpoints.save(1, {"params": params, "config": {}}, {"validation_loss": 1.0})
    return folder / "1"


def load(step):
    """Load the arrays that `save` has saved, or that were put in their place."""
    shapes = {"a": jnp.zeros(6), "b": {"c": jnp.zeros((2, 3))}}
    return checkpoint.load(step, {"params": shapes})["params"]


def crc32c(content):
    """The checksum of OCDBT and of zarr's shards."""
    crc = 2**32 - 1
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return (crc ^ 2**32 - 1).to_bytes(4, "little")


def open_store(folder):
    return tensorstore.KvStore.open(stored_arrays.kvstore(folder)).result()


def seal(step):
    checksums.write(step, {"validation_loss": 1.0})


def replace(step, key, value):
    """Put a value into the database of a checkpoint, and seal it as a stranger would."""
    open_store(step / "params").write(key, value).result()
    seal(step)


def point_database_to(folder, prefix):
    """Make the database of a folder say that its data files lie under `prefix`; return them.

    OCDBT names the file of each value and node. A prefix of the same length is written first, and
    then replaced in every object of the database.
    """
    store = open_store(folder)
    values = {key: store.read(key).result().value for key in store.list().result()}
    for path in [folder / "d", *folder.glob("ocdbt.process_*")]:
        shutil.rmtree(path)
    (folder / "manifest.ocdbt").unlink()

    written = "d/" + "x" * (len(prefix) - 3) + "/"
    names = ("value_data_prefix", "btree_node_data_prefix", "version_tree_node_data_prefix")
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    spec |= {"config": {"compression": None, "max_inline_value_bytes": 0}}
    database = tensorstore.KvStore.open(spec | dict.fromkeys(names, written)).result()
    for key, value in values.items():
        database.write(key, value).result()

    data_files = list((folder / written).iterdir())
    for path in [folder / "manifest.ocdbt", *data_files]:
        content = bytearray(path.read_bytes())
        for match in ocdbt_nodes.MAGIC.finditer(bytes(content)):
            length = int.from_bytes(content[match.end() : match.end() + 8], "little")
            end = match.start() + length
            item = content[match.start() : end - 4].replace(written.encode(), prefix.encode())
            content[match.start() : end] = item + crc32c(item)
        path.write_bytes(content)
    return data_files
