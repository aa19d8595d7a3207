"""The command `python -m gqa kv-cache`: a table of KV cache bytes by number of KV heads.

`gqa.kv_cache.presets` knows the decoders; `gqa/__main__.py` chooses among the commands.
"""

import argparse
import functools
from collections.abc import Callable

import jax.numpy as jnp

from gqa.kv_cache import presets
from gqa.kv_cache.presets import PRESETS, Decoder
from gqa.runtime.checks import check_choice
from gqa.runtime.errors import ConfigError

# Data types of a cache, of any model: the cache need not be one that this project can run.
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
LARGEST = 10**12  # of any number in the arguments, so that the table stays readable


def cache_bytes(decoder: Decoder, kv_heads: int, length: int, inputs: int, itemsize: int) -> int:
    """Return the cache bytes of one sequence: a key and a value per KV head, layer and position.

    `length` counts the decoder's positions, `inputs` those of an encoder if there is one.
    """
    positions = min(length, decoder.window or length) + (inputs if decoder.cross else 0)
    return 2 * decoder.layers * kv_heads * positions * decoder.head_dim * itemsize


def describe(
    decoder: Decoder, batch: int, length: int, inputs: int, dtype: str, memory: float | None
) -> str:
    """Return the table: a row for each number of KV heads that divides the query heads.

    The model's own number of KV heads carries a *. `memory` is in GiB.
    """
    itemsize = jnp.dtype(dtype).itemsize
    extent = f" after {inputs} of input" if decoder.cross else ""
    extent += f" in a window of {decoder.window}" if decoder.window else ""
    lines = [
        f"{decoder.layers} layers, {decoder.heads} heads of {decoder.head_dim}, {dtype}, "
        f"{length} positions{extent}, batch {batch}"
    ]
    header = ["KV heads", "vectors / layer", "a sequence", "the batch", "to MHA"]
    header += [f"sequences in {memory:g} GiB"] if memory else []
    rows = [header]

    size = functools.partial(cache_bytes, decoder, length=length, inputs=inputs, itemsize=itemsize)
    for kv_heads in range(decoder.heads, 0, -1):
        if decoder.heads % kv_heads == 0:
            sequence = size(kv_heads)
            vectors = sequence // (decoder.layers * decoder.head_dim * itemsize)
            gain = decoder.heads // kv_heads
            mark = "*" if kv_heads == decoder.kv_heads else ""
            row = [
                f"{kv_heads}{mark}",
                f"{vectors:,}",
                _text(sequence),
                _text(batch * sequence),
                f"1/{gain}",
            ]
            rows.append(row + ([f"{int(memory * 2**30 // sequence):,}"] if memory else []))

    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines += ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, _answer(decoder, size, memory)])


def _answer(decoder: Decoder, size: Callable[[int], int], memory: float | None) -> str:
    """Return the last line: how much a grouped cache saves against multi-head attention.

    The grouped cache has the model's own number of KV heads or, for a multi-head model, the largest
    possible number up to 8.
    """
    kv_heads = decoder.kv_heads
    if kv_heads == decoder.heads:
        kv_heads = max(k for k in range(1, min(8, kv_heads) + 1) if decoder.heads % k == 0)
    gain = decoder.heads // kv_heads
    text = f"{kv_heads} KV heads: {gain} times less cache than {decoder.heads}"
    if memory:
        fits, before = (int(memory * 2**30 // size(k)) for k in (kv_heads, decoder.heads))
        text += f"; {fits:,} sequences in {memory:g} GiB instead of {before:,}"
    return text


def _text(nbytes: int) -> str:
    """Return a number of bytes in the largest unit that fits: GiB, MiB or KiB."""
    unit, size = next(
        (x for x in (("GiB", 2**30), ("MiB", 2**20)) if nbytes >= x[1]), ("KiB", 1024)
    )
    return f"{nbytes / size:,.2f} {unit}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("model", help=f"config.json, its folder, or {', '.join(PRESETS)}")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time")
    parser.add_argument("--length", type=int, default=2048, help="positions of the decoder")
    parser.add_argument(
        "--inputs-length", type=int, help="positions of the encoder; by default as --length"
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
    sizes = (options.batch, options.length, inputs, options.dtype, options.memory)
    print(describe(decoder, *sizes))
