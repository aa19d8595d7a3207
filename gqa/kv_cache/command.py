"""The command `python -m gqa kv-cache`: a table of KV cache bytes by number of KV heads.

`gqa.kv_cache.presets` finds the decoder; `gqa/__main__.py` chooses among the commands.
"""

import argparse

import jax.numpy as jnp

from gqa.kv_cache import presets
from gqa.kv_cache.decoder import Decoder
from gqa.kv_cache.presets import PRESETS
from gqa.runtime.checks import check_choice
from gqa.runtime.errors import ConfigError

# Data types of a cache, of any model: the cache need not be one that this project can run.
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
LARGEST = 10**12  # of any number in the arguments, so that the table stays readable


def describe(
    decoder: Decoder, batch: int, length: int, inputs: int, dtype: str, memory: float | None
) -> str:
    """Return the table: a row for each number of KV heads that divides the query heads.

    The row of the model itself carries a *. A model with latent attention has that row alone, and
    one whose attentions have different numbers of KV heads has it before the others. `memory` is in
    GiB.
    """
    itemsize = jnp.dtype(dtype).itemsize

    # The cache of one sequence for each row, by the text of the row's first column.
    numbers = [k for k in range(decoder.heads, 0, -1) if decoder.heads % k == 0]
    decoders = {} if decoder.kv_heads else {"as is*": decoder}
    if decoder.expanded is None:
        marked = decoder.kv_heads
        decoders |= {f"{k}{'*' if k == marked else ''}": decoder.with_kv_heads(k) for k in numbers}
    else:
        # The latent serves all heads, so a number of KV heads would mean nothing.
        decoders = {"latent*": decoder}
    sizes = {name: each.cache_bytes(length, inputs, itemsize) for name, each in decoders.items()}
    multi_head = _multi_head(decoder).cache_bytes(length, inputs, itemsize)

    # The column of vectors for each layer has a meaning only if all layers keep vectors of one size
    # and the same number of them.
    layer = decoder.attentions[0]
    uniform = len(set(decoder.self_attention)) == 1 and len(set(decoder.attentions)) == 1
    uniform = uniform and decoder.expanded is None and not _attends_in_turn(decoder)
    rows = [["KV heads", *(["vectors / layer"] if uniform else []), "a sequence", "the batch"]]
    rows[0] += ["to MHA", *([f"sequences in {memory:g} GiB"] if memory else [])]

    for name, size in sizes.items():
        vectors = size // (len(decoder.self_attention) * layer.key_dim * itemsize)
        row = [name, *([f"{vectors:,}"] if uniform else []), _text(size), _text(batch * size)]
        row.append(f"1/{_ratio(multi_head, size)}")
        rows.append(row + ([f"{int(memory * 2**30 // size):,}"] if memory else []))

    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    title = f"{_sizes(decoder)}, {dtype}, {_extent(decoder, length, inputs)}, batch {batch}"
    last = [_answer(decoder, sizes, multi_head, memory)]
    return "\n".join([title, *table, *([decoder.note] if decoder.note else []), *last])


def _attends_in_turn(decoder: Decoder) -> bool:
    """Return whether a layer attends either to the text or to the input (Llama 3.2 Vision)."""
    return 0 < len(decoder.cross_attention) == decoder.layers - len(decoder.self_attention)


def _multi_head(decoder: Decoder) -> Decoder:
    """Return the decoder as it were with keys and values for every query head."""
    if decoder.expanded is None:
        return decoder.with_kv_heads(decoder.heads)
    expanded = decoder.expanded._replace(kv_heads=decoder.heads)
    return decoder._replace(self_attention=(expanded,) * len(decoder.self_attention))


def _sizes(decoder: Decoder) -> str:
    """Return the first words of the table: layers, heads and their sizes."""
    keys = {layer.key_dim for layer in decoder.attentions}
    size = f" of {keys.pop()}" if len(keys) == 1 and decoder.expanded is None else ""
    text = f"{decoder.layers} layers, {decoder.heads} heads{size}"
    cached = len(decoder.self_attention)
    if _attends_in_turn(decoder):
        return f"{text}, {len(decoder.cross_attention)} of them attend to the input alone"
    # Hybrid models have layers without a cache; LongCat has two attentions in each layer.
    return text if cached == decoder.layers else f"{text}, {cached} attentions with a cache"


def _extent(decoder: Decoder, length: int, inputs: int) -> str:
    """Return the part of the title about positions and windows."""
    text = f"{length} positions"
    if decoder.cross_attention:
        text += f" after {decoder.encoder_length or inputs} of input"

    # The number of layers for each window; 0 stands for no window.
    windows: dict[int, int] = {}
    for layer in decoder.self_attention:
        windows[layer.window] = windows.get(layer.window, 0) + 1
    for window, layers in windows.items():
        if window:
            everywhere = len(windows) == 1
            text += f" in a window of {window}" + ("" if everywhere else f" in {layers} layers")
    return text


def _answer(decoder: Decoder, sizes: dict[str, int], multi_head: int, memory: float | None) -> str:
    """Return the last line: how much the cache saves against multi-head attention.

    It compares the cache of the model. For a multi-head model it compares the cache that the model
    would have with the largest possible number of KV heads up to 8.
    """
    kv_heads = decoder.kv_heads
    if decoder.expanded is not None:
        size, subject = sizes["latent*"], "latent attention"
    elif not kv_heads:
        size, subject = sizes["as is*"], "as it is"
    else:
        # For a multi-head model its own cache saves nothing, so show a typical conversion: 32 heads
        # to 8 KV heads, 12 heads to 6.
        if kv_heads == decoder.heads:
            kv_heads = max(k for k in range(1, min(8, kv_heads) + 1) if decoder.heads % k == 0)
        size = sizes.get(f"{kv_heads}*") or sizes[f"{kv_heads}"]
        subject = f"{kv_heads} KV heads"
    text = f"{subject}: {_ratio(multi_head, size)} times less cache than {decoder.heads}"
    text += " heads with keys and values of their own" if decoder.expanded is not None else ""
    if memory:
        fits, before = (int(memory * 2**30 // each) for each in (size, multi_head))
        text += f"; {fits:,} sequences in {memory:g} GiB instead of {before:,}"
    return text


def _ratio(larger: int, smaller: int) -> str:
    """Return how many times one number of bytes contains another."""
    # Write whole factors as "8" and not as "8.0".
    exact = larger % smaller == 0
    return f"{larger // smaller}" if exact else f"{larger / smaller:.1f}"


def _text(nbytes: int) -> str:
    """Return a number of bytes in the largest unit that fits: GiB, MiB or KiB."""
    unit, size = next(
        (x for x in (("GiB", 2**30), ("MiB", 2**20)) if nbytes >= x[1]), ("KiB", 1024)
    )
    return f"{nbytes / size:,.2f} {unit}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    names = ", ".join(PRESETS)
    parser.add_argument("model", help=f"config.json, its folder, a name on the Hub, or {names}")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time")
    parser.add_argument("--length", type=int, default=2048, help="positions of the decoder")
    parser.add_argument(
        "--inputs-length", type=int, help="positions of an encoder; by default as --length"
    )
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--memory", type=float, help="GiB that the weights leave for the cache")


def run(options: argparse.Namespace) -> None:
    """Check the arguments and print the table.

    Raises:
        ConfigError: naming the argument that cannot be used.
    """
    inputs = options.length if options.inputs_length is None else options.inputs_length
    numbers = {"--batch": options.batch, "--length": options.length, "--inputs-length": inputs}
    numbers |= {"--memory": options.memory} if options.memory is not None else {}
    for argument, value in numbers.items():
        if not 0 < value <= LARGEST:
            raise ConfigError(argument, value, f"use more than 0 and up to {LARGEST:,}")
    check_choice("--dtype", options.dtype, DTYPES)

    decoder = presets.find(options.model)

    # Refuse a length that would change nothing. The length that the model has anyway is accepted.
    fixed = decoder.encoder_length
    if options.inputs_length is not None and (not decoder.cross_attention or fixed):
        reason = f"but the encoder has {fixed} positions" if fixed else "but there is no encoder"
        if inputs != fixed:
            raise ConfigError("--inputs-length", inputs, "leave it out", reason)
    sizes = (options.batch, options.length, inputs, options.dtype, options.memory)
    print(describe(decoder, *sizes))
