"""Our network, given Transformers' weights, gives Transformers' logits.

The golden arrays are always compared; where torch and transformers are installed, so is the live
model after a round through its own files.
"""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gqa.conversion import convert
from gqa.data import tokenizer
from gqa.interop import huggingface
from gqa.interop.huggingface import (
    COPIES,
    UNUSED,
    from_config,
    from_state_dict,
    load,
    state_dict,
    to_config,
    writing,
)
from gqa.interop.safetensors_files import Tensors
from gqa.model.layers import relative_position_bucket
from gqa.model.transformer import Transformer

GOLDEN = Path(__file__).parent.parent / "golden"
HAVE_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def read_golden(version):
    """The state dict and config of a golden file, and its inputs, targets and logits."""
    arrays = dict(np.load(GOLDEN / f"{version}.npz"))
    state = {n.removeprefix("weight:"): x for n, x in arrays.items() if n.startswith("weight:")}
    data = [arrays[name] for name in ("inputs", "targets", "logits")]
    return state, json.loads(str(arrays["config"])), data


def golden(version, folder):
    del folder
    state, hf_config, data = read_golden(version)
    return *from_state_dict(state, hf_config), *data


def live(version, folder):
    """Another random model than the golden one, saved by Transformers and read by us."""
    from tests import make_golden

    model = make_golden.build_model(version, seed=7)
    model.save_pretrained(folder)
    inputs, targets = make_golden.random_batch(seed=7)
    return *load(folder), inputs, targets, make_golden.compute_logits(model, inputs, targets)


def max_relative_error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def apply(params, config, inputs, targets):
    batch = {"inputs": inputs, "targets": targets}
    return jax.jit(Transformer(config).apply)({"params": params}, batch)


@pytest.fixture(scope="module")
def state():
    return read_golden("t5_1_1")[0]


@pytest.fixture(scope="module")
def hf_config():
    return read_golden("t5_1_1")[1]


@pytest.mark.parametrize("version", ["t5_1_0", "t5_1_1"])
@pytest.mark.parametrize("reference", [golden, live] if HAVE_TORCH else [golden])
def test_logits_are_those_of_transformers(version, reference, tmp_path):
    params, config, inputs, targets, logits = reference(version, tmp_path)
    assert config.tied_logits == (version == "t5_1_0")
    assert max_relative_error(apply(params, config, inputs, targets), logits) < 1e-4


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("bucket", [0, 31])
def test_golden_logits_depend_on_the_position_bias(stack, bucket):
    """The parity test could not see what does not matter."""
    params, config, inputs, targets, logits = golden("t5_1_1", None)
    position_bias = params[stack]["position_bias"]
    position_bias["table"] = position_bias["table"].at[bucket].add(1.0)
    assert max_relative_error(apply(params, config, inputs, targets), logits) > 1e-2


def test_golden_logits_depend_on_padding():
    params, config, inputs, targets, logits = golden("t5_1_1", None)
    inputs = np.where(inputs == 0, 5, inputs)
    assert max_relative_error(apply(params, config, inputs, targets), logits) > 1e-2


@pytest.mark.parametrize("rule", ["bidirectional", "causal"])
def test_buckets_are_those_of_transformers(rule):
    distance = np.arange(-300, 301)
    buckets = relative_position_bucket(distance, rule == "bidirectional", 32, 128)
    np.testing.assert_array_equal(buckets, np.load(GOLDEN / "buckets.npz")[rule])


def test_load_reads_what_from_state_dict_is_given(tmp_path, state, hf_config):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    params, config = load(tmp_path)
    expected, expected_config = from_state_dict(state, hf_config)
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_layers_and_heads_keep_their_order(state, hf_config):
    params, config = from_state_dict(state, hf_config)
    H = config.head_dim
    kernels = params["decoder"]["layers"]["cross_attention"]
    theirs = state["decoder.block.2.layer.1.EncDecAttention.k.weight"]
    np.testing.assert_array_equal(kernels["key"][2, :, 3], theirs[3 * H :].T)
    theirs = state["decoder.block.2.layer.1.EncDecAttention.o.weight"]
    np.testing.assert_array_equal(kernels["out"][2, 3], theirs[:, 3 * H :].T)


def test_copies_of_the_embedding_and_an_unused_table_are_accepted():
    state, hf_config, _ = read_golden("t5_1_0")
    copies = dict.fromkeys(COPIES, state["shared.weight"]) | {UNUSED: np.zeros((32, 4))}
    params, config = from_state_dict(state | copies, hf_config)
    expected, expected_config = from_state_dict(state, hf_config)
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("version", ["t5_1_0", "t5_1_1"])
def test_state_dict_and_from_config_are_the_way_back(version):
    state, hf_config, _ = read_golden(version)
    params, config = from_state_dict(state, hf_config)
    assert to_config(from_config(config)) == config
    back = state_dict(params, config)
    assert back.keys() == state.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name].astype(np.float32), err_msg=name)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("version", ["t5_1_0", "t5_1_1"])
def test_a_grouped_network_is_saved_and_read_back(version, expand, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 20_000)
    params, config, _ = convert(
        *golden(version, None)[:2], {"self_attention": 2, "cross_attention": 1}
    )
    tokenizer.train(["some words to learn from"] * 20, 455, tmp_path / "mine.model")
    huggingface.save(params, config, tmp_path / "a", expand, tmp_path / "mine.model")
    said = json.loads((tmp_path / "a" / "config.json").read_text())
    assert said.get("num_key_value_heads") == (None if expand else 2)
    pieces = (tmp_path / "mine.model").read_bytes()
    assert (tmp_path / "a" / "spiece.model").read_bytes() == pieces
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    assert len(list((tmp_path / "a").glob("model-*-of-*.safetensors"))) > 2
    back, back_config = load(tmp_path / "a")
    if expand:
        _, _, inputs, targets, _ = golden(version, None)
        assert (
            back_config.num_kv_heads_self_attention == back_config.num_kv_heads_cross_attention == 4
        )
        ours = apply(params, config, inputs, targets)
        assert max_relative_error(apply(back, back_config, inputs, targets), ours) < 1e-5
    else:
        assert back_config == config
        jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.skipif(not HAVE_TORCH, reason="compares with torch and transformers")
@pytest.mark.parametrize("version", ["t5_1_0", "t5_1_1"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_transformers_runs_what_is_saved(version, kv_heads, tmp_path):
    import transformers

    from tests import make_golden

    _, _, inputs, targets, _ = golden(version, None)
    params, config, _ = convert(*golden(version, None)[:2], kv_heads)
    huggingface.save(params, config, tmp_path, expand=kv_heads < 4)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    logits = make_golden.compute_logits(model, inputs, targets)
    assert max_relative_error(apply(params, config, inputs, targets), logits) < 1e-4


@pytest.mark.skipif(not HAVE_TORCH, reason="compares with torch and transformers")
@pytest.mark.parametrize("own_logits", [False, True])
def test_mt5_never_scales_its_logits(own_logits, tmp_path):
    import torch
    import transformers

    from tests import make_golden

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_heads": 4}
    hf_config = transformers.MT5Config(**sizes, num_layers=2, decoder_start_token_id=0)
    model = transformers.MT5ForConditionalGeneration(hf_config).eval()
    if own_logits:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    inputs, targets = make_golden.random_batch(seed=7)
    logits = make_golden.compute_logits(model, inputs, targets)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert ("lm_head.weight" in Tensors(tmp_path)) == own_logits
    params, config = load(tmp_path)
    assert not config.tied_logits
    assert max_relative_error(apply(params, config, inputs, targets), logits) < 1e-4
