"""Translate config.json of a Hugging Face T5 into our config, and back.

Only the meaning of keys is here; reading.py reads the file, and names.py has the tensors.
"""

from typing import Any

from gqa.interop.huggingface import activations
from gqa.model.config import Config
from gqa.model.special_tokens import T5_TOKENS
from gqa.runtime.checks import MAX_INT32, check_whole_number
from gqa.runtime.errors import CheckpointError

# The type of grouped networks, with a class of our own: modeling_t5_gqa.py. Transformers refuses it
# without that file. As a "t5" it would be loaded with multi-head attention.
GROUPED = "t5_gqa"
MODELING_FILE = "modeling_t5_gqa.py"

# The model types that are taken, and Transformers' default of feed_forward_proj for each.
DEFAULTS = {"t5": "relu", "mt5": "gated-gelu", "umt5": "gated-gelu", GROUPED: "relu"}

# Constants of our network. A file with another value is refused.
FIXED = {"layer_norm_epsilon": 1e-6}

# Our names of sizes, and Transformers' names.
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "d_ff": "d_ff",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_layers",
}

# Numbers of KV heads, keys of ours that Transformers' T5 does not know: a number, or in the
# decoder a list with one for each layer.
KV_HEADS = {
    "num_kv_heads_self_attention": "num_key_value_heads",
    "num_kv_heads_cross_attention": "cross_num_key_value_heads",
    "num_kv_heads_encoder": "encoder_num_key_value_heads",
}


# A key of ours for grouped networks, whose model type does not say that they come from umT5.
PER_LAYER = "position_bias_per_layer"

# Our names of special tokens' ids, which are Transformers' too, and their values in T5.
TOKENS = T5_TOKENS.fields


def to_config(hf_config: dict, generation: dict | None = None) -> Config:
    """Return our config for a config.json; a key that is missing has Transformers' default.

    Args:
        generation: generation_config.json, if there is one.

    Raises:
        CheckpointError: naming the key whose value our network cannot have.
    """
    generation = {} if generation is None else generation
    if not isinstance(hf_config, dict) or not isinstance(generation, dict):
        raise CheckpointError("not a JSON object with a model's settings")

    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise CheckpointError(f"model_type={kind!r} is not supported; use {', '.join(DEFAULTS)}")

    for key, ours in FIXED.items():
        if hf_config.get(key, ours) not in (ours, None):
            raise CheckpointError(f"{key}={hf_config[key]!r} is not supported; use {ours}")

    # Any, because a type checker does not match the keys of ** with the types of the fields.
    sizes: dict[str, Any] = {ours: _size(hf_config, key) for ours, key in SIZES.items()}
    if hf_config.get("num_decoder_layers") is not None:
        sizes["num_decoder_layers"] = _size(hf_config, "num_decoder_layers")

    return Config(
        **sizes,
        **_kv_heads(hf_config, sizes["num_heads"]),
        **_token_ids(hf_config, generation),
        activation=activations.activation(hf_config, DEFAULTS[kind]),
        tied_logits=_tied_logits(hf_config, kind),
        position_bias_per_layer=kind == "umt5" or _flag(hf_config, PER_LAYER, False),
        num_buckets=_size(hf_config, "relative_attention_num_buckets", 32),
        max_distance=_size(hf_config, "relative_attention_max_distance", 128),
    )


def _tied_logits(hf_config: dict, kind: str) -> bool:
    """Return whether the embedding, scaled by 1 / sqrt(d_model), gives the logits."""
    tied = _flag(hf_config, "tie_word_embeddings", True)
    if kind in ("t5", GROUPED):
        # Transformers 5 writes tie_word_embeddings=true for every T5 and this key for the scale.
        return _flag(hf_config, "scale_decoder_outputs", tied)
    # mT5 ties its logits without scaling them. Our tied logits are always scaled, so for mT5 our
    # network has a logit kernel of its own, which repeats the embedding.
    return tied and kind == "umt5"


def _token_ids(hf_config: dict, generation: dict) -> dict[str, Any]:
    """Return the ids of special tokens; generation_config.json wins, as in Transformers.

    A decoder without a start token starts with `bos_token_id`, if there is one.
    """
    found: dict[str, Any] = {}
    for key, default in TOKENS.items():
        keys = [key, "bos_token_id"] if key == "decoder_start_token_id" else [key]
        values = [file.get(k) for k in keys for file in (generation, hf_config)]
        value = next((x for x in values if x is not None), default)

        # Transformers lets several tokens end a text. Training has one, which ends every target.
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
        if isinstance(value, list):
            raise CheckpointError(f"{key}={value!r} is not supported; use one id")
        found[key] = check_whole_number(key, value, 0, MAX_INT32)
    return found


def _kv_heads(hf_config: dict, heads: int) -> dict[str, Any]:
    return {ours: _size_or_sizes(hf_config, theirs, heads) for ours, theirs in KV_HEADS.items()}


def _size_or_sizes(hf_config: dict, key: str, default: int) -> int | tuple[int, ...]:
    """Return one number for all layers, or one for each layer if the file has a list."""
    value = hf_config.get(key)
    if isinstance(value, list):
        return tuple(_size({key: each}, key) for each in value)
    return _size(hf_config, key, default)


def _size(hf_config: dict, key: str, default: int | None = None) -> int:
    value = hf_config.get(key, default)
    if value is None:
        raise CheckpointError(f"config.json has no {key}")
    return check_whole_number(key, value)


def _flag(hf_config: dict, key: str, default: bool) -> bool:
    value = hf_config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{key}={value!r}; use true or false")
    return value


def from_config(config: Config) -> dict:
    """Return the config.json of a network; `to_config` is the inverse."""
    kind = "UMT5" if config.position_bias_per_layer else "T5"
    hf_config = FIXED | {
        "model_type": kind.lower(),
        "architectures": [f"{kind}ForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": activations.feed_forward_proj(config.activation),
        "tie_word_embeddings": config.tied_logits,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout_rate,
    }
    hf_config |= {key: getattr(config, key) for key in TOKENS}

    # A multi-head network is an ordinary T5, so its file has no key that Transformers' T5 lacks.
    heads = {theirs: getattr(config, ours) for ours, theirs in KV_HEADS.items()}
    if set(heads.values()) == {config.num_heads}:
        return hf_config

    classes = {
        "AutoConfig": "T5GQAConfig",
        "AutoModelForSeq2SeqLM": "T5GQAForConditionalGeneration",
    }
    module = MODELING_FILE.removesuffix(".py")
    return (
        hf_config
        | heads
        | {
            PER_LAYER: config.position_bias_per_layer,
            "model_type": GROUPED,
            "architectures": [classes["AutoModelForSeq2SeqLM"]],
            "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
        }
    )
