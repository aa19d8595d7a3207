"""Check the sizes in config.json and the attention tensors of a decoder-only Hugging Face folder.

Everything is checked here before convert.py writes anything. side_files.py chooses the files that
are copied. The attention is that of Llama, which Mistral, Qwen2 and Phi share: q_proj, k_proj,
v_proj and o_proj (or dense) under self_attn, with weights [outputs, inputs] whose heads are
flattened. Neighbouring query heads share a KV head.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gqa.checkpoints import pieces
from gqa.interop.safetensors_files import FLOATS, Tensors
from gqa.model.config import check_kv_heads
from gqa.runtime.checks import check_whole_number
from gqa.runtime.errors import UserError

# Model types whose RoPE pairs coordinate i with i + R/2, which "svd" relies on (rope.py).
ROPE = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "phi")

# A projection's name in the file: its letter here.
LETTERS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "dense": "o"}
PROJECTION = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(\w+)\.(weight|bias)")
BUFFER = re.compile(r".*\.self_attn\.rotary_emb\.inv_freq")
# A part of a tensor's name that belongs to an attention, and is no norm before or after it.
ATTENTION = re.compile(r"(?!.*norm).*(attn|attention|qkv|query|W_pack|[qkvo]_proj).*")


class Sizes(NamedTuple):
    """The sizes of every attention of the network.

    Attributes:
        heads: query heads.
        kv_heads, new_kv_heads: KV heads before and after the conversion.
        head_dim: coordinates of a head.
        rotary: coordinates of a head that RoPE rotates, the first ones.
        width: coordinates of a token's representation.
        layers: layers of the network.
    """

    heads: int
    kv_heads: int
    new_kv_heads: int
    head_dim: int
    rotary: int
    width: int
    layers: int


# The tensors of one layer's attention: their names by part, such as "q.weight" or "k.bias".
Parts = dict[str, str]


def read_sizes(config: dict, num_kv_heads: int, method: str, path: Path) -> Sizes:
    """Return the sizes from a config.json, which was read from `path`.

    Raises:
        UserError: naming the key, for a network that cannot be converted by `method`.
    """
    # Quantised weights cannot be averaged: without their scales they are no numbers of the network.
    for key in ("is_encoder_decoder", "quantization_config"):
        if config.get(key):
            raise UserError(f"{path}: {key} is set; use a decoder-only model in floating point")

    heads = _size(config, "num_attention_heads", path)
    kv_heads = _size(config, "num_key_value_heads", path, heads)
    check_kv_heads("num_key_value_heads", kv_heads, heads)
    check_kv_heads("num_kv_heads", num_kv_heads, kv_heads, "num_key_value_heads")
    width = _size(config, "hidden_size", path)
    head_dim = _size(config, "head_dim", path, width // heads)

    # Where RoPE pairs coordinates in another way, svd would mix coordinates of different pairs. The
    # new network would be wrong without any error.
    if method == "svd" and config.get("model_type") not in ROPE:
        raise UserError(
            f"{path}: svd knows how RoPE pairs coordinates in {', '.join(ROPE)}, not in "
            f"model_type={config.get('model_type')!r}; use mean or first"
        )

    layers = _size(config, "num_hidden_layers", path)
    rotary = _rotary(config, head_dim, path) if method == "svd" else head_dim
    return Sizes(heads, kv_heads, num_kv_heads, head_dim, rotary, width, layers)


def _size(config: dict, key: str, path: Path, default: int | None = None) -> int:
    """Return a positive whole number of config.json; null stands for the default."""
    value = config.get(key)
    return check_whole_number(f"{path}: {key}", default if value is None else value)


def _rotary(config: dict, head_dim: int, path: Path) -> int:
    """Return how many coordinates of a head RoPE rotates.

    Of the types in ROPE only Phi rotates a part. The classes of the others ignore the share, or
    fail on it, and other programs obey it; so a share is refused there.
    """
    partial = config.get("model_type") == "phi"

    # Where the file says nothing, Phi's class rotates half of each head.
    shares = set(_rotary_shares(config, path)) or {0.5 if partial else 1.0}
    share = min(shares)

    if len(shares) > 1:
        raise UserError(
            f"{path}: partial_rotary_factor has the values {sorted(shares)}; remove the wrong one"
        )
    if share != 1.0 and not partial:
        raise UserError(
            f"{path}: partial_rotary_factor={share!r} is ignored by Transformers' "
            f"{config.get('model_type')}; remove it, or use mean or first"
        )

    rotary = int(head_dim * share)
    if not 0 < rotary <= head_dim or rotary % 2:
        raise UserError(
            f"{path}: partial_rotary_factor={share!r} gives no pairs in {head_dim}; use a share "
            "that rotates an even number of coordinates"
        )
    return rotary


def _rotary_shares(config: dict, path: Path) -> list[float]:
    """Return every partial_rotary_factor of a config, at its top and in its RoPE settings.

    The settings are an object, or an object for each kind of layer, under a new and an old name.
    """
    objects: list[Any] = [config]
    for key in ("rope_parameters", "rope_scaling"):
        settings = config.get(key)
        if settings is not None and not isinstance(settings, dict):
            raise UserError(f"{path}: {key}={settings!r:.100}; use an object, or remove it")
        if settings is not None:
            objects += [settings, *(x for x in settings.values() if isinstance(x, dict))]

    shares = []
    for settings in objects:
        share = settings.get("partial_rotary_factor")
        if share is None:
            continue

        # To Python, true and false are numbers.
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 < share <= 1:
            raise UserError(
                f"{path}: partial_rotary_factor={share!r:.100}; use a number above 0 and up to 1"
            )
        shares.append(float(share))
    return shares


def check_finite(tensors: Tensors) -> None:
    """Read all floating tensors once, a piece at a time, and refuse NaN and infinite numbers.

    Raises:
        UserError: naming the file and the tensor.
    """
    for name in tensors:
        tensor = tensors[name]
        if tensor.dtype not in FLOATS:
            continue
        for piece in tensors.pieces(name):
            numbers = np.frombuffer(piece, FLOATS[tensor.dtype])
            pieces.check_finite(numbers, f"{tensors.folder / tensor.file}: tensor {name}")


def attention_tensors(tensors: Tensors, sizes: Sizes) -> list[Parts]:
    """Return the names of each layer's attention tensors.

    Raises:
        UserError: naming a tensor that is missing, not understood, or of another shape or dtype.
    """
    # A wrong number of layers in config.json must not take memory: a network has fewer layers than
    # tensors.
    layers: list[Parts] = [{} for _ in range(min(sizes.layers, len(tensors)))]
    for name in tensors:
        projection = find_projection(name)
        if projection is None:
            _check_is_no_attention(name)
            continue

        layer, part = projection
        if layer >= len(layers) or part in layers[layer]:
            raise UserError(f"tensor {name} is one too many")
        layers[layer][part] = name
        tensors.floats(name, tensor_shape(part, sizes, sizes.kv_heads))

    for i in range(sizes.layers):
        for part in ("q.weight", "k.weight", "v.weight", "o.weight"):
            if i >= len(layers) or part not in layers[i]:
                stem = next(word for word, letter in LETTERS.items() if letter == part[0])
                raise UserError(f"tensor model.layers.{i}.self_attn.{stem}.weight is missing")
    return layers


def _check_is_no_attention(name: str) -> None:
    """Refuse a part of an attention that is not a plain projection, such as a norm of keys."""
    # Files of older models also hold the frequencies of RoPE, which are no weights.
    parts = [part for part in name.split(".") if ATTENTION.fullmatch(part)]
    if parts and not BUFFER.fullmatch(name):
        raise UserError(
            f"tensor {name} of an attention is not understood; use a model with "
            "q_proj, k_proj, v_proj and o_proj alone"
        )


def find_projection(name: str) -> tuple[int, str] | None:
    """Return the layer and the part, such as "q.weight", of a projection's tensor, or None."""
    match = PROJECTION.fullmatch(name)
    if match is None or match[2] not in LETTERS:
        return None
    return int(match[1]), f"{LETTERS[match[2]]}.{match[3]}"


def tensor_shape(part: str, sizes: Sizes, kv_heads: int) -> tuple[int, ...]:
    """Return the shape of a projection's tensor in a network with `kv_heads` KV heads."""
    letter, _, kind = part.partition(".")
    if letter == "o":
        shape = (sizes.width, sizes.heads * sizes.head_dim)
    else:
        heads = sizes.heads if letter == "q" else kv_heads
        shape = (heads * sizes.head_dim, sizes.width)
    # A bias has the outputs alone.
    return shape if kind == "weight" else shape[:1]
