"""The table of model types, compared with the cache that Transformers allocates for each of them.

A small random model of every type reads some tokens; each layer of its cache has the KV heads, the
sizes and the positions that the table says.
"""

import dataclasses
import importlib.util
import json

import pytest

from gqa.kv_cache.config_json import to_decoder
from gqa.kv_cache.model_types import MODEL_TYPES
from gqa.kv_cache.nested_types import FLAT, NESTED

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="compares with torch and transformers",
)

LENGTH, INPUTS = 23, 11  # positions of the decoder and of the encoder
LAYERS, HEADS, KV_HEADS, WIDTH = 6, 4, 2, 64
# Sizes of the small models by all their names; each type takes those that its class has.
SMALL = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS - 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), WIDTH),
    **dict.fromkeys(("encoder_layers", "encoder_attention_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "d_ff", "n_inner"), 24),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_hidden_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "n_shared_experts"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "n_group", "topk_group", "pad_token_id"), 1),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "rotary_dim", "laurel_rank"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 4),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "moe_shared_expert_intermediate_size"), 8),
    "num_key_value_heads": KV_HEADS,
    "head_dim": 8,
    "d_kv": 6,
    "sliding_window": 7,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "mamba_d_ssm": 128,
    "vocab_size_per_layer_input": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "max_source_positions": INPUTS,
    "use_mamba_kernels": False,
}
MIXED = ["full_attention", "sliding_attention", "sliding_attention"] * 2
HYBRID = ["linear_attention", "full_attention", "linear_attention"] * 2
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
# What a type needs to be built at this size, or to have more than one kind of layer.
NEEDS = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "helium": {"head_dim": WIDTH // HEADS},
    "lfm2": {"full_attn_idxs": [0, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"] * 2},
    "longcat_flash": {"head_dim": 4},
    "nemotron_h": {"sliding_window": None, "hybrid_override_pattern": "M-*EM*"},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen2_5_vl_text": {"use_sliding_window": True, "max_window_layers": 4, **MROPE},
    "qwen2_vl_text": {"use_sliding_window": True, "max_window_layers": 2, **MROPE},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 5},
    "smollm3": {"use_sliding_window": True},
}
# More files of some types: what a field changes, and what it does not.
VARIANTS = [
    *[(kind, {"num_key_value_heads": None}) for kind in ("llama", "phi3", "granite", "cohere2")],
    *[(kind, {"layer_types": MIXED}) for kind in ("gemma2", "gemma3_text", "qwen3", "olmo3")],
    *[(kind, {"sliding_window": None}) for kind in ("mistral", "phi3", "mixtral", "starcoder2")],
    *[(kind, {"use_sliding_window": False}) for kind in ("qwen2", "qwen2_moe", "qwen3_moe")],
    *[(kind, {"head_dim": 24}) for kind in ("llama", "qwen2", "granite", "starcoder2", "cohere")],
    ("afmoe", {"global_attn_every_n_layers": 2}),
    ("cohere2", {"sliding_window_pattern": 3}),
    ("deepseek_v3", {"kv_lora_rank": 9}),
    ("dots1", {"max_window_layers": 2}),
    ("exaone4", {"sliding_window_pattern": 3}),
    ("falcon", {"multi_query": False}),
    ("falcon", {"multi_query": False, "num_kv_heads": 4}),
    ("gemma3_text", {"sliding_window_pattern": 2}),
    ("gemma4_text", {"global_head_dim": 12}),
    ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma4_text", {"num_kv_shared_layers": 3, "layer_types": MIXED[:3] * 2}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_oss", {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}),
    ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 1}),
    ("lfm2", {"layer_types": ["conv", "full_attention", "conv"] * 2}),
    ("llama", {"hidden_size": 32, "head_dim": None}),
    ("llama4_text", {"attention_chunk_size": 5}),
    ("llama4_text", {"no_rope_layers": [0, 1, 1, 1, 1, 0], "attention_chunk_size": 5}),
    ("nemotron_h", {"hybrid_override_pattern": "M*-M*E"}),
    ("qwen2_vl_text", {"use_sliding_window": False}),
    ("qwen2_5_vl_text", {"num_key_value_heads": None}),
    ("qwen3_vl_moe_text", {"head_dim": None}),
    ("qwen3_next", {"full_attention_interval": 2}),
    ("qwen3_moe", {"use_sliding_window": True}),
    ("smollm3", {"no_rope_layers": [1, 1, 0, 0, 1, 1], "use_sliding_window": True}),
    ("t5", {"num_decoder_layers": None}),
]


def small_config(model_type, **more):
    """The fields that differ from the class's defaults, as a config.json may have them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    small = {key: value for key, value in SMALL.items() if key in fields}
    return {"model_type": model_type} | small | NEEDS.get(model_type, {}) | more


def build(config):
    """The random model of a config, and the config.json that Transformers writes for it."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**config)
    kind = transformers.AutoModelForCausalLM
    if config.model_type == "whisper":
        kind = transformers.AutoModelForSpeechSeq2Seq
    elif config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    elif config.model_type in ("mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
        kind = transformers.AutoModelForImageTextToText
    elif "_vl_" in config.model_type:
        kind = transformers.AutoModel
    torch.manual_seed(0)
    return kind.from_config(config).eval(), json.loads(config.to_json_string())


def allocated(model):
    """For each layer of self- and of cross-attention that caches: heads, sizes, positions."""
    import torch

    tokens = torch.arange(LENGTH)[None] + 3
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": tokens[:, :INPUTS], "decoder_input_ids": tokens}
    if model.config.model_type == "whisper":
        inputs["input_features"] = torch.zeros(1, model.config.num_mel_bins, 2 * INPUTS)
        del inputs["input_ids"]
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values

    def rows(layers):
        keys_and_values = [(layer.keys, layer.values) for layer in layers if has_keys(layer)]
        return [(k.shape[1], k.shape[3], v.shape[3], k.shape[2]) for k, v in keys_and_values]

    if hasattr(cache, "cross_attention_cache"):
        return rows(cache.self_attention_cache.layers), rows(cache.cross_attention_cache.layers)
    return rows(cache.layers), []


def has_keys(layer):
    return getattr(layer, "keys", None) is not None and layer.keys.numel() > 0


def tabulated(decoder):
    """The same rows from the table.

    A window counts the token that is decoded. Transformers drops it from the cache between two
    steps, so its cache has a position less once the window is full.
    """

    def rows(layers, length):
        return [
            (
                layer.kv_heads,
                layer.key_dim,
                layer.value_dim,
                layer.window - 1 if 0 < layer.window <= length else length,
            )
            for layer in layers
        ]

    inputs = decoder.encoder_length or INPUTS
    return rows(decoder.self_attention, LENGTH), rows(decoder.cross_attention, inputs)


# Decoders that Transformers builds only as a part of a larger model; tests below build that. A
# t5_gqa has a class of ours, which tests/interop/test_modeling_t5_gqa.py builds.
PARTS = ("t5_gemma_module", "mllama_text_model", "t5_gqa")


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in PARTS])
def test_every_type_caches_what_transformers_does(model_type):
    config = small_config(model_type)
    model, written = build(config)
    expected = allocated(model)
    assert tabulated(to_decoder(config)) == expected
    assert tabulated(to_decoder(written)) == expected


@pytest.mark.parametrize(("model_type", "more"), VARIANTS)
def test_variants_of_a_type(model_type, more):
    config = small_config(model_type, **more)
    model, written = build(config)
    expected = allocated(model)
    assert tabulated(to_decoder(config)) == expected
    assert tabulated(to_decoder(written)) == expected


def test_falcons_newer_models_count_the_heads_before_they_are_repeated():
    """Transformers repeats their KV heads before it caches them; the note of the table says so."""
    config = small_config("falcon", new_decoder_architecture=True, num_kv_heads=2)
    rows, _ = allocated(build(config)[0])
    decoder = to_decoder(config)
    assert [(HEADS, *row[1:]) for row in tabulated(decoder)[0]] == rows
    assert decoder.kv_heads == 2
    assert decoder.note.startswith("Transformers repeats the KV heads")


def test_t5gemma_has_windows_and_cross_attention():
    config = {
        "model_type": "t5gemma",
        "vocab_size": 64,
        "encoder": small_config("t5_gemma_module", num_attention_heads=2),
        "decoder": small_config("t5_gemma_module", cross_attention_hidden_size=WIDTH),
    }
    model, written = build(config)
    expected = allocated(model)
    assert len(expected[1]) == LAYERS
    assert tabulated(to_decoder(written)) == expected


@pytest.mark.parametrize("layers", [None, [1, 4], []])
def test_llama_with_vision_keeps_the_image_in_the_layers_that_attend_to_it(layers):
    import torch

    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "max_num_tiles": 2}
    vision |= {"attention_heads": 2, "intermediate_size": 8, "image_size": 28, "patch_size": 7}
    vision |= {"intermediate_layers_indices": [0], "vision_output_dim": 32}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    text = small_config("mllama_text_model", cross_attention_layers=layers)
    model, written = build({"model_type": "mllama", "text_config": text, "vision_config": vision})

    tokens = torch.arange(LENGTH)[None] + 3
    tiles = torch.ones(1, 1, 2, dtype=torch.long)
    with torch.no_grad():
        cache = model(
            input_ids=tokens,
            pixel_values=torch.zeros(1, 1, 2, 3, 28, 28),
            aspect_ratio_ids=torch.ones(1, 1, dtype=torch.long),
            aspect_ratio_mask=tiles,
            cross_attention_mask=torch.ones(1, LENGTH, 1, 2, dtype=torch.long),
            use_cache=True,
        ).past_key_values
    crossed = [3] if layers is None else layers
    rows = [(x.keys.shape[1], x.keys.shape[3], x.values.shape[3], x.keys.shape[2])
            for x in cache.layers]  # fmt: skip
    expected = (
        [row for i, row in enumerate(rows) if i not in crossed],
        [row for i, row in enumerate(rows) if i in crossed],
    )
    assert tabulated(to_decoder(written)) == expected


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_the_decoder_of_a_model_of_images_is_read_from_whole_files(model_type):
    """Nested, as Transformers writes it, and flat, as older files of two types are."""
    text = small_config(f"{model_type}_text")
    del text["model_type"]
    expected = tabulated(to_decoder(small_config(f"{model_type}_text")))
    nested = {"model_type": model_type, "num_hidden_layers": 3, "vision_config": {"depth": 2}}
    assert tabulated(to_decoder(nested | {"text_config": text})) == expected
    if model_type in FLAT:
        import transformers

        flat = {"model_type": model_type, "vision_config": {"depth": 2}} | text
        config = transformers.AutoConfig.for_model(**flat)
        assert tabulated(to_decoder(flat)) == expected
        assert tabulated(to_decoder(json.loads(config.to_json_string()))) == expected


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "t5_gqa"])
def test_what_a_file_leaves_out_is_as_in_the_class(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    ours = {k: v for k, v in MODEL_TYPES[model_type].defaults.items() if k in fields}
    assert ours == {key: fields[key] for key in ours}
    assert len(ours) >= 3


@pytest.mark.parametrize("model_type", NESTED)
def test_the_nested_type_is_that_of_the_class(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name, default = NESTED[model_type]
    assert getattr(CONFIG_MAPPING[model_type](), name).model_type == default
