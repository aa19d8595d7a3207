"""What config.json means where it says little, and files that repeat or omit the embedding."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gqa.interop import huggingface, safetensors_files
from gqa.interop.huggingface import from_state_dict, names, state_dict, writing
from gqa.interop.huggingface.config import from_config, to_config
from gqa.model.activations import GATED_GELU, RELU
from gqa.model.transformer import init_params
from gqa.runtime.errors import UserError

LEAST = {
    "model_type": "t5",
    "vocab_size": 32,
    "d_model": 16,
    "d_ff": 24,
    "num_heads": 4,
    "d_kv": 8,
    "num_layers": 2,
}


def test_defaults_are_those_of_transformers():
    t5, mt5 = to_config(LEAST), to_config(LEAST | {"model_type": "mt5"})
    assert (t5.activation, t5.tied_logits) == (RELU, True)
    assert (mt5.activation, mt5.tied_logits) == (GATED_GELU, False)
    assert (t5.num_buckets, t5.max_distance) == (32, 128)
    assert (
        t5.num_kv_heads_encoder,
        t5.num_kv_heads_self_attention,
        t5.num_kv_heads_cross_attention,
    ) == (4, 4, 4)
    assert (t5.num_encoder_layers, t5.num_decoder_layers) == (2, 2)


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("num_decoder_layers", 3, "num_decoder_layers", 3),
        ("relative_attention_num_buckets", 16, "num_buckets", 16),
        ("relative_attention_max_distance", 64, "max_distance", 64),
        ("num_key_value_heads", 2, "num_kv_heads_self_attention", 2),
        ("cross_num_key_value_heads", 1, "num_kv_heads_cross_attention", 1),
        ("cross_num_key_value_heads", [1, 2], "num_kv_heads_cross_attention", (1, 2)),
        ("encoder_num_key_value_heads", 2, "num_kv_heads_encoder", 2),
        ("scale_decoder_outputs", False, "tied_logits", False),
    ],
)
def test_a_key_changes_its_field_alone(key, value, field, expected):
    plain = to_config(LEAST)
    found = to_config(LEAST | {key: value})
    assert found == dataclasses.replace(plain, **{field: expected})
    assert to_config(json.loads(json.dumps(from_config(found)))) == found


def test_fixed_settings_may_be_said_or_left_out_but_not_changed():
    said = from_config(to_config(LEAST))
    assert (said["layer_norm_epsilon"], said["eos_token_id"]) == (1e-6, 1)
    assert said["pad_token_id"] == said["decoder_start_token_id"] == 0
    assert "num_key_value_heads" not in said
    assert to_config(LEAST | {"pad_token_id": None}) == to_config(LEAST)
    with pytest.raises(UserError, match="layer_norm_epsilon=2 is not supported; use "):
        to_config(LEAST | {"layer_norm_epsilon": 2})


@pytest.mark.parametrize(
    ("ours", "generation", "special"),
    [
        ({}, {}, (0, 1, 0)),
        ({"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}, {}, (1, 2, 0)),
        ({"eos_token_id": 2}, {"eos_token_id": 3, "pad_token_id": None}, (0, 3, 0)),
        ({"eos_token_id": [4]}, {"decoder_start_token_id": 5}, (0, 4, 5)),
        ({"bos_token_id": 6}, {}, (0, 1, 6)),
        ({"bos_token_id": 6, "decoder_start_token_id": 7}, {"bos_token_id": 8}, (0, 1, 7)),
    ],
)
def test_special_tokens_are_those_of_both_files(ours, generation, special):
    assert to_config(LEAST | ours, generation).special_tokens == special


@pytest.mark.parametrize(
    ("keys", "activation"),
    [
        ({"feed_forward_proj": "gated-silu"}, "gated_silu"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}, "gated_gelu"),
        ({"feed_forward_proj": "gelu"}, "gelu_exact"),
        ({"feed_forward_proj": "gated-gelu_python"}, "gated_gelu_exact"),
        ({"dense_act_fn": "swish", "is_gated_act": True}, "gated_silu"),
    ],
)
def test_activations_mean_what_they_mean_to_transformers(keys, activation):
    found = to_config(LEAST | keys)
    assert found.activation == activation
    assert to_config(from_config(found)) == found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "dense_act_fn='gelu' contra"),
        ({"feed_forward_proj": "relu", "dense_act_fn": "silu"}, "dense_act_fn='silu' contradicts"),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, "is_gated_act=True contradicts"),
        ({"feed_forward_proj": "prelu"}, "feed_forward_proj='prelu' is not supported; use relu"),
        ({"feed_forward_proj": "silu-gated"}, "feed_forward_proj='silu-gated' is not supported"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\] is not supported; use one id"),
        ({"pad_token_id": 1}, "eos_token_id=1; use another than pad_token_id=1"),
        ({"pad_token_id": 32}, "vocab_size=32; use more than 32, the largest special token"),
        ({"model_type": "longt5"}, "model_type='longt5' is not supported; use t5, mt5, umt5"),
    ],
)
def test_what_our_network_cannot_be_is_refused_by_its_key(keys, message):
    with pytest.raises(UserError, match=f"^{message}"):
        to_config(LEAST | keys)


@pytest.fixture
def network(tiny, random_params):
    return random_params(tiny), tiny


def test_tied_logits_that_are_not_scaled_are_read_from_the_embedding(network):
    """As mT5 is saved with tie_word_embeddings: no lm_head, and the network does not scale."""
    params, config = network
    hf_config = from_config(config) | {"model_type": "mt5"}
    state = state_dict(params, config)
    del state["lm_head.weight"]
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        from_state_dict(state, hf_config)
    found, found_config = from_state_dict(state, hf_config | {"tie_word_embeddings": True})
    assert not found_config.tied_logits
    np.testing.assert_array_equal(found["logits"], params["embedding"].T)


def test_a_copy_that_differs_in_its_last_row_is_refused(network, monkeypatch):
    """Also where it is compared a few rows at a time."""
    params, config = network
    state, hf_config = state_dict(params, config), from_config(config)
    name = names.COPIES[0]
    for piece in (2**25, 16 * 8 * 3):
        monkeypatch.setattr(safetensors_files, "PIECE", piece)
        copy = state["shared.weight"].copy()
        from_state_dict(state | {name: copy}, hf_config)
        copy[-1, -1] += 1
        with pytest.raises(UserError, match=f"{name} differs"):
            from_state_dict(state | {name: copy}, hf_config)
    for other in (state["shared.weight"][:-1], state["shared.weight"].astype(np.float64)):
        with pytest.raises(UserError, match=f"{name} differs"):
            from_state_dict(state | {name: other}, hf_config)


def test_saving_again_leaves_no_index_of_old_shards(network, tmp_path, monkeypatch):
    params, config = network
    with monkeypatch.context() as patched:
        patched.setattr(writing, "MAX_SHARD_BYTES", 20_000)
        huggingface.save(params, config, tmp_path)
    index = json.loads((tmp_path / safetensors_files.INDEX).read_text())
    files = {path.name: load_file(path) for path in tmp_path.glob("model-*.safetensors")}
    assert index["weight_map"] == {name: file for file, x in files.items() for name in x}
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(params))
    sizes = [sum(x.nbytes for x in state.values()) for state in files.values()]
    assert max(sizes) <= 20_000 < sum(sorted(sizes)[-2:])
    changed = jax.tree.map(lambda x: x + 1, params)
    huggingface.save(changed, config, tmp_path)
    found, _ = huggingface.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, changed)


def test_expanding_repeats_each_kv_head_for_its_neighbours(tiny, random_params):
    """Query heads 0 and 1 read KV head 0 of two: so it is there twice, then head 1 twice."""
    config = dataclasses.replace(tiny, num_kv_heads_cross_attention=2)
    params = random_params(config)
    state = state_dict(params, config, expand=True)
    wide = state["decoder.block.1.layer.1.EncDecAttention.k.weight"].reshape(4, 8, 16)
    heads = np.asarray(params["decoder"]["layers"]["cross_attention"]["key"][1])
    for n, k in enumerate((0, 0, 1, 1)):
        np.testing.assert_array_equal(wide[n], heads[:, k].T)


@pytest.mark.parametrize(("encoder", "cross"), [(4, 4), (2, 2), (4, 2), (2, 4)])
def test_kv_heads_that_a_file_leaves_open_are_those_of_its_tensors(encoder, cross):
    """GQA T5s of others have one number, and their tensors show for which attentions it is."""
    heads = {"num_kv_heads_encoder": encoder, "num_kv_heads_cross_attention": cross}
    config = dataclasses.replace(to_config(LEAST), num_kv_heads_self_attention=2, **heads)
    params = init_params(config, 0)
    found, found_config = from_state_dict(
        state_dict(params, config), LEAST | {"num_key_value_heads": 2}
    )
    assert found_config == config
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_kv_heads_that_no_tensor_has_are_refused_by_the_tensor():
    heads = {"num_kv_heads_encoder": 1, "num_kv_heads_self_attention": 2}
    config = dataclasses.replace(to_config(LEAST), **heads)
    state = state_dict(init_params(config, 0), config)
    with pytest.raises(UserError, match=r"encoder\.block\.0.*SelfAttention\.k\.weight has shape"):
        from_state_dict(state, LEAST | {"num_key_value_heads": 2})
