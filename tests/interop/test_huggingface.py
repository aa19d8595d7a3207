"""Our network, given Transformers' weights, gives Transformers' logits.

The golden arrays are always compared; where torch and transformers are installed, so is the live
model after a round through its own files.
"""

import contextlib
import importlib.util
import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gqa.conversion import convert
from gqa.interop import huggingface
from gqa.interop.huggingface import (
    COPIES,
    UNUSED,
    from_config,
    from_state_dict,
    load,
    state_dict,
    to_config,
)
from gqa.interop.safetensors_files import Tensors
from gqa.model.layers import relative_position_bucket
from gqa.model.transformer import Transformer
from gqa.runtime.errors import UserError

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
    monkeypatch.setattr(huggingface, "SHARD", 20_000)
    params, config, _ = convert(
        *golden(version, None)[:2], {"self_attention": 2, "cross_attention": 1}
    )
    (tmp_path / "mine.model").write_bytes(b"pieces")
    huggingface.save(params, config, tmp_path / "a", expand, tmp_path / "mine.model")
    said = json.loads((tmp_path / "a" / "config.json").read_text())
    assert said.get("num_key_value_heads") == (None if expand else 2)
    assert (tmp_path / "a" / "spiece.model").read_bytes() == b"pieces"
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


def test_umt5_is_refused_by_name(hf_config):
    with pytest.raises(UserError, match="model_type='umt5' is not supported: it has a position"):
        to_config(hf_config | {"model_type": "umt5"})


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_differs_is_refused(name):
    state, hf_config, _ = read_golden("t5_1_0")
    with pytest.raises(UserError, match=rf"{name} differs from shared\.weight"):
        from_state_dict(state | {name: state["shared.weight"] + 1}, hf_config)


@pytest.mark.parametrize(
    "name",
    [
        "shared.weight",
        "lm_head.weight",
        "encoder.final_layer_norm.weight",
        "encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.2.layer.1.EncDecAttention.o.weight",
    ],
)
def test_a_missing_or_misshapen_tensor_is_refused(state, hf_config, name):
    hf_config = hf_config | {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    others = {n: x for n, x in state.items() if n != name}
    with pytest.raises(UserError, match=rf"{name} is missing \(1 in all\)"):
        from_state_dict(others, hf_config)
    with pytest.raises(UserError, match=f"{name} has shape"):
        from_state_dict(others | {name: np.concatenate([state[name], state[name]])}, hf_config)


def test_an_unknown_tensor_is_refused(state, hf_config):
    with pytest.raises(UserError, match=r"encoder\.block\.9\.q\.weight is not one of T5's \(1 in"):
        from_state_dict(state | {"encoder.block.9.q.weight": np.zeros(1)}, hf_config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "bart"),
        ("feed_forward_proj", "gated-silu"),
        ("layer_norm_epsilon", 1e-5),
        ("pad_token_id", 3),
    ],
)
def test_another_network_is_refused(hf_config, key, value):
    with pytest.raises(UserError, match=f"{key}='?{value}'? is not supported; use "):
        to_config(hf_config | {key: value})


def test_a_config_without_a_size_is_refused(hf_config):
    incomplete = {key: value for key, value in hf_config.items() if key != "d_kv"}
    with pytest.raises(UserError, match="no d_kv"):
        to_config(incomplete)


def test_configs_older_than_a_key(hf_config):
    keys = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers", "model_type")
    old = {key: hf_config[key] for key in keys}
    config = to_config(old)
    assert (config.activation, config.tied_logits) == ("relu", True)
    assert config.num_decoder_layers == config.num_encoder_layers
    assert to_config(old | {"tie_word_embeddings": False}).tied_logits is False


def test_unreadable_files_are_named(tmp_path, hf_config):
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: Expecting"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    with pytest.raises(UserError, match=r"model\.safetensors: No such file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match=r"model\.safetensors: .*header"):
        load(tmp_path)


NOT_SIZES = ["16", "", 0, -1, 1.5, 1e30, 2**31, 10**400, True, None, [8], {"a": 1}, "x" * 10**6]
SIZE_KEYS = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers")


@pytest.mark.parametrize("key", [*SIZE_KEYS, "relative_attention_num_buckets"])
@pytest.mark.parametrize("value", NOT_SIZES, ids=range(len(NOT_SIZES)))
def test_a_size_that_is_none_is_refused_by_its_key(tmp_path, hf_config, key, value):
    (tmp_path / "config.json").write_text(json.dumps(hf_config | {key: value}))
    with pytest.raises(UserError, match=rf"config\.json: .*{key}") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1100


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b"null", b"[" * 100_000, b"\xff\xfe", b"", b'{"a": ' + b"1" * 5000]
)
def test_a_config_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tie_word_embeddings", "false"), ("scale_decoder_outputs", 1), ("feed_forward_proj", ["x"])],
)
def test_other_values_of_a_wrong_type_are_refused(hf_config, key, value):
    with pytest.raises(UserError, match=f"{key}="):
        to_config(hf_config | {key: value})


@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(read_golden("t5_1_1")[1])),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-4, 64),
            st.integers(2**20),
            st.floats(),
            st.text(),
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_config_is_that_of_the_tensors_or_refused(changes):
    state, hf_config, _ = read_golden("t5_1_1")
    with contextlib.suppress(UserError):
        _, config = from_state_dict(state, hf_config | changes)
        assert config.d_model == state["shared.weight"].shape[1]


def damaged_headers():
    """Whole files by what is wrong with them."""

    def file(header, size=8, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)

    def one(**changes):
        tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
        return {"shared.weight": tensor}

    return {
        "nothing": b"",
        "length beyond the file": file({}, length=10**6),
        "a huge length": file({}, length=2**63),
        "no JSON": file(b"{"),
        "no UTF-8": file(b"\xff"),
        "no object": file(b"[]"),
        "deep": file(b"[" * 100_000),
        "offsets beyond the file": file(one(shape=[200], data_offsets=[0, 800])),
        "offsets beyond all": file(one(shape=[2**62, 4], data_offsets=[0, 2**64 - 1])),
        "a negative shape": file(one(shape=[-2])),
        "shape against offsets": file(one(shape=[3])),
        "an unknown dtype": file(one(dtype="F7")),
        "a dtype that NumPy lacks": file(one(dtype="F8_E4M3", shape=[8])),
        "cut": file(one(), size=7),
    }


@pytest.mark.parametrize("name", damaged_headers())
def test_a_damaged_safetensors_file_is_refused(tmp_path, hf_config, name):
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    (tmp_path / "model.safetensors").write_bytes(damaged_headers()[name])
    with pytest.raises(UserError, match=r"model\.safetensors: \S"):
        load(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path, state, hf_config):
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    name = "encoder.final_layer_norm.weight"
    save_file(state | {name: state[name].astype(np.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"model\.safetensors: tensor {name} has dtype I64"):
        load(tmp_path)


def test_absurdly_many_layers_are_refused_before_they_are_traced(state, hf_config):
    for key in ("num_layers", "num_decoder_layers"):
        with pytest.raises(UserError, match=r"\d+ tensors are too few for the 2147\d+ layers"):
            from_state_dict(state, hf_config | {key: 2**31 - 1})
