"""What decides the size of a decoder's cache, for well-known models and any config.json.

`command.py` makes a table of it.
"""

from pathlib import Path
from typing import NamedTuple

from gqa.interop import safetensors_files
from gqa.model.config import check_kv_heads
from gqa.runtime import regular_files
from gqa.runtime.checks import check_whole_number
from gqa.runtime.errors import UserError


class Decoder(NamedTuple):
    """The sizes that decide how large a decoder's cache is.

    cross: whether the decoder also caches keys and values of an encoder's output.
    window: the most positions of its own that it keeps; 0: all.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    cross: bool = False
    window: int = 0


PRESETS = {
    "T5-small": Decoder(8, 6, 6, 64, True),  # 1.1
    "T5-base": Decoder(12, 12, 12, 64, True),
    "T5-large": Decoder(24, 16, 16, 64, True),
    "T5-XL": Decoder(24, 32, 32, 64, True),
    "T5-XXL": Decoder(24, 64, 64, 64, True),
    "Llama-2-7B": Decoder(32, 32, 32, 128),
    "Llama-2-13B": Decoder(40, 40, 40, 128),
    "Llama-2-34B": Decoder(48, 64, 8, 128),
    "Llama-2-70B": Decoder(80, 64, 8, 128),
    "Llama-3-8B": Decoder(32, 32, 8, 128),
    "Llama-3-70B": Decoder(80, 64, 8, 128),
    "Llama-3-405B": Decoder(126, 128, 8, 128),
    "Mistral-7B": Decoder(32, 32, 8, 128),
}

# The names of each size in config.json, of different models; the first that is there counts.
LAYERS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers", "n_layer")
HEADS = ("decoder_attention_heads", "num_attention_heads", "num_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
HEAD_DIM = ("head_dim", "d_kv")
WIDTH = ("hidden_size", "d_model", "n_embd")
# Fields of models whose cache is not one of keys and values for each head and position: latent
# attention and state-space models.
OTHER_CACHES = ("kv_lora_rank", "state_size")


def find(name: str) -> Decoder:
    """Return the preset of a name, in any case, or the decoder of a config.json or its folder.

    Raises:
        UserError: naming the presets if there is no such file; else the field of config.json that
            is missing, wrong, or of a model with another kind of cache.
    """
    for preset, decoder in PRESETS.items():
        if preset.lower() == name.lower():
            return decoder
    path = Path(name)
    if not path.exists():
        raise UserError(f"{name!r} is no config.json; use one, or one of {', '.join(PRESETS)}")
    path = path / "config.json" if path.is_dir() else path
    config = regular_files.read_json(path)
    with safetensors_files.naming(path):
        nested = config.get("text_config")
        return _decoder(config | nested if isinstance(nested, dict) else config)


def _decoder(config: dict) -> Decoder:
    """Read the sizes from the fields of a config.json."""
    for key in OTHER_CACHES:
        if config.get(key):
            raise UserError(f"{key}={config[key]!r}: this model caches no keys and values by head")
    heads = _size(config, HEADS)
    head_dim = _size(config, HEAD_DIM, default=0) or _size(config, WIDTH) // heads

    # The first Falcon models and GPT-BigCode say "multi_query" instead of a number of KV heads.
    multi_query = config.get("multi_query") is True and not config.get("new_decoder_architecture")
    kv_heads = _size(config, KV_HEADS, default=heads)
    kv_heads = 1 if multi_query else kv_heads
    check_kv_heads("num_key_value_heads", kv_heads, heads)

    # Transformers takes T5's configs for encoder-decoders even if they do not say so.
    cross = bool(config.get("is_encoder_decoder", "t5" in str(config.get("model_type"))))
    return Decoder(_size(config, LAYERS), heads, kv_heads, head_dim, cross, _window(config))


def _window(config: dict) -> int:
    """Return the sliding window of a decoder; 0 if there is none."""
    if not config.get("use_sliding_window", True):
        return 0
    window = _size(config, ("sliding_window",), default=0)
    kinds = config.get("layer_types") or ["sliding_attention"]
    if window and set(kinds) != {"sliding_attention"}:
        raise UserError(
            "layer_types: only some layers have the sliding_window, so that one number "
            "of positions does not describe the cache"
        )
    return window


def _size(config: dict, keys: tuple[str, ...], default: int | None = None) -> int:
    """Return the first of `keys` that the config has, or `default`."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        return check_whole_number(key, value)
    if default is None:
        raise UserError(f"none of {', '.join(keys)} is there; add the one of this model")
    return default
