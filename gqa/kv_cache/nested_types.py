"""Model types whose config.json has an object for each of several networks, the decoder among them.

`model_types.py` has the types of the decoders themselves.
"""

from collections.abc import Callable
from typing import Any

from gqa.runtime.checks import check_whole_number
from gqa.runtime.errors import ConfigError

# Models whose decoder is in an object of its own: the name of the object, and the type that the
# decoder has where the object says none.
NESTED = {
    "aya_vision": ("text_config", "cohere2"),
    "cohere2_vision": ("text_config", "cohere2"),
    "gemma3": ("text_config", "gemma3_text"),
    "gemma3n": ("text_config", "gemma3n_text"),
    "gemma4": ("text_config", "gemma4_text"),
    "idefics3": ("text_config", "llama"),
    "internvl": ("text_config", "qwen2"),
    "llama4": ("text_config", "llama4_text"),
    "llava": ("text_config", "llama"),
    "llava_next": ("text_config", "llama"),
    "llava_onevision": ("text_config", "qwen2"),
    "mistral3": ("text_config", "mistral"),
    "mllama": ("text_config", "mllama_text_model"),
    "paligemma": ("text_config", "gemma"),
    "qwen2_5_vl": ("text_config", "qwen2_5_vl_text"),
    "qwen2_vl": ("text_config", "qwen2_vl_text"),
    "qwen3_5": ("text_config", "qwen3_5_text"),
    "qwen3_5_moe": ("text_config", "qwen3_5_moe_text"),
    "qwen3_vl": ("text_config", "qwen3_vl_text"),
    "qwen3_vl_moe": ("text_config", "qwen3_vl_moe_text"),
    "smolvlm": ("text_config", "llama"),
    "t5gemma": ("decoder", "t5_gemma_module"),
    "vipllava": ("text_config", "llama"),
}
# Of these, older files have the decoder's fields beside the objects of the other networks.
FLAT = ("qwen2_5_vl", "qwen2_vl")


def mllama_positions(config: dict[str, Any]) -> int:
    """Return the positions of Llama 3.2 Vision's encoder for one image in all of its tiles."""
    # The defaults are those of Transformers' class.
    vision = config.get("vision_config") or {}
    if not isinstance(vision, dict):
        raise ConfigError("vision_config", vision, "use an object")
    image, patch, tiles = (
        check_whole_number(name, vision.get(name, default))
        for name, default in (("image_size", 448), ("patch_size", 14), ("max_num_tiles", 4))
    )

    # A tile has a position for each patch, and one for the whole tile.
    return tiles * ((image // patch) ** 2 + 1)


# Types whose encoder has a fixed number of positions.
ENCODER_POSITIONS: dict[str, Callable[[dict[str, Any]], int]] = {"mllama": mllama_positions}
