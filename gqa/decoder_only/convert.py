"""Decoder-only checkpoints of Hugging Face: fewer KV heads, rewritten in their own format.

The attention is Llama's, which Mistral, Qwen2 and Phi share: q_proj, k_proj, v_proj and o_proj or
dense under self_attn, weights [outputs, inputs] with heads flattened, a KV head for neighbouring
query heads. Nothing of the network is built: what is no attention is copied byte by byte.
"""

import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gqa.decoder_only import rope
from gqa.interop import safetensors_files
from gqa.interop.safetensors_files import Tensors
from gqa.model.config import check_kv_heads
from gqa.runtime import atomic_files
from gqa.runtime.errors import UserError

METHODS = ("mean", "first", "svd")
RECORD = "gqa_conversion.json"  # what was converted, and what is done of it
ROPE = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "phi")  # where svd knows the pairs

ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "dense": "o"}
PROJECTION = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(\w+)\.(weight|bias)")
BUFFER = re.compile(r".*\.self_attn\.rotary_emb\.inv_freq")
# A part of a name that belongs to an attention, and is no norm before or after one.
ATTENTION = re.compile(r"(?!.*norm).*(attn|attention|qkv|query|W_pack|[qkvo]_proj).*")
WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".tmp")


class Sizes(NamedTuple):
    """Of one attention: query, old and new KV heads, numbers a head, numbers RoPE turns, layers."""

    heads: int
    kv_heads: int
    new_kv_heads: int
    head_dim: int
    rotary: int
    width: int
    layers: int


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    num_kv_heads: int,
    method: str = "mean",
    say: Callable[[str], None] = print,
) -> None:
    """Write the model in folder `source`, with `num_kv_heads`, to folder `target`.

    One file after the other, and in memory one layer's attention. What a kill has left in `target`
    is gone on with; config.json comes last.

    Args:
        method: "mean" or "first" of a group's heads, or "svd": values by singular values, absorbed
            by the output projection, and the mean of keys after the turns that RoPE allows.

    Raises:
        UserError: for what is not understood, naming the tensor or key, before anything is written.
    """
    source, target = Path(source), Path(target)
    config = safetensors_files.read_json(source / "config.json")
    sizes = _sizes(config, num_kv_heads, method, source / "config.json")
    old = Tensors(source)
    with safetensors_files.naming(old.path):
        layers = _layers(old, sizes)
    record = _begin(old, target, {"num_key_value_heads": num_kv_heads, "method": method})
    layer = functools.lru_cache(maxsize=1)(lambda i: _layer(old, layers[i], sizes, method))
    files, nbytes = {}, 0
    for file in dict.fromkeys(old[name].file for name in old):
        names = [name for name in old if old[name].file == file]
        shapes = {name: _described(old, name, sizes) for name in names}
        files |= dict.fromkeys(names, file)
        nbytes += sum(size for _, _, size in shapes.values())
        if (target / file).is_file() and record["done"].get(file) == os.stat(target / file).st_size:
            continue
        data = functools.partial(_data, old, layer, sizes, record["errors"])
        record["done"][file] = safetensors_files.write(target / file, shapes, data)
        safetensors_files.write_json(target / RECORD, record)
        say(f"{target / file}: {len(names)} tensors")
    safetensors_files.write_index(target, files, nbytes)
    _copy_others(source, target)
    safetensors_files.write_json(
        target / "config.json", config | {"num_key_value_heads": num_kv_heads}
    )
    say(_report(record["errors"], method, sizes))


def _sizes(config: dict, num_kv_heads: int, method: str, path: Path) -> Sizes:
    if method not in METHODS:
        raise UserError(f"method={method!r}; use one of {', '.join(METHODS)}")
    for key in ("is_encoder_decoder", "quantization_config"):
        if config.get(key):
            raise UserError(f"{path}: {key} is set; use a decoder-only model in floating point")
    heads = _size(config, "num_attention_heads", path)
    kv_heads = _size(config, "num_key_value_heads", path, heads)
    check_kv_heads("num_key_value_heads", kv_heads, heads)
    check_kv_heads("--num-kv-heads", num_kv_heads, kv_heads, "num_key_value_heads")
    width = _size(config, "hidden_size", path)
    head_dim = _size(config, "head_dim", path, width // heads)
    if method == "svd" and config.get("model_type") not in ROPE:
        raise UserError(
            f"{path}: svd knows how RoPE pairs numbers in {', '.join(ROPE)}, not in "
            f"model_type={config.get('model_type')!r}; use mean or first"
        )
    layers = _size(config, "num_hidden_layers", path)
    rotary = _rotary(config, head_dim, path)
    return Sizes(heads, kv_heads, num_kv_heads, head_dim, rotary, width, layers)


def _size(config: dict, key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"{path}: {key}={value!r}; use a whole number, 1 or more")
    return value


def _rotary(config: dict, head_dim: int, path: Path) -> int:
    """Numbers of a head that RoPE turns; the first of them."""
    nested = config.get("rope_parameters") or {}
    default = 0.5 if config.get("model_type") == "phi" else 1.0  # Transformers' own
    share = config.get("partial_rotary_factor", nested.get("partial_rotary_factor", default))
    rotary = int(head_dim * share) if isinstance(share, int | float) else 0
    if not 0 < rotary <= head_dim or rotary % 2:
        raise UserError(f"{path}: partial_rotary_factor={share!r} gives no pairs in {head_dim}")
    return rotary


def _layers(old: Tensors, sizes: Sizes) -> list[dict[str, str]]:
    """The tensors of each layer's attention: "q.weight" and so on, and their names."""
    layers = [{} for _ in range(min(sizes.layers, len(old)))]
    for name in old:
        role = _role(name)
        if role is None:
            _check_untouched(name)
            continue
        layer, part = role
        if layer >= len(layers) or part in layers[layer]:
            raise UserError(f"tensor {name} is one too many")
        layers[layer][part] = name
        old.floats(name, _shape(part, sizes, sizes.kv_heads))
    for i in range(sizes.layers):
        for part in ("q.weight", "k.weight", "v.weight", "o.weight"):
            if i >= len(layers) or part not in layers[i]:
                stem = next(word for word, letter in ROLES.items() if letter == part[0])
                raise UserError(f"tensor model.layers.{i}.self_attn.{stem}.weight is missing")
    return layers


def _check_untouched(name: str) -> None:
    """Refuse a part of an attention that is not a plain projection, e.g. a norm of keys."""
    parts = [part for part in name.split(".") if ATTENTION.fullmatch(part)]
    if parts and not BUFFER.fullmatch(name):
        raise UserError(
            f"tensor {name} of an attention is not understood; use a model with "
            " q_proj, k_proj, v_proj and o_proj alone"
        )


def _role(name: str) -> tuple[int, str] | None:
    """Layer and, e.g., "q.weight" of a projection's tensor."""
    match = PROJECTION.fullmatch(name)
    if match is None or match[2] not in ROLES:
        return None
    return int(match[1]), f"{ROLES[match[2]]}.{match[3]}"


def _shape(part: str, sizes: Sizes, kv_heads: int) -> tuple[int, ...]:
    letter, _, kind = part.partition(".")
    if letter == "o":
        shape = (sizes.width, sizes.heads * sizes.head_dim)
    else:
        heads = sizes.heads if letter == "q" else kv_heads
        shape = (heads * sizes.head_dim, sizes.width)
    return shape if kind == "weight" else shape[:1]


def _described(old: Tensors, name: str, sizes: Sizes) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and bytes of what a tensor becomes."""
    tensor, role = old[name], _role(name)
    if role is None or role[1][0] not in "kv":
        return tensor.dtype, tensor.shape, tensor.nbytes
    shape = _shape(role[1], sizes, sizes.new_kv_heads)
    return tensor.dtype, shape, tensor.nbytes // sizes.kv_heads * sizes.new_kv_heads


def _data(old: Tensors, layer: Callable, sizes: Sizes, errors: dict, name: str) -> Iterable:
    """What a tensor becomes, and its layer's errors noted."""
    role = _role(name)
    if role is None or sizes.new_kv_heads == sizes.kv_heads:
        return old.pieces(name)
    new, errors[str(role[0])] = layer(role[0])
    return [new[name]] if name in new else old.pieces(name)


def _layer(old: Tensors, parts: dict[str, str], sizes: Sizes, method: str) -> tuple[dict, dict]:
    """The arrays that change in one layer by name, and its squared weight errors."""
    K, H = sizes.new_kv_heads, sizes.head_dim
    wanted = "qkvo" if method == "svd" else "kv"
    read = {part: old.read(parts[part]) for part in parts if part[0] in wanted}
    heads = {x: _heads(read, x, H) for x in wanted}
    groups = {x: heads[x].reshape(K, sizes.kv_heads // K, -1, H) for x in "kv"}
    errors = {x: _errors(groups[x]) for x in "kv"}
    if method == "svd":
        per_head = (K, sizes.kv_heads // K, sizes.heads // sizes.kv_heads, -1, H)
        queries, outputs = heads["q"].reshape(per_head), heads["o"].reshape(per_head)
        pairs = zip(groups["k"], queries, strict=True)
        found = {"k": [rope.keys(*pair, sizes.rotary) for pair in pairs]}
        found["v"] = [rope.values(*pair) for pair in zip(groups["v"], outputs, strict=True)]
        for x, partner in (("k", "q"), ("v", "o")):
            heads[x] = np.stack([head for head, _, _ in found[x]])
            heads[partner] = np.stack([p for _, p, _ in found[x]]).reshape(heads[partner].shape)
            errors[x]["svd"] = float(sum(error for _, _, error in found[x]))
    else:
        heads = {x: groups[x].mean(1) if method == "mean" else groups[x][:, 0] for x in "kv"}
    new = {}
    for part, array in read.items():
        if part != "o.bias":
            shape = _shape(part, sizes, K)
            new[parts[part]] = (
                _flat(heads[part[0]], part, sizes.width).reshape(shape).astype(array.dtype)
            )
    return new, errors


def _heads(read: dict[str, np.ndarray], x: str, H: int) -> np.ndarray:
    """Weights by head [heads, D, H] in float64, the bias being one more input; o transposed."""
    weight = read[f"{x}.weight"].astype(np.float64)
    if x == "o":
        return weight.reshape(len(weight), -1, H).transpose(1, 0, 2)
    rows = weight.reshape(-1, H, weight.shape[1]).transpose(0, 2, 1)
    if f"{x}.bias" not in read:
        return rows
    bias = read[f"{x}.bias"].astype(np.float64)
    return np.concatenate([rows, bias.reshape(-1, 1, H)], 1)


def _flat(heads: np.ndarray, part: str, width: int) -> np.ndarray:
    """The way back from `_heads`."""
    if part == "o.weight":
        return heads.transpose(1, 0, 2)
    return heads[:, -1] if part.endswith("bias") else heads[:, :width].transpose(0, 2, 1)


def _errors(groups: np.ndarray) -> dict[str, float]:
    """Squared distance of groups [K, G, D, H] from their mean and first head, and squared norm."""
    return {
        "mean": float(np.square(groups - groups.mean(1, keepdims=True)).sum()),
        "first": float(np.square(groups - groups[:, :1]).sum()),
        "norm": float(np.square(groups).sum()),
    }


def _begin(old: Tensors, target: Path, settings: dict) -> dict:
    """The record of this conversion: a new one, or what was left of it in `target`."""
    if target.exists() and old.folder.samefile(target):
        raise UserError(f"{target} is the model itself; name another folder")
    stats = {file: os.stat(old.folder / file) for file in {old[name].file for name in old}}
    source = {file: [stat.st_size, stat.st_mtime_ns] for file, stat in sorted(stats.items())}
    fresh = {"source": source, **settings, "done": {}, "errors": {}}
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        found = safetensors_files.read_json(target / RECORD) if (target / RECORD).exists() else {}
        if any(found.get(key) != fresh[key] for key in ("source", *settings)):
            raise UserError(f"{target} holds something else; name a new or empty folder")
        return fresh | {key: found.get(key, {}) for key in ("done", "errors")}
    target.mkdir(parents=True, exist_ok=True)
    safetensors_files.write_json(target / RECORD, fresh)
    return fresh


def _copy_others(source: Path, target: Path) -> None:
    """The files beside the weights, e.g. a tokenizer's; not weights in other formats."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != "config.json":
            with atomic_files.writing(target / path.name) as temporary:
                shutil.copyfile(path, temporary)


def _report(errors: dict, method: str, sizes: Sizes) -> str:
    """Relative weight errors, by layer and of all."""
    names = list(dict.fromkeys((method, "mean")))
    rows = {f"layer {i}": errors[str(i)] for i in range(sizes.layers) if str(i) in errors}
    lines = [f"{sizes.kv_heads} -> {sizes.new_kv_heads} KV heads, {method}"]
    if not rows:
        return lines[0]
    lines.append("squared weight error by squared norm:")
    rows["all"] = {
        x: {key: sum(row[x][key] for row in rows.values()) for key in ("norm", *names)}
        for x in "kv"
    }
    for label, row in rows.items():
        shares = [
            f"{what} {name} {row[x][name] / max(row[x]['norm'], 1e-300):.4f}"
            for x, what in (("k", "keys"), ("v", "values"))
            for name in names
        ]
        lines.append(f"  {label}: {', '.join(shares)}")
    return "\n".join(lines)
