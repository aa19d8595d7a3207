"""The nodes of a database are measured before they are decoded, and so are the names in them."""

import pytest
import tensorstore

from gqa.checkpoints import checksums, ocdbt_nodes, stored_arrays
from gqa.runtime.errors import CheckpointError
from tests.support import orbax_files
from tests.support.orbax_files import load

MIB = 2**20


@pytest.fixture
def step(tmp_path):
    """A checkpoint with an array of 6 numbers and one of 2 x 3."""
    return orbax_files.save(tmp_path / "run")


def test_a_node_of_the_database_that_is_far_too_large_is_refused(step):
    """The database may keep small values inside its nodes, and compresses these."""
    config = {"max_inline_value_bytes": MIB, "max_decoded_node_bytes": 1024 * MIB}
    for path in (step / "params").rglob("*ocdbt"):
        path.unlink()
    store = {"driver": "ocdbt", "base": f"file://{step}/params/", "config": config}
    database = tensorstore.KvStore.open(store).result()
    transaction = tensorstore.Transaction()
    for i in range(200):
        database.with_transaction(transaction).write(f"a/{i}", bytes(MIB)).result()
    transaction.commit_sync()
    checksums.write(step, {"validation_loss": 1.0})
    with pytest.raises(CheckpointError, match=r"params/d/\w+: a node of its database has more tha"):
        load(step)


def write(folder, names, node_bytes):
    """Write a database with these keys, and empty values, in nodes of `node_bytes` at most."""
    config = {"max_inline_value_bytes": 100, "max_decoded_node_bytes": node_bytes}
    store = {"driver": "ocdbt", "base": f"file://{folder}/", "config": config}
    database = tensorstore.KvStore.open(store).result()
    transaction = tensorstore.Transaction()
    for name in names:
        database.with_transaction(transaction).write(name, b"").result()
    transaction.commit_sync()


def test_names_that_are_far_larger_than_their_node_are_refused(tmp_path, monkeypatch):
    """Each name is the one before and another letter: 2 MiB of names in a file of 4 KB.

    65,000 such names would be 2 GiB in 350 KB.
    """
    monkeypatch.setattr(ocdbt_nodes, "MAX_NAMES_BYTES", MIB)
    write(tmp_path, ["a" * i for i in range(1, 2000)], MIB)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2**14
    with pytest.raises(CheckpointError, match=r"d/\w+: the names in its database have more than"):
        stored_arrays.read_headers(tmp_path)


def test_the_beginning_that_names_of_a_node_share_counts_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr(ocdbt_nodes, "MAX_NAMES_BYTES", 2**18)
    write(tmp_path / "long", [f"{'a' * 1000}{i}" for i in range(400)], 1000)
    with pytest.raises(CheckpointError, match=r"the names in its database have more than 262,144"):
        ocdbt_nodes.check(tmp_path / "long")
    write(tmp_path / "short", [f"{'a' * 10}{i}" for i in range(400)], 1000)
    ocdbt_nodes.check(tmp_path / "short")


@pytest.mark.parametrize("compression", [None, {"id": "zstd"}])
def test_names_are_counted_as_they_are_stored(tmp_path, compression):
    names = [f"layer_{i}/kernel" for i in range(10)]
    store = {
        "driver": "ocdbt",
        "base": f"file://{tmp_path}/",
        "config": {"compression": compression},
    }
    database = tensorstore.KvStore.open(store).result()
    for name in names:
        database.write(name, b"x" * 1000).result()
    counted = []
    for path in (tmp_path / "d").iterdir():
        with open(path, "rb") as file:
            for node in ocdbt_nodes._nodes(file, path.stat().st_size):
                content = ocdbt_nodes._content(file, node, MIB)
                counted.append(ocdbt_nodes._names(content))
    largest = max(counted, key=lambda found: found.number)
    files = largest.number - len(names)
    # Each file in a node is named by "d/" and 32 hexadecimal digits.
    assert largest.nbytes == sum(map(len, names)) + 34 * files
