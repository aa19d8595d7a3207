"""A checkpoint from a stranger is read in its own folder alone, whatever addresses it holds."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gqa.runtime.errors import CheckpointError
from tests.support import orbax_files
from tests.support.orbax_files import load

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def step(tmp_path):
    return orbax_files.save(tmp_path / "run")


@pytest.fixture
def server():
    """A server that nobody should call: its port, and after the test the calls."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


def move_data(step, prefix, place):
    """Let the database say that its data lie under `prefix`, and put them into the folder there."""
    data_files = orbax_files.point_database_to(step / "params", prefix)
    if place is not None:
        place.mkdir(parents=True)
        for path in data_files:
            shutil.copy(path, place / path.name)
        shutil.rmtree(data_files[0].parent)
    orbax_files.seal(step)


def test_a_database_whose_data_lie_in_its_folder_is_read(step):
    """The files that are crafted for the other tests would be right there."""
    move_data(step, "d/another/", step / "params" / "d" / "another")
    np.testing.assert_array_equal(load(step)["a"], np.arange(6))


def test_data_files_outside_of_the_folder_are_not_read(step, tmp_path):
    """Whole data lie where the database points to."""
    fresh = tmp_path / "fresh"
    shutil.copytree(step, fresh)
    for prefix in ("../../elsewhere/", "d/../../../elsewhere/", f"{tmp_path}/run/elsewhere/"):
        place = tmp_path / "run" / "elsewhere"
        move_data(step, prefix, place)
        with pytest.raises(CheckpointError, match=r"run/1 cannot be read; .*Invalid key") as caught:
            load(step)
        assert "\n" not in str(caught.value)
        shutil.rmtree(place)
        shutil.rmtree(step)
        shutil.copytree(fresh, step)


@pytest.mark.parametrize("scheme", ["http", "https", "file", "gs", "s3"])
def test_an_address_in_the_place_of_a_data_file_is_not_called(step, server, scheme):
    move_data(step, f"{scheme}://127.0.0.1:{server}/x/", None)
    with pytest.raises(CheckpointError, match=r"run/1 cannot be read; .*Invalid key"):
        load(step)


def described(step, server, file):
    """The JSON of a file with an address of the server wherever an object can hold one."""
    url = f"http://127.0.0.1:{server}/x/"
    stores = {"kvstore": url, "base": {"driver": "http", "base_url": url}, "path": url}

    def extended(value):
        if isinstance(value, list):
            return [extended(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {key: extended(each) for key, each in value.items()} | stores

    return json.dumps(extended(json.loads((step / file).read_text())))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("_CHECKPOINT_METADATA", "run/1 cannot be read; .* unknown key kvstore"),
        ("params/_METADATA", "params is not in Orbax's format"),
        ("params/array_metadatas/process_0", None),
    ],
)
def test_addresses_in_metadata_are_not_called(step, server, file, message):
    (step / file).write_text(described(step, server, file))
    orbax_files.seal(step)
    if message is None:
        np.testing.assert_array_equal(load(step)["a"], np.arange(6))
    else:
        with pytest.raises(CheckpointError, match=message):
            load(step)


def test_addresses_in_the_header_of_an_array_are_not_called(step, server):
    url = f"http://127.0.0.1:{server}/x/"
    header = json.loads(orbax_files.open_store(step / "params").read("a/zarr.json").result().value)
    transformer = {"name": "http", "configuration": {"base_url": url}}
    cases = [
        (header | {"attributes": {"kvstore": url, "path": url}}, None),
        (header | {"kvstore": url}, "array a: .*kvstore"),
        (header | {"storage_transformers": [transformer]}, "array a: .*storage_transformers"),
        (header | {"codecs": [transformer]}, "array a: .*http"),
    ]
    for content, message in cases:
        orbax_files.replace(step, "a/zarr.json", json.dumps(content))
        if message is None:
            np.testing.assert_array_equal(load(step)["a"], np.arange(6))
        else:
            with pytest.raises(CheckpointError, match=message):
                load(step)


def has_strace():
    try:
        return subprocess.run(["strace", "-o", "/dev/null", "true"], check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not has_strace(), reason="traces system calls")
def test_the_system_is_asked_for_no_socket_and_no_file_elsewhere(step, tmp_path):
    """All system calls of a process that loads a checkpoint with addresses in its database."""
    fresh = tmp_path / "run" / "2"
    shutil.copytree(step, fresh)
    move_data(step, "gs://a-bucket/x/", None)
    move_data(fresh, "../../elsewhere/", tmp_path / "run" / "elsewhere")
    script = (
        "import sys, jax.numpy as jnp\n"
        "from gqa.checkpoints import checkpoint\n"
        "print('begin')\n"
        "for step in sys.argv[1:]:\n"
        "    try: checkpoint.load(step, {'params': {'a': jnp.zeros(6)}})\n"
        "    except Exception as error: print(error)\n"
    )
    trace = tmp_path / "trace"
    calls = "--trace=%network,open,openat,openat2,readlink,readlinkat"
    strace = ["strace", "-f", "-s", "500", "-o", str(trace), calls]
    done = subprocess.run(
        [*strace, sys.executable, "-c", script, str(step), str(fresh)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("cannot be read") == 2, done.stdout

    lines = trace.read_text().splitlines()
    assert any(f"{step}/params/manifest.ocdbt" in line for line in lines)
    # Python's event loops wake each other by pairs of local sockets.
    assert not [line for line in lines if "AF_INET" in line or "connect(" in line]
    assert not [line for line in lines if "elsewhere" in line]
