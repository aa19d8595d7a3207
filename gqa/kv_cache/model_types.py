"""The model types whose KV cache is known, with the fields that decide about it.

The names are those of `model_type` in Transformers. Each type has a reader (`readers.py`) and the
defaults of its class, which count for a field that config.json leaves out. The tests build a small
model of every type in Transformers and compare the cache that it allocates with this table.
"""

from typing import Any, NamedTuple

from gqa.kv_cache import cross_readers, readers
from gqa.kv_cache.class_defaults import (
    ENCODER,
    GROUPED,
    LATENT,
    LFM2,
    LINEAR,
    LISTED,
    MAMBA,
    SWITCHED,
    bart_sizes,
    gpt2_sizes,
    multi_head_sizes,
    sizes,
    t5_sizes,
    window,
)
from gqa.kv_cache.fields import EMPTY_LAYERS, STATE_LAYERS
from gqa.kv_cache.readers import CHUNKED, FULL, STATE, Reader, causal, every, listed_or


class ModelType(NamedTuple):
    """A model type that is understood.

    Attributes:
        read: the function from the fields of a config.json to a `Decoder`.
        defaults: the fields that it reads, with the defaults of the type's class.
        harmless: fields of this type that look as if they decided about the cache and do not.
    """

    read: Reader
    defaults: dict[str, Any]
    harmless: tuple[str, ...] = ()


_PLAIN = causal()
# These classes have no field for the size of a head, and no choice of KV heads.
_MULTI_HEAD = causal(head_dim="width")

# The decoders of Qwen2-VL and Qwen2.5-VL.
_QWEN2_VL = ModelType(
    causal(listed_or(readers.after_max_window_layers), head_dim="width"),
    sizes(80, 64, 8, 8192) | window(4096) | SWITCHED | {"max_window_layers": 80} | LISTED,
)

# The numbers of `sizes` are layers, query heads, KV heads (None: as many as query heads), width,
# and the size of a head (None, or left out: width divided by query heads).
MODEL_TYPES = {
    # Every layer keeps every position.
    "apertus": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "arcee": ModelType(_PLAIN, sizes(32, 32, None, 2560)),
    "aria_text": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "bitnet": ModelType(_PLAIN, sizes(30, 20, 5, 2560)),
    "cohere": ModelType(_PLAIN, sizes(40, 64, None, 8192)),
    "diffllama": ModelType(_PLAIN, sizes(16, 32, None, 2048)),
    "ernie4_5": ModelType(_PLAIN, sizes(18, 16, 2, 1024, 128)),
    "ernie4_5_moe": ModelType(_PLAIN, sizes(28, 20, 4, 2560)),
    "flex_olmo": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "gemma": ModelType(_PLAIN, sizes(28, 16, 16, 3072, 256)),
    "glm": ModelType(_PLAIN, sizes(40, 32, 2, 4096, 128)),
    "glm4": ModelType(_PLAIN, sizes(40, 32, 2, 4096, 128)),
    "glm4_moe": ModelType(_PLAIN, sizes(46, 96, 8, 4096)),
    "granite": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "granitemoe": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "granitemoeshared": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "helium": ModelType(_PLAIN, sizes(24, 20, 20, 2560, 128)),
    "hunyuan_v1_dense": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "hunyuan_v1_moe": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "hy_v3": ModelType(_PLAIN, sizes(80, 64, 8, 4096, 128)),
    "internlm3": ModelType(_PLAIN, sizes(48, 32, 2, 4096, 128)),
    "iquestcoder": ModelType(_PLAIN, sizes(80, 40, 8, 5120, 128)),
    "jais2": ModelType(_PLAIN, sizes(32, 26, None, 3328)),
    "llama": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "minimax_m2": ModelType(_PLAIN, sizes(62, 48, 8, 3072, 128)),
    "nanochat": ModelType(_PLAIN, sizes(12, 6, None, 768)),
    "nemotron": ModelType(_PLAIN, sizes(32, 48, None, 6144)),
    "olmo": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "olmo2": ModelType(_PLAIN, sizes(32, 32, None, 4096)),
    "olmoe": ModelType(_PLAIN, sizes(16, 16, None, 2048)),
    "phi": ModelType(_PLAIN, sizes(24, 32, None, 2048)),
    "qwen3_vl_moe_text": ModelType(_PLAIN, sizes(24, 16, 16, 2048)),
    "qwen3_vl_text": ModelType(_PLAIN, sizes(32, 32, 32, 4096, 128)),
    "seed_oss": ModelType(_PLAIN, sizes(64, 80, 8, 4096, 128)),
    "solar_open": ModelType(_PLAIN, sizes(48, 64, 8, 4096, 128)),
    "stablelm": ModelType(_PLAIN, sizes(32, 32, 32, 2560)),
    # The same with other names, or with no choice of KV heads.
    "biogpt": ModelType(_MULTI_HEAD, multi_head_sizes(24, 16, 1024)),
    "bloom": ModelType(
        _MULTI_HEAD, {"n_layer": 2, "n_head": 8, "hidden_size": 64}, ("offset_alibi",)
    ),
    "codegen": ModelType(_MULTI_HEAD, gpt2_sizes(28, 16, 4096)),
    "dbrx": ModelType(
        readers.dbrx,
        {"n_layers": 24, "n_heads": 16, "d_model": 2048, "attn_config": None},
        ("num_key_value_heads",),
    ),
    "falcon": ModelType(
        readers.falcon,
        {
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "num_kv_heads": None,
            "multi_query": True,
            "new_decoder_architecture": False,
            "hidden_size": 4544,
        },
        ("parallel_attn", "num_ln_in_parallel_attn"),
    ),
    "gpt2": ModelType(_MULTI_HEAD, gpt2_sizes(12, 12, 768)),
    "gpt_bigcode": ModelType(
        readers.multi_query,
        gpt2_sizes(12, 12, 768) | {"multi_query": True},
        ("num_key_value_heads",),
    ),
    "gpt_neo": ModelType(
        _MULTI_HEAD,
        {"num_layers": 24, "num_heads": 16, "hidden_size": 2048},
        ("window_size", "attention_types", "attention_layers"),
    ),
    "gpt_neox": ModelType(_MULTI_HEAD, multi_head_sizes(44, 64, 6144)),
    "gpt_neox_japanese": ModelType(_MULTI_HEAD, multi_head_sizes(32, 32, 2560)),
    "gptj": ModelType(_MULTI_HEAD, gpt2_sizes(28, 16, 4096)),
    "jetmoe": ModelType(
        readers.jetmoe,
        {
            "num_hidden_layers": 12,
            "num_key_value_heads": 16,
            "kv_channels": 128,
            "num_experts_per_tok": 2,
        },
        ("num_attention_heads",),
    ),
    "mpt": ModelType(
        readers.mpt, {"n_layers": 24, "n_heads": 16, "d_model": 2048, "attn_config": None}
    ),
    "opt": ModelType(_MULTI_HEAD, multi_head_sizes(12, 12, 768)),
    "persimmon": ModelType(_MULTI_HEAD, multi_head_sizes(36, 64, 4096)),
    "xglm": ModelType(_MULTI_HEAD, {"num_layers": 24, "attention_heads": 16, "d_model": 1024}),
    # A window in every layer, if there is one.
    "ministral3": ModelType(
        causal(readers.all_sliding), sizes(34, 32, 8, 4096, 128) | window(None)
    ),
    "mistral": ModelType(causal(readers.all_sliding), sizes(32, 32, 8, 4096) | window(4096)),
    "mixtral": ModelType(causal(readers.all_sliding), sizes(32, 32, 8, 4096) | window(None)),
    "phi3": ModelType(
        causal(readers.all_sliding), sizes(32, 32, None, 3072) | window(None), ("full_attn_mod",)
    ),
    "phimoe": ModelType(causal(readers.all_sliding), sizes(32, 32, 8, 4096) | window(None)),
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen3_moe": ModelType(
        causal(readers.all_sliding),
        sizes(24, 32, 4, 2048) | window(4096, use_sliding_window=False),
        ("max_window_layers",),
    ),
    "starcoder2": ModelType(causal(readers.all_sliding), sizes(30, 24, 2, 3072) | window(None)),
    # A window in some layers.
    "afmoe": ModelType(
        causal(every(4, name="global_attn_every_n_layers")),
        sizes(32, 16, None, 2048, 128) | window(1024, global_attn_every_n_layers=4) | LISTED,
    ),
    "cohere2": ModelType(
        causal(every(4, name="sliding_window_pattern"), head_dim="width"),
        sizes(40, 64, None, 8192) | window(4096, sliding_window_pattern=4) | LISTED,
        (
            *("layer_switch", "order_of_interleaved_layers", "use_embedding_sharing"),
            "use_parallel_block",
        ),
    ),
    "cwm": ModelType(
        causal(every(4, first=True)), sizes(64, 48, 8, 6144, 128) | window(8192) | LISTED
    ),
    "dots1": ModelType(
        causal(listed_or(readers.after_max_window_layers)),
        sizes(62, 32, 32, 4608) | window(4096, max_window_layers=62) | LISTED,
    ),
    "exaone4": ModelType(
        causal(listed_or(readers.exaone4)),
        sizes(32, 32, 32, 4096) | window(4096, sliding_window_pattern=4) | LISTED,
    ),
    "gemma2": ModelType(
        causal(every(2)),
        sizes(26, 8, 4, 2304, 256) | window(4096) | LISTED,
        ("sliding_window_size",),
    ),
    "gemma3_text": ModelType(
        causal(every(6, name="sliding_window_pattern")),
        sizes(26, 8, 4, 2304, 256) | window(4096, sliding_window_pattern=6) | LISTED,
        ("_sliding_window_pattern",),
    ),
    "gemma3n_text": ModelType(
        causal(every(5), shared="num_kv_shared_layers"),
        sizes(35, 8, 2, 2048, 256) | window(512, num_kv_shared_layers=15) | LISTED,
    ),
    "gemma4_text": ModelType(
        readers.gemma4,
        sizes(30, 8, 4, 2304, 256)
        | window(
            512,
            num_kv_shared_layers=0,
            global_head_dim=512,
            num_global_key_value_heads=None,
            attention_k_eq_v=False,
            per_layer_config=None,
        )
        | LISTED,
    ),
    "gpt_oss": ModelType(causal(every(2)), sizes(36, 64, 8, 2880, 64) | window(128) | LISTED),
    "granite_swa": ModelType(
        causal(every(4, first=True)), sizes(24, 20, 4, 2560) | window(128) | LISTED
    ),
    "llama4_text": ModelType(
        causal(listed_or(readers.by_rope(CHUNKED, FULL))),
        sizes(48, 40, 8, 5120, 128)
        | {"attention_chunk_size": 8192, "no_rope_layers": None, "no_rope_layer_interval": 4}
        | LISTED,
    ),
    "ministral": ModelType(
        causal(listed_or(readers.all_sliding)), sizes(32, 32, 8, 4096) | window(4096) | LISTED
    ),
    "olmo3": ModelType(causal(every(4)), sizes(32, 32, None, 4096) | window(4096) | LISTED),
    "qwen2": ModelType(
        causal(listed_or(readers.after_max_window_layers)),
        sizes(32, 32, 32, 4096) | window(4096) | SWITCHED | LISTED,
    ),
    "qwen2_moe": ModelType(
        causal(listed_or(readers.even_below_max_window_layers)),
        sizes(24, 16, 16, 2048) | window(4096) | SWITCHED | LISTED,
    ),
    "qwen3": ModelType(
        causal(listed_or(readers.after_max_window_layers)),
        sizes(32, 32, 32, 4096, 128) | window(4096) | SWITCHED | LISTED,
    ),
    "smollm3": ModelType(
        causal(listed_or(readers.smollm3)),
        sizes(36, 16, 4, 2048)
        | window(None, use_sliding_window=False, no_rope_layers=None, no_rope_layer_interval=4)
        | LISTED,
        ("max_window_layers",),
    ),
    "vaultgemma": ModelType(causal(every(2)), sizes(26, 8, 4, 2304, 256) | window(4096) | LISTED),
    # Attention in some layers, a state of a fixed size in others or beside it.
    "bamba": ModelType(
        causal(readers.attention_at("attn_layer_indices"), others=STATE_LAYERS),
        sizes(32, 32, 8, 4096) | {"attn_layer_indices": None},
        (*MAMBA, "attn_rotary_emb"),
    ),
    "falcon_h1": ModelType(readers.falcon_h1, sizes(32, 32, 8, 4096), MAMBA),
    "granitemoehybrid": ModelType(
        causal(readers.listed, others=STATE_LAYERS),
        sizes(32, 32, None, 4096) | {"layers_block_type": None} | LISTED,
        MAMBA,
    ),
    "jamba": ModelType(
        causal(readers.jamba, others=STATE_LAYERS),
        sizes(32, 32, 8, 4096) | {"attn_layer_period": 8, "attn_layer_offset": 4},
        MAMBA,
    ),
    "lfm2": ModelType(
        causal(listed_or(readers.attention_at("full_attn_idxs")), others=STATE_LAYERS),
        sizes(32, 32, 8, 2560) | {"full_attn_idxs": None} | LISTED,
        LFM2,
    ),
    "lfm2_moe": ModelType(
        causal(readers.listed, others=STATE_LAYERS), sizes(32, 32, 8, 2048) | LISTED, LFM2
    ),
    "nemotron_h": ModelType(
        causal(readers.nemotron_h, others=(*STATE_LAYERS, *EMPTY_LAYERS)),
        {
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_size": 4096,
            "head_dim": 128,
            "num_hidden_layers": None,
            "layers_block_type": None,
            "layer_types": None,
            "hybrid_override_pattern": None,
        },
        MAMBA,
    ),
    "olmo_hybrid": ModelType(
        causal(readers.olmo_hybrid, others=STATE_LAYERS), sizes(32, 30, None, 3840) | LISTED, LINEAR
    ),
    "qwen3_5_moe_text": ModelType(
        causal(every(4, STATE, "full_attention_interval"), others=STATE_LAYERS),
        sizes(40, 16, 2, 2048, 256) | {"full_attention_interval": 4} | LISTED,
        LINEAR,
    ),
    "qwen3_5_text": ModelType(
        causal(every(4, STATE, "full_attention_interval"), others=STATE_LAYERS),
        sizes(32, 16, 4, 4096, 256) | {"full_attention_interval": 4} | LISTED,
        LINEAR,
    ),
    "qwen3_next": ModelType(
        causal(every(4, STATE, "full_attention_interval"), others=STATE_LAYERS),
        sizes(48, 16, 2, 2048, 256) | {"full_attention_interval": 4} | LISTED,
        LINEAR,
    ),
    # Latent attention.
    "deepseek_v2": ModelType(readers.latent(), sizes(32, 32, None, 4096) | LATENT),
    "deepseek_v3": ModelType(readers.latent(), sizes(61, 128, 128, 7168) | LATENT),
    "glm4_moe_lite": ModelType(
        readers.latent(),
        sizes(47, 20, 20, 2048) | LATENT | {"qk_nope_head_dim": 192, "v_head_dim": 256},
    ),
    "longcat_flash": ModelType(
        readers.latent(2),
        {
            "num_layers": 28,
            "num_attention_heads": 64,
            "num_key_value_heads": None,
            "hidden_size": 6144,
            "head_dim": 64,
        }
        | LATENT,
    ),
    "minicpm3": ModelType(
        readers.latent(),
        sizes(62, 40, 40, 2560)
        | {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": None},
    ),
    "youtu": ModelType(readers.latent(), sizes(32, 16, 16, 2048) | LATENT),
    # Encoder-decoders.
    "bart": ModelType(cross_readers.encoder_decoder, bart_sizes(12, 16, 1024), ENCODER),
    "bigbird_pegasus": ModelType(
        cross_readers.encoder_decoder,
        bart_sizes(16, 16, 1024),
        (*ENCODER, "attention_type", "block_size", "num_random_blocks"),
    ),
    "blenderbot": ModelType(cross_readers.encoder_decoder, bart_sizes(24, 32, 2560), ENCODER),
    "blenderbot-small": ModelType(cross_readers.encoder_decoder, bart_sizes(8, 16, 512), ENCODER),
    "longt5": ModelType(
        cross_readers.t5,
        t5_sizes(6, 8),
        ("local_radius", "global_block_size", "encoder_attention_type"),
    ),
    "m2m_100": ModelType(cross_readers.encoder_decoder, bart_sizes(12, 16, 1024), ENCODER),
    "marian": ModelType(cross_readers.encoder_decoder, bart_sizes(12, 16, 1024), ENCODER),
    "mbart": ModelType(cross_readers.encoder_decoder, bart_sizes(12, 16, 1024), ENCODER),
    "mllama_text_model": ModelType(
        cross_readers.mllama,
        sizes(40, 32, 8, 4096) | {"cross_attention_layers": None},
        ("is_encoder_decoder",),
    ),
    "mt5": ModelType(cross_readers.t5, t5_sizes(8, 6) | GROUPED),
    "mvp": ModelType(cross_readers.encoder_decoder, bart_sizes(12, 16, 1024), ENCODER),
    "nllb-moe": ModelType(cross_readers.encoder_decoder, bart_sizes(12, 16, 1024), ENCODER),
    "pegasus": ModelType(cross_readers.encoder_decoder, bart_sizes(12, 16, 1024), ENCODER),
    "pegasus_x": ModelType(
        cross_readers.encoder_decoder,
        bart_sizes(16, 16, 1024),
        (*ENCODER, "num_global_tokens", "block_size", "stagger_local_blocks"),
    ),
    "plbart": ModelType(cross_readers.encoder_decoder, bart_sizes(6, 12, 768), ENCODER),
    "t5": ModelType(cross_readers.t5, t5_sizes(6, 8) | GROUPED),
    # A grouped network that `python -m gqa export` has written.
    "t5_gqa": ModelType(cross_readers.t5, t5_sizes(6, 8) | GROUPED),
    "t5_gemma_module": ModelType(
        cross_readers.t5gemma_decoder,
        sizes(26, 8, 4, 2304, 256) | window(4096) | LISTED,
        ("cross_attention_hidden_size",),
    ),
    "umt5": ModelType(cross_readers.t5, t5_sizes(8, 6), ("scalable_attention",)),
    "whisper": ModelType(
        cross_readers.encoder_decoder,
        bart_sizes(4, 6, 384) | {"max_source_positions": 1500},
        ENCODER,
    ),
}
