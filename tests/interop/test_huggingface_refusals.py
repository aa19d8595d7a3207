"""A folder or state dict that is not a T5 of ours is refused in one line that names the fault."""

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gqa.interop.huggingface import COPIES, from_state_dict, load, to_config
from gqa.runtime.errors import UserError
from tests.interop.test_huggingface import read_golden


@pytest.fixture(scope="module")
def state():
    return read_golden("t5_1_1")[0]


@pytest.fixture(scope="module")
def hf_config():
    return read_golden("t5_1_1")[1]


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
        ("feed_forward_proj", "xielu"),
        ("layer_norm_epsilon", 1e-5),
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
