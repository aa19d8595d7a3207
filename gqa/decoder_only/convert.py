"""Rewrite a decoder-only Hugging Face folder with fewer KV heads.

The network is never built. Files are rewritten one after the other; the tensors of an attention are
converted a layer at a time, and all other tensors are copied byte by byte. layout.py checks what a
folder holds, side_files.py copies what lies beside the weights, target_folder.py keeps the record
of a conversion, rope.py converts the heads for "svd", command.py is `python -m gqa convert`. T5
networks, whose parameters fit in memory, are converted by gqa/conversion instead.
"""

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from gqa.decoder_only import rope, side_files, target_folder
from gqa.decoder_only.layout import (
    Parts,
    Sizes,
    attention_tensors,
    check_finite,
    find_projection,
    read_sizes,
    tensor_shape,
)
from gqa.interop import hub, safetensors_files
from gqa.interop.safetensors_files import SAFETENSORS, Tensors
from gqa.runtime import checks, regular_files
from gqa.runtime.errors import ConfigError

METHODS = ("mean", "first", "svd")

# Errors of one layer: for "k" and "v", squared weight errors by method, and the squared "norm".
LayerErrors = dict[str, dict[str, float]]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    num_kv_heads: int,
    method: str = "mean",
    report: Callable[[str], None] = print,
) -> None:
    """Write the model `source` with `num_kv_heads` KV heads to folder `target`.

    Memory holds one layer's attention. A conversion that was interrupted continues where it
    stopped; config.json is written last, so a folder that has it is complete.

    Args:
        source: a folder of Hugging Face, or the name of a model on the Hub.
        method: "mean" or "first" of the heads of a group, or "svd". "svd" pools values by singular
            values, which the output projection absorbs, and keys by the mean of heads that are
            aligned by the rotations that RoPE allows (rope.py).
        report: is given a line for each file, and the relative errors at the end.

    Raises:
        UserError: naming the tensor, key or argument that cannot be converted, before anything is
            written.
    """
    # Check the whole folder.
    if method not in METHODS:
        raise ConfigError("method", method, f"use one of {', '.join(METHODS)}")
    target = Path(target)
    checks.check_local_path("target", target)
    source = hub.local_folder(source, (SAFETENSORS,), side_files.COPIED)

    old = Tensors(source)
    config = regular_files.read_json(source / "config.json")
    safetensors_files.check_default_weights(config, source / "config.json")
    sizes = read_sizes(config, num_kv_heads, method, source / "config.json")
    with safetensors_files.naming(old.path):
        layers = attention_tensors(old, sizes)
    settings = {"num_key_value_heads": num_kv_heads, "method": method}
    is_converted = sizes.new_kv_heads != sizes.kv_heads
    record = target_folder.find_record(old, target, settings, is_converted)

    # Reading all weights takes minutes. A run that continues can rely on the first one's check,
    # because the record says that the files have not changed.
    if record is None:
        side_files.check(source)
        check_finite(old)

    with target_folder.opened(target):
        if record is None:
            record = target_folder.start_record(old, target, settings)
        convert_layer = functools.partial(_convert_layer, old, layers, sizes, method)
        _write_weights(old, target, sizes, convert_layer, record, report)

        # Copy the rest, and complete the folder by its config.
        left_out = side_files.copy(source, target, target_folder.RECORD)
        if left_out:
            report(f"left out (old heads, or a link out of the folder): {', '.join(left_out)}")
        new_config = config | {"num_key_value_heads": num_kv_heads}
        safetensors_files.write_json(target / "config.json", new_config)
    report(_describe_errors(record["errors"], method, sizes))


def _write_weights(
    old: Tensors,
    target: Path,
    sizes: Sizes,
    convert_layer: Callable[[int], tuple[dict[str, np.ndarray], LayerErrors]],
    record: target_folder.Record,
    report: Callable[[str], None],
) -> None:
    """Write every file of weights that the record does not call finished, and the index."""
    # Tensors of one layer are neighbours, so one converted layer is kept.
    latest_layer = functools.lru_cache(maxsize=1)(convert_layer)
    new_data = functools.partial(_new_data, old, latest_layer, sizes, record["errors"])
    files: dict[str, str] = {}
    total_bytes = 0

    for file in dict.fromkeys(old[name].file for name in old):
        names = [name for name in old if old[name].file == file]
        headers = {name: _new_header(old, name, sizes) for name in names}
        files |= dict.fromkeys(names, file)
        total_bytes += sum(nbytes for _, _, nbytes in headers.values())

        if target_folder.is_finished(target / file, record):
            continue

        # The record is written after each file, so that an interrupted run repeats one file at
        # most.
        record["done"][file] = safetensors_files.write(target / file, headers, new_data)
        target_folder.write_record(target, record)
        report(f"{target / file}: {len(names)} tensors")
    safetensors_files.write_index(target, files, total_bytes)


def _new_header(old: Tensors, name: str, sizes: Sizes) -> tuple[str, tuple[int, ...], int]:
    """Return the dtype, shape and bytes of a tensor after the conversion."""
    tensor, projection = old[name], find_projection(name)
    if projection is None or projection[1][0] not in "kv":
        return tensor.dtype, tensor.shape, tensor.nbytes

    # Of the projections only keys and values change their shapes.
    shape = tensor_shape(projection[1], sizes, sizes.new_kv_heads)
    return tensor.dtype, shape, tensor.nbytes // sizes.kv_heads * sizes.new_kv_heads


def _new_data(
    old: Tensors,
    convert_layer: Callable[[int], tuple[dict[str, np.ndarray], LayerErrors]],
    sizes: Sizes,
    errors: dict[str, LayerErrors],
    name: str,
) -> Iterable[bytes | np.ndarray]:
    """Return a tensor's data after the conversion, and note the errors of its layer in `errors`."""
    projection = find_projection(name)
    if projection is None or sizes.new_kv_heads == sizes.kv_heads:
        return old.pieces(name)

    # The layer is text, because the record is JSON, whose keys are texts.
    layer, _ = projection
    new, errors[str(layer)] = convert_layer(layer)
    return [new[name]] if name in new else old.pieces(name)


def _convert_layer(
    old: Tensors, layers: list[Parts], sizes: Sizes, method: str, layer: int
) -> tuple[dict[str, np.ndarray], LayerErrors]:
    """Return the tensors that change in one layer, by name, and the layer's errors."""
    parts = layers[layer]

    # Read what the method changes, as heads in float64.
    letters = "qkvo" if method == "svd" else "kv"
    arrays = {part: old.read(parts[part]) for part in parts if part[0] in letters}
    heads = {letter: _to_heads(arrays, letter, sizes.head_dim) for letter in letters}

    # Pool the groups. A group is made of neighbours: from 8 heads to 2, heads 0-3 become head 0.
    by_group = (sizes.new_kv_heads, sizes.kv_heads // sizes.new_kv_heads, -1, sizes.head_dim)
    groups = {letter: heads[letter].reshape(by_group) for letter in "kv"}
    errors = {letter: _pooling_errors(groups[letter]) for letter in "kv"}
    if method == "svd":
        new_heads, svd_errors = _pool_by_svd(groups, heads["q"], heads["o"], sizes)
        for letter, error in svd_errors.items():
            errors[letter]["svd"] = error
    elif method == "mean":
        new_heads = {letter: groups[letter].mean(1) for letter in "kv"}
    else:
        new_heads = {letter: groups[letter][:, 0] for letter in "kv"}

    # Put the heads back into tensors. The output projection's bias belongs to no head.
    new = {}
    for part, array in arrays.items():
        if part != "o.bias":
            tensor = _from_heads(new_heads[part[0]], part, sizes.width)
            shape = tensor_shape(part, sizes, sizes.new_kv_heads)
            new[parts[part]] = tensor.reshape(shape).astype(array.dtype)
    return new, errors


def _pool_by_svd(
    groups: dict[str, np.ndarray], queries: np.ndarray, outputs: np.ndarray, sizes: Sizes
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Pool keys with their queries and values with their outputs; return heads and errors.

    Args:
        groups: keys "k" and values "v" as [K, G, inputs, H].
        queries, outputs: [N, inputs, H].
    """
    K, H = sizes.new_kv_heads, sizes.head_dim
    # [new KV head, old KV head of its group, query head that reads it, inputs, H].
    by_head = (K, sizes.kv_heads // K, sizes.heads // sizes.kv_heads, -1, H)
    pooled_keys = [
        rope.keys(*group, sizes.rotary)
        for group in zip(groups["k"], queries.reshape(by_head), strict=True)
    ]
    pooled_values = [
        rope.values(*group) for group in zip(groups["v"], outputs.reshape(by_head), strict=True)
    ]

    heads, errors = {}, {}
    for letter, partner, old_partners, results in (
        ("k", "q", queries, pooled_keys),
        ("v", "o", outputs, pooled_values),
    ):
        heads[letter] = np.stack([head for head, _, _ in results])
        partners = np.stack([partners for _, partners, _ in results])
        heads[partner] = partners.reshape(old_partners.shape)
        errors[letter] = float(sum(error for _, _, error in results))
    return heads, errors


def _to_heads(arrays: dict[str, np.ndarray], letter: str, H: int) -> np.ndarray:
    """Return a projection by head, [heads, inputs, H] in float64; the bias is one more input.

    The output projection is transposed, so its "inputs" are the outputs of the network's layer.
    """
    weight = arrays[f"{letter}.weight"].astype(np.float64)
    if letter == "o":
        return weight.reshape(len(weight), -1, H).transpose(1, 0, 2)
    rows = weight.reshape(-1, H, weight.shape[1]).transpose(0, 2, 1)
    if f"{letter}.bias" not in arrays:
        return rows
    bias = arrays[f"{letter}.bias"].astype(np.float64)
    return np.concatenate([rows, bias.reshape(-1, 1, H)], 1)


def _from_heads(heads: np.ndarray, part: str, width: int) -> np.ndarray:
    """Return the axes of a tensor in their order from the heads of `_to_heads`."""
    if part == "o.weight":
        return heads.transpose(1, 0, 2)

    # The bias is the input that `_to_heads` put behind the others.
    return heads[:, -1] if part.endswith("bias") else heads[:, :width].transpose(0, 2, 1)


def _pooling_errors(groups: np.ndarray) -> dict[str, float]:
    """Return the squared distances of groups [K, G, inputs, H] to mean and first head, and norm."""
    return {
        "mean": float(np.square(groups - groups.mean(1, keepdims=True)).sum()),
        "first": float(np.square(groups - groups[:, :1]).sum()),
        "norm": float(np.square(groups).sum()),
    }


def _describe_errors(errors: dict[str, LayerErrors], method: str, sizes: Sizes) -> str:
    """Return a line of relative weight errors for each layer, and one for all layers."""
    methods = list(dict.fromkeys((method, "mean")))
    rows = {f"layer {i}": errors[str(i)] for i in range(sizes.layers) if str(i) in errors}
    lines = [f"{sizes.kv_heads} -> {sizes.new_kv_heads} KV heads, {method}"]

    # Where the number of KV heads stays, no layer is converted.
    if not rows:
        return lines[0]

    lines.append("squared weight error by squared norm:")
    rows["all"] = {
        letter: {key: sum(row[letter][key] for row in rows.values()) for key in ("norm", *methods)}
        for letter in "kv"
    }
    for label, row in rows.items():
        # A layer of zeros has an error of 0, not a division by zero.
        shares = [
            f"{side} {name} {row[letter][name] / max(row[letter]['norm'], 1e-300):.4f}"
            for letter, side in (("k", "keys"), ("v", "values"))
            for name in methods
        ]
        lines.append(f"  {label}: {', '.join(shares)}")
    return "\n".join(lines)
