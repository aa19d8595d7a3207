"""The command `python -m gqa kv-cache`: a table of KV cache bytes by number of KV heads.

`gqa.kv_cache.presets` knows the decoders; `gqa/__main__.py` chooses among the commands.
"""

import argparse
import functools

import jax.numpy as jnp

from gqa.kv_cache import presets
from gqa.kv_cache.presets import PRESETS, Decoder
from gqa.runtime.errors import UserError

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
LARGEST = 10**12  # of what is asked: products stay numbers that mean something


def cache_bytes(decoder: Decoder, kv_heads: int, length: int, inputs: int, itemsize: int) -> int:
    """Bytes of one sequence: a key and a value a KV head, layer and position."""
    positions = min(length, decoder.window or length) + (inputs if decoder.cross else 0)
    return 2 * decoder.layers * kv_heads * positions * decoder.head_dim * itemsize


def describe(
    decoder: Decoder, batch: int, length: int, inputs: int, dtype: str, memory: float | None
) -> str:
    """The table, a row for each number of KV heads that divides the heads; * is the model's own."""
    itemsize = jnp.dtype(dtype).itemsize
    also = f" after {inputs} of input" if decoder.cross else ""
    also += f" in a window of {decoder.window}" if decoder.window else ""
    lines = [
        f"{decoder.layers} layers, {decoder.heads} heads of {decoder.head_dim}, {dtype}, "
        f"{length} positions{also}, batch {batch}"
    ]
    header = ["KV heads", "vectors / layer", "a sequence", "the batch", "to MHA"]
    header += [f"sequences in {memory:g} GiB"] if memory else []
    rows = [header]
    size = functools.partial(cache_bytes, decoder, length=length, inputs=inputs, itemsize=itemsize)
    for kv_heads in range(decoder.heads, 0, -1):
        if decoder.heads % kv_heads == 0:
            one = size(kv_heads)
            vectors = one // (decoder.layers * decoder.head_dim * itemsize)
            gain = decoder.heads // kv_heads
            own = "*" if kv_heads == decoder.kv_heads else ""
            row = [f"{kv_heads}{own}", f"{vectors:,}", _text(one), _text(batch * one), f"1/{gain}"]
            rows.append(row + ([f"{int(memory * 2**30 // one):,}"] if memory else []))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines += ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, _answer(decoder, size, memory)])


def _answer(decoder: Decoder, size, memory: float | None) -> str:
    """The own number of KV heads, or else 8 or the next below it, against multi-head attention."""
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
    """Check the arguments and print the table."""
    inputs = options.length if options.inputs_length is None else options.inputs_length
    asked = {"--batch": options.batch, "--length": options.length, "--inputs-length": inputs}
    asked |= {"--memory": options.memory} if options.memory is not None else {}
    for key, value in asked.items():
        if not 0 < value <= LARGEST:
            raise UserError(f"{key}={value}; use more than 0")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype={options.dtype}; use one of {', '.join(DTYPES)}")
    decoder = presets.find(options.model)
    sizes = (options.batch, options.length, inputs, options.dtype, options.memory)
    print(describe(decoder, *sizes))
