"""Commands that name a model of the Hub, with a server on this machine, and without."""

import dataclasses
import os
import subprocess
import sys

import pytest

from gqa.data import tokenizer
from gqa.interop import huggingface
from gqa.model.activations import RELU
from tests.support import jobs
from tests.support.foreign_weights import write_torch
from tests.support.hub_server import HubServer, environment, files_of, serving
from tests.support.llama_folders import write_llama
from tests.support.several_processes import Processes

WORDS = "the cat sat on the mat, and a dog ran to it"


@pytest.fixture
def server(tmp_path, tiny, random_params):
    """A server with a T5 in PyTorch's format and a Llama."""
    vocabulary = tmp_path / "words.model"
    vocab_size = tokenizer.train([WORDS] * 20, 460, vocabulary).vocab_size
    config = dataclasses.replace(
        tiny, vocab_size=vocab_size, activation=RELU, tied_logits=True, num_decoder_layers=1
    )
    params = random_params(config)
    huggingface.save(params, config, tmp_path / "t5", vocabulary=vocabulary)
    (tmp_path / "t5" / "model.safetensors").unlink()
    write_torch(tmp_path / "t5" / "pytorch_model.bin", huggingface.state_dict(params, config))
    write_llama(tmp_path / "llama")
    return HubServer({f"org/{name}": files_of(tmp_path / name) for name in ("t5", "llama")})


def gqa(environ, *arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "gqa", *arguments],
        cwd=jobs.ROOT, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def test_commands_of_the_library_take_names(server, tmp_path):
    with serving(server) as endpoint:
        environ = environment(tmp_path / "home", endpoint, JAX_PLATFORMS="cpu")
        assert "8 KV heads" in gqa(environ, "kv-cache", "org/llama")
        assert server.downloaded() == ["config.json"]
        gqa(environ, "convert", "org/llama", str(tmp_path / "new"), "--num-kv-heads=2")
        assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < {
            path.name for path in (tmp_path / "new").iterdir()
        }
        assert "pytorch_model.bin" not in server.downloaded()
        told = gqa(environ, "generate", "org/missing", "a cat", status=2)
        assert told.startswith(
            "error: org/missing: No such folder, and the Hugging Face Hub (http:"
        )
        assert told.count("\n") == 1

    # The server is gone.
    told = gqa(environ | {"HF_HUB_OFFLINE": "1"}, "generate", "org/t5", "a cat", status=2)
    assert "HF_HUB_OFFLINE is set; unset it" in told


def test_a_job_uptrains_a_model_of_the_hub(server, tmp_path, monkeypatch):
    settings = {k: v for k, v in jobs.TINY.items() if not k.startswith("model.")}
    del settings["convert.num_kv_heads_encoder"]
    settings |= {"init.huggingface": "org/t5", "finetune.tasks": "docstring_summary"}
    with serving(server) as endpoint:
        hub = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
        monkeypatch.setattr(jobs, "ENVIRONMENT", jobs.ENVIRONMENT | hub)
        told = jobs.launch(tmp_path / "runs", settings, "--stage=uptrain")
        snapshot = tmp_path / "home/hub/models--org--t5/snapshots" / server.commit("org/t5")
        assert f"org/t5: {snapshot}\n" in told
        assert f"pretrain (t5, 4 KV heads, seed 0): {snapshot}, validation loss" in told
        kinds = {path.name.split("-")[0] for path in (tmp_path / "runs" / "stages").iterdir()}
        assert kinds == {"pretrain", "convert", "uptrain"}

        # A private or unknown model is told in one line, before anything is computed.
        told = jobs.launch(tmp_path / "x", settings | {"init.huggingface": "org/no"}, status=2)
        assert "error: init.huggingface: org/no: No such folder, and the Hugging Face Hub" in told

    # Without network the copy in the cache is the same parent: everything is done.
    monkeypatch.setattr(jobs, "ENVIRONMENT", jobs.ENVIRONMENT | {"HF_HUB_OFFLINE": "1"})
    assert "validation loss" not in jobs.launch(tmp_path / "runs", settings, "--stage=uptrain")


def test_several_processes_take_the_same_commit(server, tmp_path, monkeypatch):
    """Each has a cache of its own, as on machines that share no disk."""
    with serving(server) as endpoint:
        for key, value in environment(tmp_path / "home", endpoint).items():
            monkeypatch.setenv(key, value)
        body = """
    os.environ["HF_HOME"] += str(index)
    from experiments.stages import initial_checkpoint
    print(initial_checkpoint._folder("huggingface", "org/t5").name, file=sys.stderr)
"""
        processes = Processes(body, tmp_path / "processes")
        assert processes.end()[0] == [0, 0], processes.errors
    commit = server.commit("org/t5")
    assert [commit in text.splitlines() for text in processes.errors] == [True, True]
    assert [path for _, path in server.asked].count("/api/models/org/t5/revision/main") == 1
    assert server.downloaded().count("pytorch_model.bin") == 2
    assert os.listdir(tmp_path / "home0/hub") == os.listdir(tmp_path / "home1/hub")
