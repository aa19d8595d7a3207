"""Models by their names on the Hub, with the real client and a server on this machine."""

import errno
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import _tree_cache, constants, hf_api
from huggingface_hub.utils import _headers

from gqa.interop import hub
from gqa.interop.safetensors_files import SAFETENSORS
from gqa.runtime.errors import CheckpointError, OutOfDiskError, UserError
from tests.support.hub_server import TOKEN, HubServer, serving

CONFIG = b'{"model_type": "t5"}'
BIN = json.dumps({"weight_map": {"a": "pytorch_model-1.bin", "b": "../x", "c": 3}}).encode()
INDEX = "pytorch_model.bin.index.json"
TOKENIZER = {"spiece.model": b"s", "tokenizer_config.json": b"t"}
OTHERS = {"README.md": b"r", "rust_model.ot": b"o", "onnx/tokenizer.json": b"x", "LICENSE": b"l"}
OTHERS |= {"generation_config.json": b"{}"}
MODELS = {
    "org/safe": {
        "config.json": CONFIG, "model.safetensors": b"w", "pytorch_model.bin": b"p",
        "model.safetensors.index.json": b"{}", "flax_model.msgpack": b"f", **TOKENIZER, **OTHERS,
    },
    "org/bin": {
        "config.json": CONFIG, INDEX: BIN, "flax_model.msgpack": b"f",
        "pytorch_model-1.bin": b"1", "pytorch_model-2.bin": b"2", "tf_model.h5": b"h",
    },
    "org/none": {"config.json": CONFIG, "tf_model.h5": b"h"},
    "org/data": {"README.md": b""},
    "org/gated": {"config.json": CONFIG, "model.safetensors": b"g"},
}  # fmt: skip


def use(monkeypatch, endpoint, **more):
    """Let the client of this process, which has read the environment, ask the Hub at an address."""
    hub._download.cache_clear()
    own = {"ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": True}
    own["HUGGINGFACE_CO_URL_TEMPLATE"] = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for key, value in (own | more).items():
        monkeypatch.setattr(constants, key, value)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server; the client of this process has a cache of its own and no token."""
    server = HubServer({name: dict(files) for name, files in MODELS.items()}, ["org/gated"])
    with serving(server) as endpoint:
        use(monkeypatch, endpoint, HF_HUB_CACHE=str(tmp_path / "cache"))
        monkeypatch.setattr(_headers, "get_token", lambda: None)
        yield server
    hub._download.cache_clear()


def test_a_models_config_tokenizer_and_weights_of_one_format_are_downloaded(server):
    folder = hub.local_folder("org/safe")
    expected = ["config.json", "generation_config.json", "model.safetensors", *TOKENIZER]
    assert server.downloaded() == sorted(expected) == sorted(os.listdir(folder))
    assert folder.name == server.commit("org/safe")
    assert (folder / "model.safetensors").read_bytes() == b"w"
    assert hub.short_name(folder) == "safe"

    # The index of a model says which of its files are weights; what it lies about is not there.
    server.asked.clear()
    hub.local_folder("org/bin")
    assert server.downloaded() == ["config.json", "pytorch_model-1.bin", INDEX]
    del server.models["org/bin"][INDEX]
    hub._download.cache_clear()
    assert (hub.local_folder("org/bin") / "flax_model.msgpack").exists()

    # A reader may ask for less, or for other files.
    assert os.listdir(hub.local_folder("org/none", formats=())) == ["config.json"]
    folder = hub.local_folder("org/safe", (SAFETENSORS,), ("license*", "*.md"))
    assert {"LICENSE", "README.md"} < set(os.listdir(folder))


def test_a_revision_and_a_commit_are_names_too(server):
    old = server.commit("org/safe")
    server.models["org/safe"]["model.safetensors"] = b"new"
    new = server.commit("org/safe")
    assert old != new
    assert hub.pinned("org/safe") == f"org/safe@{new}"
    assert hub.local_folder("org/safe@main").name == new
    assert hub.local_folder(f"org/safe@{new}").name == new
    with pytest.raises(CheckpointError, match=r"org/safe: has no revision 'v2'; name a branch, a"):
        hub.local_folder("org/safe@v2")


def test_a_command_uses_one_commit(server):
    """The model changes while the command runs."""
    first = hub.local_folder("org/safe")
    server.models["org/safe"]["model.safetensors"] = b"new"
    assert hub.local_folder("org/safe") == first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "org/missing",
            r"org/missing: No such folder, and the .* \(http://127.* has no model of that",
        ),
        ("org/gated", r"access to the model is restricted; ask for it at http.*/org/gated and run"),
        (
            "org/none",
            r"has no weights that are read \(model\.safetensors, .*\) but tf_model\.h5; n",
        ),
        ("org/data", r"org/data: has no config\.json; name a model of Transformers"),
        ("org/a--b", r"org/a--b: No such folder, and no name of a model either \(Cannot have --"),
        ("org", "org: No such folder; name a folder, or a model of the Hugging Face Hub such as"),
        ("a/b/c", "a/b/c: No such folder; name a folder, or a model of the Hugging Face Hub such"),
        ("./a", "No such folder; name a folder, or a model"),
        ("gs://bucket/model", "is a URL; mount the bucket"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(server, name, message):
    with pytest.raises(UserError, match=message) as error:
        hub.local_folder(name)
    assert len(str(error.value)) < 500


def test_a_token_opens_a_restricted_model(server, monkeypatch):
    monkeypatch.setattr(_headers, "get_token", lambda: TOKEN)
    assert (hub.local_folder("org/gated") / "model.safetensors").read_bytes() == b"g"


def test_without_network_the_cache_serves(server, monkeypatch):
    folder = hub.local_folder("org/safe")
    server.models.clear()
    for offline in (False, True):
        use(monkeypatch, "http://127.0.0.1:9", HF_HUB_OFFLINE=offline)
        assert hub.local_folder("org/safe") == hub.local_folder(f"org/safe@{folder.name}") == folder
        message = (
            r"the cache \(.* has no complete copy while HF_HUB_OFFLINE is set; unset it, or name a"
        )
        if not offline:
            message = (
                r"Hub \(http://127.*:9\) cannot be reached or fails \(ConnectError: .*; try ag"
            )
        with pytest.raises(CheckpointError, match=rf"org/bin: .*{message}"):
            hub.local_folder("org/bin")

        # A download that was killed. Online the client would ask again, for 20 seconds.
        if not offline:
            continue
        (folder / "model.safetensors").rename(folder / "x")
        hub._download.cache_clear()
        with pytest.raises(CheckpointError, match=message):
            hub.local_folder("org/safe")
        (folder / "x").rename(folder / "model.safetensors")

    # Another program's download has no list of the model's files; what it has is used.
    shutil.rmtree(folder.parent.parent / "trees")
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    hub._download.cache_clear()
    assert hub.local_folder("org/safe") == folder


def test_a_folder_wins_over_a_name(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("org/safe")
    assert not hub.is_name("org/safe")
    assert hub.local_folder("org/safe") == Path("org/safe")
    assert hub.pinned("org/safe") == "org/safe"
    assert server.asked == []


def test_a_folder_of_the_cache_stands_for_its_snapshot(server, tmp_path):
    folder = hub.local_folder("org/safe")
    cached = folder.parent.parent
    assert cached.name == "models--org--safe"
    assert hub.local_folder(cached) == folder
    (folder.parent / ("1" * 40)).mkdir()
    assert hub.local_folder(cached) == folder  # refs/main names it
    (cached / "refs" / "main").write_text("../../../..")
    with pytest.raises(
        CheckpointError, match=r"org--safe: has 2 snapshots; name one of the folders"
    ):
        hub.local_folder(cached)
    assert hub.short_name(tmp_path / "t5") == "t5"


def test_a_full_disk_is_named(server, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OutOfDiskError, match="no space left on device while downloading org/safe"):
        hub.local_folder("org/safe")
