"""The decoders of well-known models by name.

`config_json.py` reads the decoder of any other model; `command.py` makes the table.
"""

from pathlib import Path

from gqa.interop import hub
from gqa.kv_cache import config_json
from gqa.kv_cache.decoder import CachedLayer, Decoder
from gqa.runtime import checks
from gqa.runtime.errors import UserError


def _decoder(layers: int, heads: int, kv_heads: int, head_dim: int, cross: bool = False) -> Decoder:
    """Return a decoder whose layers are all alike; `cross`: with cross-attention as well."""
    attentions = (CachedLayer(kv_heads, head_dim, head_dim),) * layers
    return Decoder(layers, heads, attentions, attentions if cross else ())


PRESETS = {
    "T5-small": _decoder(8, 6, 6, 64, cross=True),  # 1.1
    "T5-base": _decoder(12, 12, 12, 64, cross=True),
    "T5-large": _decoder(24, 16, 16, 64, cross=True),
    "T5-XL": _decoder(24, 32, 32, 64, cross=True),
    "T5-XXL": _decoder(24, 64, 64, 64, cross=True),
    "Llama-2-7B": _decoder(32, 32, 32, 128),
    "Llama-2-13B": _decoder(40, 40, 40, 128),
    "Llama-2-34B": _decoder(48, 64, 8, 128),
    "Llama-2-70B": _decoder(80, 64, 8, 128),
    "Llama-3-8B": _decoder(32, 32, 8, 128),
    "Llama-3-70B": _decoder(80, 64, 8, 128),
    "Llama-3-405B": _decoder(126, 128, 8, 128),
    "Mistral-7B": _decoder(32, 32, 8, 128),
}


def find(name: str) -> Decoder:
    """Return the preset of a name, in any case, or the decoder of a config.json.

    Args:
        name: of a preset, of a config.json or its folder, or of a model on the Hub.

    Raises:
        UserError: naming the presets if there is no such file; else the field of config.json that
            is missing, wrong or not understood.
    """
    for preset, decoder in PRESETS.items():
        if preset.lower() == name.lower():
            return decoder

    # Not a preset, so the name is a path. `lstat` shows whether something is there at all; only
    # then do the errors of config.json make sense.
    path = Path(name)
    try:
        if path.is_dir() or hub.is_name(name):
            path = hub.local_folder(name, formats=(), also=()) / "config.json"
        path.lstat()
    except (OSError, ValueError) as error:
        checks.check_local_path("model", name)
        raise UserError(
            f"{name!r} is no config.json ({getattr(error, 'strerror', None) or error}); use the "
            f"path of one, or one of {', '.join(PRESETS)}"
        ) from error
    return config_json.read(path)
