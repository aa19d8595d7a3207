"""A checkpoint of Hugging Face or T5X takes the place of pretraining."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from configs import base
from experiments.graph import plan
from experiments.run import local
from experiments.stages import initial_checkpoint
from experiments.stages.folder import StageFolder
from gqa.checkpoints import checkpoint
from gqa.data import tokenizer
from gqa.interop import huggingface
from gqa.model.activations import RELU
from gqa.runtime import hardware
from gqa.runtime.errors import CheckpointError, UserError
from gqa.runtime.mesh import make_mesh
from gqa.training import optimizer, training_step
from tests.interop import test_t5x
from tests.support import jobs


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 4))) for _ in range(400)]
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    tokenizer.train([" ".join(words[i : i + 8]) for i in range(0, 400, 8)] * 5, 512, path)
    return path


@pytest.fixture
def network(tiny, random_params):
    """T5 1.0 with 4 heads."""
    config = dataclasses.replace(tiny, vocab_size=512, activation=RELU, tied_logits=True)
    return jax.tree.map(lambda x: 0.2 * x, random_params(config)), config


@pytest.fixture
def folder(network, vocabulary, tmp_path):
    huggingface.save(*network, tmp_path / "t5-tiny", vocabulary=vocabulary)
    return tmp_path / "t5-tiny"


def config_of(folder, arg="", kv_heads=None, **more):
    config = base.get_config(arg, kv_heads)
    config.init.huggingface = str(folder)
    for key, value in more.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


def test_the_job_goes_on_from_it(folder, network, tmp_path):
    params, config = network
    settings = {k: v for k, v in jobs.TINY.items() if not k.startswith("model.")}
    del settings["convert.num_kv_heads_encoder"]
    settings |= {"init.huggingface": folder, "finetune.tasks": "docstring_summary"}
    told = jobs.launch(tmp_path / "runs", settings, "--stage=uptrain")
    assert f"pretrain (t5-tiny, 4 KV heads, seed 0): {folder}, validation loss" in told
    found = {p.name.split("-")[0]: p for p in (tmp_path / "runs" / "stages").iterdir()}
    assert found.keys() == {"pretrain", "convert", "uptrain"}
    path = found["pretrain"] / "checkpoints"
    assert [p.name for p in path.iterdir()] == ["6"]  # as many steps as pretrain.steps
    saved = checkpoint.load_config(path)
    assert saved["model"] == config.__dict__
    state = training_step.abstract(config, make_mesh())
    shapes = {"params": state.params, "opt_state": state.opt_state}
    arrays = checkpoint.load(path, shapes)
    jax.tree.map(np.testing.assert_array_equal, arrays["params"], params)
    fresh = optimizer.adafactor().init(params)
    jax.tree.map(np.testing.assert_array_equal, arrays["opt_state"], fresh)
    uptrained = found["uptrain"] / "checkpoints"
    assert max(p.name for p in uptrained.iterdir()) == "9"  # and half of them more
    outcome = StageFolder(found["pretrain"]).read_outcome()
    assert [r["value"] for r in outcome.records if r["metric"] == "steps"] == [0]
    assert "validation loss" not in jobs.launch(tmp_path / "runs", settings, "--stage=uptrain")


def test_sizes_and_vocabulary_are_the_checkpoints(folder, network):
    config = config_of(folder, kv_heads=2)
    ours = initial_checkpoint.adopted(config)
    assert plan.parent_config(ours) == network[1]
    assert plan.target_heads(ours) == {"encoder": 4, "self_attention": 2, "cross_attention": 2}
    assert ours.text.vocabulary == str(folder)
    assert ours.size == "t5-tiny"
    assert config.model.num_heads == 16  # not changed itself
    assert initial_checkpoint.adopted(config_of("")) == config_of("")
    assert plan.target_heads(initial_checkpoint.adopted(config_of(folder)))["self_attention"] == 4
    own = initial_checkpoint.adopted(config_of(folder, text__vocabulary="mine"))
    assert own.text.vocabulary == "mine"


def test_t5_of_a_named_size_may_be_of_another_family(tiny, random_params, tmp_path):
    sizes = base.get_config("small").model
    names = {"d_model", "d_ff", "num_heads", "head_dim"}
    heads = dict.fromkeys(
        ("num_kv_heads_encoder", "num_kv_heads_self_attention", "num_kv_heads_cross_attention"), 6
    )
    more = {k: sizes[k] for k in names} | {"activation": RELU, "tied_logits": True} | heads
    config = dataclasses.replace(tiny, **more, num_encoder_layers=8, num_decoder_layers=8)
    huggingface.save(random_params(config), config, tmp_path)
    (tmp_path / "spiece.model").touch()
    ours = initial_checkpoint.adopted(config_of(tmp_path, "small"))
    assert (ours.size, ours.model.vocab_size, ours.model.activation) == ("small", 32, RELU)


@pytest.mark.parametrize(
    ("arg", "more", "message"),
    [
        (
            "small",
            {},
            r"model\.d_ff=1024 contradicts .*, which has 24; use --config\.model\.d_ff=24",
        ),
        ("", {"model__d_ff": 48}, r"model\.d_ff=48 contradicts .*, which has 24; use --conf"),
        ("", {"model__vocab_size": 1024}, r"model\.vocab_size=1024 contradicts .*, which has 512"),
        ("", {"init__t5x": "x"}, r"init\.huggingface and init\.t5x are both set; use one"),
        ("", {"init__huggingface": "/none"}, r"init\.huggingface: /none: No such folder"),
    ],
)
def test_what_contradicts_it_is_refused(folder, arg, more, message):
    with pytest.raises(UserError, match=message):
        initial_checkpoint.adopted(config_of(folder, arg, **more))


def test_a_key_that_agrees_is_no_conflict(folder):
    assert initial_checkpoint.adopted(config_of(folder, model__d_ff=24)).model.d_ff == 24


def test_a_grouped_network_or_no_vocabulary_is_refused(folder, network, random_params, tmp_path):
    grouped = dataclasses.replace(network[1], num_kv_heads_cross_attention=2)
    huggingface.save(random_params(grouped), grouped, tmp_path / "grouped")
    with pytest.raises(UserError, match=r"grouped has grouped attention; init\.\* takes a multi"):
        initial_checkpoint.adopted(config_of(tmp_path / "grouped"))
    (folder / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(CheckpointError, match=r"spiece\.model: is a pointer of Git LFS"):
        initial_checkpoint.adopted(config_of(folder))
    (folder / "spiece.model").unlink()
    (folder / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"spiece\.model is missing; set text\.vocabulary"):
        initial_checkpoint.adopted(config_of(folder))


def test_t5x_is_taken_too(network, vocabulary, tmp_path):
    test_t5x.write(tmp_path / "a", test_t5x.their_arrays(*network))
    config = base.get_config()
    config.init.t5x, config.text.vocabulary = str(tmp_path / "a"), str(vocabulary)
    ours = initial_checkpoint.adopted(config)
    assert plan.parent_config(ours) == network[1]
    initial = initial_checkpoint.identity(ours)
    assert initial_checkpoint.open_source(initial).config == network[1]
    other = dataclasses.replace(network[1], d_ff=8)
    with pytest.raises(UserError, match=r"model\.d_ff=8 contradicts .*a, which has 24"):
        initial_checkpoint.check_network(initial, network[1], other)


def test_its_time_tells_nothing_of_training_steps(folder):
    """`pretrain.steps` were not done here."""
    stages = plan.plan(initial_checkpoint.adopted(config_of(folder, kv_heads=2)), None)
    by_kind = {stage.kind: stage for stage in stages}
    assert local._pace(by_kind["pretrain"]) != local._pace(by_kind["uptrain"])
    assert local._work(by_kind["pretrain"]) == 1


def key_of(folder):
    return plan.plan(initial_checkpoint.adopted(config_of(folder)), None)[0].key


def test_every_byte_of_the_weights_tells_a_stage(folder, network):
    before = key_of(folder)
    assert before == key_of(folder)
    assert before != plan.plan(base.get_config(), None)[0].key
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for place in (len(content) // 2, len(content) - 3):
        content[place] ^= 1
        path.write_bytes(content)
        assert key_of(folder) != before
        content[place] ^= 1
    path.write_bytes(content)
    assert key_of(folder) == before
    params = jax.tree.map(lambda x: 2 * x, network[0])
    huggingface.save(params, network[1], folder)
    assert before != key_of(folder)


def test_files_that_are_not_read_tell_nothing(folder):
    """Such as a README, or the workdir of the run itself."""
    before = key_of(folder)
    (folder / "README.md").write_text("x")
    (folder / "runs" / "stages" / "pretrain-1" / "checkpoints").mkdir(parents=True)
    (folder / "runs" / "results.jsonl").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert key_of(folder) == before


def test_files_of_t5x_that_are_not_read_tell_nothing(network, vocabulary, tmp_path):
    folder = tmp_path / "checkpoint_10"
    test_t5x.write(folder, test_t5x.their_arrays(*network))
    config = base.get_config()
    config.init.t5x, config.text.vocabulary = str(folder), str(vocabulary)
    before = initial_checkpoint.identity(config)
    (folder / "README.md").write_text("x")
    (folder / "runs").mkdir()
    assert initial_checkpoint.identity(config) == before
    chunk = folder / "target.encoder.encoder_norm.scale" / "0"
    content = bytearray(chunk.read_bytes())
    content[4] ^= 1  # the time in gzip's header, which decodes to the same numbers
    chunk.write_bytes(content)
    assert initial_checkpoint.identity(config) != before


def test_files_that_changed_since_the_plan_are_refused(folder, network):
    config = initial_checkpoint.adopted(config_of(folder))
    initial = initial_checkpoint.identity(config)
    source = initial_checkpoint.open_source(initial)
    huggingface.save(jax.tree.map(lambda x: 2 * x, network[0]), network[1], folder)
    with pytest.raises(CheckpointError, match="t5-tiny: its files have changed since this run"):
        initial_checkpoint.check_contents(initial, source)
    with pytest.raises(CheckpointError, match="t5-tiny: its files have changed since this run"):
        initial_checkpoint.open_source(initial)


def test_what_is_neither_a_folder_nor_a_name_comes_with_advice():
    message = r"init\.huggingface: /no/t5: No such folder; name a folder, or a model of the Hugging"
    with pytest.raises(CheckpointError, match=message):
        initial_checkpoint.adopted(config_of("/no/t5"))


def test_a_snapshot_of_the_hub_has_the_models_name(folder, tmp_path):
    """Its folder has the name of a commit. The cache's folder stands for the snapshot of main."""
    cached = tmp_path / "models--google--t5-v1_1-x"
    snapshot = cached / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    config = initial_checkpoint.adopted(config_of(cached))
    assert (config.size, config.init.huggingface) == ("t5-v1_1-x", str(snapshot))
    assert initial_checkpoint.identity(config).folder == str(snapshot)
    assert config.text.vocabulary == str(snapshot)


def test_more_than_the_memory_is_refused(folder, monkeypatch):
    memory = type("Memory", (), {"total": 1000})
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(
        UserError, match=r"init\.huggingface: .*t5-tiny, of [\d,]+ parameters, takes"
    ):
        initial_checkpoint.adopted(config_of(folder))
