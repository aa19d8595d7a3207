"""Peers with our weights choose our tokens and have our loss; missing packages are named."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.speed import peers
from gqa.evaluation import timing
from gqa.inference.decoding import GREEDY
from gqa.inference.generator import Generator
from gqa.inference.step import Inference
from gqa.interop.huggingface import from_state_dict
from gqa.training import training_step

GOLDEN = Path(__file__).parent.parent.parent / "golden"
VERSIONS = ("t5_1_0", "t5_1_1")
LENGTH = 12


def if_installed(name):
    """Return the peer's name as a parameter; its tests are skipped without its packages."""
    packages = peers.PACKAGES[name]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"no {missing}"))


PEERS = [if_installed(name) for name in peers.PACKAGES]


def network(version):
    """Return random weights that generate several different tokens, and their config."""
    arrays = dict(np.load(GOLDEN / f"{version}.npz"))
    state = {n.removeprefix("weight:"): x for n, x in arrays.items() if n.startswith("weight:")}
    return from_state_dict(state, json.loads(str(arrays["config"])))


@pytest.fixture(scope="module")
def ours():
    """Return parameters, config, inputs and our tokens, by version of T5."""
    by_version = {}
    for version in VERSIONS:
        params, config = network(version)
        inputs = timing.random_tokens(config.vocab_size, 3, 20)
        generator = Generator(Inference(config), GREEDY, LENGTH, stop=False)
        tokens = generator(generator.prepare(params), inputs)
        by_version[version] = params, config, np.asarray(inputs), tokens
        assert 1 not in tokens, (
            "CTranslate2 never chooses EOS, which the others choose like any token"
        )
    assert len(np.unique(tokens)) > 5
    return by_version


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_chooses_our_tokens(ours, name, version):
    params, config, inputs, tokens = ours[version]
    peer = peers.build(name, params, config, inputs)
    np.testing.assert_array_equal(peer.generate(LENGTH), tokens)
    np.testing.assert_array_equal(peer.generate(1), tokens[:, :1])


@pytest.mark.parametrize("name", [if_installed(peers.HUGGING_FACE)])
def test_a_peer_trains_on_our_loss(name):
    del name
    params, config = network("t5_1_1")
    batch = {
        "inputs": np.asarray(timing.random_tokens(config.vocab_size, 2, 9)),
        "targets": np.asarray(timing.random_tokens(config.vocab_size, 2, 7, seed=1)),
    }
    sums = jax.jit(training_step.make_loss(config, 0.0))(params, batch, jax.random.key(0))
    step = peers.hugging_face_training(params, config, learning_rate=0.1)
    first, second = step(**batch), step(**batch)
    assert first == pytest.approx(float(sums["nats"] / sums["tokens"]), rel=1e-4)
    assert second < first


def test_a_missing_peer_is_named_in_one_line(monkeypatch):
    find_spec = importlib.util.find_spec
    absent = {"torch", "ctranslate2"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find_spec("json")
    )
    assert peers.installed() == []
    assert peers.missing() == [
        "Hugging Face is not timed because packages are missing (torch); "
        "pip install -r requirements-bench.txt",
        "CTranslate2 is not timed because packages are missing (ctranslate2); "
        "pip install -r requirements-bench.txt",
    ]
    absent.remove("torch")
    assert peers.installed() == [peers.HUGGING_FACE]
    assert len(peers.missing()) == 1
