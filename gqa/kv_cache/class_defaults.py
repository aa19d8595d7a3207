"""The fields that decide about a KV cache, by family, with the defaults of Transformers' classes.

`model_types.py` puts the fields of each type together. A dict here holds fields that decide about
the cache; a tuple names fields that look as if they decided about the cache and do not.
"""

from typing import Any


def sizes(
    layers: int, heads: int, kv_heads: int | None, width: int, head_dim: int | None = None
) -> dict[str, Any]:
    """Return the five sizes of most decoders by Transformers' names."""
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": width,
        "head_dim": head_dim,
    }


def multi_head_sizes(layers: int, heads: int, width: int) -> dict[str, Any]:
    """Return the sizes of a type that has no choice of KV heads and of their size."""
    return {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}


def gpt2_sizes(layers: int, heads: int, width: int) -> dict[str, Any]:
    """Return the sizes by GPT-2's names."""
    return {"n_layer": layers, "n_head": heads, "n_embd": width}


def bart_sizes(layers: int, heads: int, width: int) -> dict[str, Any]:
    """Return the decoder's sizes by BART's names."""
    return {"decoder_layers": layers, "decoder_attention_heads": heads, "d_model": width}


def t5_sizes(layers: int, heads: int, width: int = 512, decoder: int | None = None) -> dict:
    """Return the sizes by T5's names."""
    return {
        "num_layers": layers,
        "num_decoder_layers": decoder,
        "num_heads": heads,
        "d_kv": 64,
        "d_model": width,
    }


def window(size: int | None, **more: Any) -> dict[str, Any]:
    """Return the fields of a sliding window."""
    return {"sliding_window": size} | more


# The field that lists the kind of each layer.
LISTED = {"layer_types": None}
# Qwen's window: off unless switched on, and then only in the layers that `max_window_layers` says.
SWITCHED = {"use_sliding_window": False, "max_window_layers": 28}
# DeepSeek's multi-head latent attention.
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
# Numbers of KV heads that this project writes into config.json, and Transformers' T5 does not know.
GROUPED = dict.fromkeys(
    ("num_key_value_heads", "cross_num_key_value_heads", "encoder_num_key_value_heads")
)

# Fields that do not decide about the cache of a type that has them, whatever their names suggest.
# First the fields of encoders. In BART's config "num_hidden_layers" is the encoder's, too.
ENCODER = ("encoder_layers", "encoder_attention_heads", "num_hidden_layers", "num_attention_heads")
# The sizes of layers that keep a state.
MAMBA = (
    *("mamba_num_heads", "mamba_head_dim", "mamba_hidden_act", "mamba_ssm_cache_dtype"),
    *("ssm_state_size", "ssm_multipliers", "ssm_in_multiplier", "ssm_out_multiplier"),
    *("conv_kernel", "use_conv_bias", "n_groups", "chunk_size", "mtp_layers_block_type"),
    *("mamba_chunk_size", "mamba_d_conv", "mamba_d_head", "mamba_d_ssm", "mamba_d_state"),
    *("mamba_dt_rank", "mamba_expand", "mamba_n_groups", "mamba_n_heads", "mamba_conv_bias"),
    *("mamba_proj_bias", "mamba_rms_norm", "mamba_norm_before_gate", "mamba_use_mlp"),
    *("mamba_inner_layernorms", "use_mamba_kernels", "layers_block_type"),
    *("expert_layer_period", "expert_layer_offset", "mamba_dt_min", "mamba_dt_max"),
)
# Linear attention (Qwen3-Next, OLMo hybrid).
LINEAR = (
    *("linear_a_log_min", "linear_a_log_max", "linear_allow_neg_eigval", "linear_dt_init_floor"),
    *("linear_dt_min", "linear_dt_max", "linear_use_gate"),
    *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads"),
)
# Short convolutions and feed-forward networks of LFM2.
LFM2 = (
    *("block_dim", "block_ff_dim", "block_mlp_init_scale", "block_out_init_scale"),
    *("block_use_swiglu", "block_use_xavier_init", "block_multiple_of", "block_ffn_dim_multiplier"),
    *("block_auto_adjust_ff_dim", "conv_L_cache", "conv_bias", "conv_dim", "conv_dim_out"),
    *("conv_use_xavier_init",),
)
