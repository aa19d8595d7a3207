"""What a stage reads is checked, and a damaged checkpoint costs no more than was wished."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from configs import base
from experiments.graph import plan
from experiments.stages import inputs, pretrain
from experiments.stages.folder import StageFolder
from experiments.stages.typed_json import to_json
from gqa.checkpoints.checkpoint import Checkpoints
from gqa.runtime.errors import UserError
from tests.support import variants

VARIANT = variants.grouped(num_heads=4, num_kv_heads=2)


@pytest.fixture
def info(tiny):
    recipe = plan.pretrain_recipe(base.get_config())
    return to_json(inputs.CheckpointInfo(tiny, "a hash", recipe, VARIANT))


def save(folder, info):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.zeros(1)}, "config": info}, {"validation_loss": 1})
    return folder


def test_what_a_checkpoint_says_of_itself_is_read(info, tiny, tmp_path):
    parent = inputs.open_parent(save(tmp_path, info | {"task": "parameter_qa"}))
    assert parent.config == tiny
    assert parent.path == tmp_path / "1"
    assert parent.info.task == "parameter_qa"
    assert parent.step == 1


def changed(info, path, value):
    """`info` with another value at a path like model.d_model; None takes the key out."""
    key, _, rest = path.partition(".")
    if rest:
        return info | {key: changed(info[key], rest, value)}
    without = {k: v for k, v in info.items() if k != key}
    return without if value is None else without | {key: value}


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("model", None, "config.model is missing"),
        ("vocabulary", 3, "config.vocabulary is 3 instead of a value of type str"),
        ("more", {}, "config.more is unknown"),
        ("variant.seed", None, "config.variant.seed is missing"),
        ("variant", [], r"config.variant is \[\] instead of a value of type Variant"),
        ("model.d_model", None, "config.model.d_model is missing"),
        ("model.d_model", "16", "config.model.d_model is '16' instead of a value of type int"),
        ("model.d_model", True, "config.model.d_model is True instead of a value of type int"),
        ("model.tied_logits", 1, "config.model.tied_logits is 1 instead of a value of type bool"),
        ("model.dropout_rate", [], r"config.model.dropout_rate is \[\] instead of"),
        ("model.layers", 2, "config.model.layers is unknown"),
        (
            "model.num_kv_heads_cross_attention",
            3,
            "model.num_kv_heads_cross_attention=3 does not divide num_heads=4",
        ),
        ("model.num_heads", 10**12, "config.model.num_heads is 1000000000000; use 1 to 10000000"),
        ("model.d_model", 0, "config.model.d_model is 0; use 1 to 10000000"),
        ("recipe.steps", 1.5, "config.recipe.steps is 1.5 instead of a value of type int"),
        ("recipe.task", None, "config.recipe.task is missing"),
    ],
)
def test_what_it_says_wrong_is_named(info, tmp_path, path, value, problem):
    save(tmp_path, changed(info, path, value))
    with pytest.raises(UserError, match=problem):
        inputs.open_parent(tmp_path)


def test_a_network_that_no_memory_holds_is_refused_before_any_compute(tmp_path):
    config = base.get_config("xxl")
    config.model.num_decoder_layers = 10_000
    settings = plan.plan(config, None)[0].settings
    text = SimpleNamespace(tokenizer=SimpleNamespace(hash="a hash"))
    job = SimpleNamespace(text=text)
    with pytest.raises(UserError, match=r"^training a network of [\d,]+ parameters takes .* GiB"):
        pretrain.run("pretrain", settings, StageFolder(tmp_path), [], job)


@pytest.mark.parametrize("load", [inputs.load_params, inputs.load_state])
def test_a_checkpoint_of_another_vocabulary_is_refused(info, tmp_path, load):
    parent = inputs.open_parent(save(tmp_path / "1", info))
    text = SimpleNamespace(tokenizer=SimpleNamespace(hash="another hash"), folder=tmp_path / "text")
    with pytest.raises(UserError, match=r"trained with another vocabulary .* text in .*text; use"):
        load(parent, SimpleNamespace(text=text))


def test_the_state_has_the_step_of_its_checkpoint(monkeypatch):
    """Uptraining goes on from this step, with the learning rate that belongs to it."""
    items = {"params": {"w": 1}, "opt_state": {"m": 2}, "data": {"position": 3}}
    monkeypatch.setattr(inputs, "_load", lambda *_: items)
    state, data = inputs.load_state(SimpleNamespace(step=7), SimpleNamespace())
    assert int(state.step) == 7
    assert (state.params, state.opt_state, data) == ({"w": 1}, {"m": 2}, {"position": 3})
