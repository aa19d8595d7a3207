"""Read the sizes of a KV cache from a config.json, or name the field that is not understood.

A wrong size is worse than no size. Therefore only the types of `model_types.py` are read, and a
field whose name speaks of layers, windows, heads or sharing is refused unless it is known for the
type, or harmless in every type.
"""

import re
from pathlib import Path
from typing import Any

from gqa.interop import safetensors_files
from gqa.kv_cache.decoder import Decoder
from gqa.kv_cache.fields import Fields
from gqa.kv_cache.model_types import MODEL_TYPES
from gqa.kv_cache.nested_types import ENCODER_POSITIONS, FLAT, NESTED
from gqa.runtime import regular_files
from gqa.runtime.errors import ConfigError, UserError

# Words in the name of a field that may decide about the cache.
HINT = re.compile(
    r"layer|window|head|kv|key_value|cache|shar|reuse|attn|attention|mla|cla(?![a-z])|chunk|sliding"
    r"|swa|local|global|latent|lora_rank|state|ssm|mamba|rwkv|conv|recurrent|linear|hybrid|channels"
    r"|pattern|period|offset|block|multi_query|mqa|gqa|group|cross|encoder|skip|sparse|sink|compress|index"
    r"|^(text|llm|language|thinker|decoder|encoder)(_config)?$|interval|interleave|every|depth|memory|span|stride|d_k|d_v|full_"
    r"|(^|_)([qkv]|qk|query|key|value)s?_(dim|size|width|len)|dim_per|yoco|dilat|band_?width|look_?back"
    r"|recur|loop|repeat|iteration|ut_steps"
)
# Fields with such words that decide about something else in every type.
HARMLESS = re.compile(
    # Norms, dropout, biases, initial values, activations, constants.
    r"(.*_)?(layer_?)?norms?(_.*)?|.*layernorm.*|.*(dropout|drop|pdrop|bias|softcap(ping)?)(_prob)?"
    r"|.*_(init|std|eps|epsilon|coef|penalty|theta|base_freq|multipliers?)|.*initializer.*|.*_act"
    r"|(attn|attention)_(scale|value_scale|temperature_tuning|softmax_in_fp32)|.*activation"
    r"|scale_(attn|attention)_.*|reorder_and_upcast_attn|query_pre_attn_scalar|clip_qkv|_?rope_.*"
    r"|scale_depth|layerdrop|.*_layerdrop|linear_bias|pruned_heads|skip_bias_add(_qkv)?"
    # Tokens, vocabularies, positions, outputs, and the settings of generation.
    r"|.*_(token_ids?|token_index|logits|loss)|relative_attention_.*|share_.*_embeddings|tie_.*"
    r"|(en|de)coder_(start_.*|no_repeat_.*|max_position.*|ffn_dim)|output_.*|forced_.*|lm_head_.*"
    r"|.*vocab_size.*|use_cache|cache_implementation|_?attn_implementation.*"
    # Feed-forward networks and experts.
    r"|.*_?(shared_expert|shared_intermediate|experts|intermediate)(_.*)?|moe_.*|router_.*|n_group"
    r"|topk_.*|first_k_dense_replace|mlp_(only_layers|layer_types)|decoder_sparse_step"
    r"|num_dense_layers|interleave_moe_layer_step|(chunk_size_)?feed_forward.*|is_gated_act"
    r"|block_(multiple_of|ffn_dim.*|auto_adjust.*|ff_dim)|num_sparse_(en|de)coder_layers"
    r"|(en|de)coder_sparse_step|hidden_size_per_layer_input|activation_sparsity_pattern|.*_hash_.*"
    # What belongs to queries, or to layers that predict more tokens.
    r"|q_lora_rank|qk_head_dim|num_nextn_predict_layers"
    r"|transformers_version|quantization_config|is_encoder_decoder|add_cross_attention"
)


def read(path: Path) -> Decoder:
    """Return the decoder that a config.json describes.

    Raises:
        UserError: naming the field that is missing, wrong or not understood.
    """
    config = regular_files.read_json(path)
    with safetensors_files.naming(path):
        return to_decoder(config)


def to_decoder(config: dict[str, Any]) -> Decoder:
    """Return the decoder that a config describes; `config` is the object in config.json."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in NESTED:
        name, default = NESTED[model_type]
        nested = config.get(name)
        if nested is None and model_type in FLAT:
            return _of_type(default, config)
        if not isinstance(nested, dict):
            raise UserError(f"{name} is missing; use the whole config.json of {model_type}")

        # Only the decoder's own object counts. A size that it leaves out is the default of the
        # decoder's class, not the size of that name in the outer object.
        with safetensors_files.naming(name):
            decoder = _of_type(nested.get("model_type") or default, nested)
        positions = ENCODER_POSITIONS.get(model_type)
        return decoder._replace(encoder_length=positions(config)) if positions else decoder

    return _of_type(model_type, config)


def _of_type(model_type: Any, config: dict[str, Any]) -> Decoder:
    """Return the decoder that a config of this type describes."""
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(
            f"model_type={model_type!r} is none of which the KV cache is known; use one of "
            f"{', '.join((*MODEL_TYPES, *NESTED))}"
        )

    # A field that is null or false switches nothing on, so it needs no understanding.
    kind = MODEL_TYPES[model_type]
    fields = Fields(config, kind.defaults)
    known = {*kind.defaults, *kind.harmless, *fields.aliases}
    for name, value in config.items():
        if name in known or value is None or value is False:
            continue
        if HINT.search(name) and not HARMLESS.fullmatch(name):
            raise ConfigError(
                name,
                value,
                f"remove it if it does not change the cache of a {model_type}",
                "may decide about the cache and is not understood",
            )

    # A config can turn a decoder into one with cross-attention, or the other way round. The reader
    # of the type knows only one of the two.
    decoder = kind.read(fields)
    for name in ("is_encoder_decoder", "add_cross_attention"):
        crossed = bool(decoder.cross_attention) if name == "is_encoder_decoder" else False
        if name not in known and config.get(name) is not None and config[name] is not crossed:
            raise ConfigError(name, config[name], f"a {model_type} is known with {crossed} only")
    return decoder
