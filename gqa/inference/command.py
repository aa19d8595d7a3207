"""The command `python -m gqa generate`: texts of one or several checkpoints beside each other.

`gqa.inference.generator` generates; this file reads the inputs, finds each checkpoint's vocabulary
and prints. `gqa/__main__.py` chooses among the commands.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gqa.checkpoints import network
from gqa.data import json_lists, text_lines, tokenizer
from gqa.inference import decoding
from gqa.inference.generator import Generator
from gqa.inference.step import Inference
from gqa.interop import hub, huggingface
from gqa.model.config import Config
from gqa.runtime.errors import UserError

DESCRIPTION = """\
Print the texts that one or several checkpoints give for the same inputs. CHECKPOINT is a folder
that launch.py has written (one step, or all steps), a T5 folder of Hugging Face, or the name of a
T5 on the Hub, such as google/flan-t5-small. Without TEXT and --jsonl, each line of standard input
is a text. Options go first or last.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.usage = "python -m gqa generate [OPTION ...] CHECKPOINT [CHECKPOINT ...] [TEXT ...]"
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("arguments", nargs="+", metavar="CHECKPOINT, TEXT", help=argparse.SUPPRESS)
    add("--jsonl", metavar="FILE", help="read a JSON object a line; print it with predictions")
    add("--column", metavar="KEY", default="source", help="of the text in these objects")
    add("--vocabulary", metavar="FILE", help="SentencePiece model, where none is found")
    add("--search", choices=("greedy", "beam", "sample"), default="greedy")
    add("--num-beams", metavar="N", type=int, default=4, help="of beam search")
    add("--length-penalty", metavar="X", type=float, default=0.6, help="of beam search")
    add("--temperature", metavar="X", type=float, default=1.0, help="of sampling")
    add("--top-k", metavar="K", type=int, default=0, help="sample from the K likeliest; 0: all")
    add("--top-p", metavar="P", type=float, default=1.0, help="sample from this probability mass")
    add("--seed", metavar="N", type=int, default=0, help="of sampling")
    add("--max-length", metavar="N", type=int, default=128, help="tokens of the longest text")
    add("--batch-size", metavar="N", type=int, default=16, help="texts at a time")


def run(options: argparse.Namespace) -> None:
    """Generate from every checkpoint for every text, and print the results.

    Raises:
        UserError: for an argument that is no checkpoint, and for texts or options that are not
            usable, before anything is loaded.
    """
    paths, texts = _split_arguments(options.arguments)
    rows = _rows(options, texts)
    search = _search(options)
    opened = [_open(path, options.vocabulary) for path in paths]
    for letter, model in zip(_letters(len(opened)), opened, strict=True):
        print(f"{letter}: {model.path} ({_heads(model.config)})", file=sys.stderr)

    outputs = [_generate(model, [row.text for row in rows], search, options) for model in opened]
    if options.jsonl:
        _print_jsonl(rows, [output.texts for output in outputs])
    else:
        _print_table(rows, [output.texts for output in outputs])
    for letter, output in zip(_letters(len(opened)), outputs, strict=True):
        print(
            f"{letter}: {output.tokens / output.seconds:,.0f} tokens/s "
            f"({output.tokens:,} tokens in {output.seconds:.1f} s, without compiling)",
            file=sys.stderr,
        )


class _Row(NamedTuple):
    """A text to generate for, and the JSON object it came from, if it came from one."""

    text: str
    source: dict


class _Model(NamedTuple):
    """A checkpoint that is loaded, with its vocabulary."""

    path: str
    params: dict
    config: Config
    vocabulary: tokenizer.Vocabulary


class _Output(NamedTuple):
    """The texts of one checkpoint, the number of their tokens, and the time that took."""

    texts: list[str]
    tokens: int
    seconds: float


# --- the inputs -----------------------------------------------------------------------------------


def _split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments into checkpoints, which come first, and texts.

    Checkpoints are folders, or names of models on the Hub.
    """
    is_checkpoint = [os.path.isdir(argument) or hub.is_name(argument) for argument in arguments]
    count = [*is_checkpoint, False].index(False)
    paths, texts = list(arguments[:count]), list(arguments[count:])
    if not paths:
        raise UserError(f"{arguments[0]}: no such folder; name a checkpoint first, then the texts")

    # A mistyped folder must not pass for a text.
    for text in texts:
        if os.sep in text and not any(map(str.isspace, text)):
            raise UserError(
                f"{text}: no such folder; if it is a text, give it as a line of standard input"
            )
    return paths, texts


def _rows(options: argparse.Namespace, texts: list[str]) -> list[_Row]:
    """Return the inputs: the texts of the command line, of a file, or of standard input."""
    if options.jsonl and texts:
        raise UserError("--jsonl and texts on the command line exclude each other; use one of them")
    if options.jsonl:
        rows = list(_read_jsonl(options.jsonl, options.column))
    elif texts:
        rows = [_Row(text, {}) for text in texts]
    else:
        rows = [_Row(line.rstrip("\n"), {}) for line in sys.stdin if line.strip()]
    if not rows:
        raise UserError(
            "there are no texts: give them as arguments, lines of standard input or --jsonl"
        )
    return rows


def _read_jsonl(path: str, column: str) -> Iterator[_Row]:
    for number, line in text_lines.lines(path):
        if line.strip():
            yield _parse(line, column, f"{path}, line {number}")


def _parse(line: bytes, column: str, place: str) -> _Row:
    try:
        row = json_lists.parse(text_lines.decode(line))
    except text_lines.WrongText as error:
        raise UserError(f"{place}: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        keys = ", ".join(row) if isinstance(row, dict) else "no keys"
        raise UserError(f"{place}: no text under {column!r}; --column=NAME chooses among {keys}")
    return _Row(row[column], row)


def _search(options: argparse.Namespace) -> decoding.Search:
    for name, least in (("num_beams", 1), ("top_k", 0), ("max_length", 1), ("batch_size", 1)):
        flag = "--" + name.replace("_", "-")
        if getattr(options, name) < least:
            raise UserError(f"{flag}={getattr(options, name)}: use a whole number, {least} or more")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p={options.top_p}: use a value above 0, at most 1")
    if not 0 <= options.temperature < float("inf"):
        raise UserError(f"--temperature={options.temperature}: use 0 or more")
    return decoding.search_of(options, options.seed)


# --- the checkpoints ------------------------------------------------------------------------------


def _open(path: str, vocabulary: str | None) -> _Model:
    """Load a checkpoint of this project, or a folder of Hugging Face, with its vocabulary."""
    if network.is_checkpoint(path):
        params, config, info = network.load(path)
        return _Model(path, params, config, _find_vocabulary(path, info["vocabulary"], vocabulary))

    folder = hub.local_folder(path)
    params, config = huggingface.load(folder)
    return _Model(path, params, config, tokenizer.load(vocabulary or folder))


def _find_vocabulary(path: str, expected: str, named: str | None) -> tokenizer.Vocabulary:
    """Return the vocabulary whose hash is `expected`: the named file, or one of the run's workdir.

    A checkpoint holds no vocabulary, only its hash. The workdir keeps the vocabularies that were
    trained in it in its folder `text`.
    """
    if named:
        if (loaded := tokenizer.load(named)).hash != expected:
            raise UserError(f"{named} is not the vocabulary that {path} was trained with")
        return loaded
    for parent in Path(path).resolve().parents:
        for file in sorted((parent / "text").glob("*.model")):
            if (loaded := tokenizer.load(file)).hash == expected:
                return loaded
    raise UserError(
        f"{path}: its vocabulary is in no folder text/ above it; name the file with --vocabulary"
    )


def _heads(config: Config) -> str:
    """Describe the heads of a network."""
    numbers = f"{config.num_kv_heads_self_attention}"
    if config.num_kv_heads_cross_attention != config.num_kv_heads_self_attention:
        numbers += f" self-attention and {config.num_kv_heads_cross_attention} cross-attention"
    return f"{config.num_heads} query heads, {numbers} KV heads"


def _letters(count: int) -> list[str]:
    """Return a short name for each of `count` checkpoints: A, B, ... Z, then numbers."""
    return [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(count)]


# --- generation -----------------------------------------------------------------------------------


def _generate(
    model: _Model, texts: list[str], search: decoding.Search, options: argparse.Namespace
) -> _Output:
    """Generate for every text. Compiling is not timed: the longest batch runs once before."""
    special = model.config.special_tokens
    encoded = [[*ids, special.eos] for ids in model.vocabulary.encode_batch(texts)]
    width = max(map(len, encoded))
    size = min(options.batch_size, len(encoded))
    inputs = np.full((-(-len(encoded) // size) * size, width), special.pad, np.int32)
    for row, ids in zip(inputs, encoded, strict=False):
        row[: len(ids)] = ids

    generator = Generator(Inference(model.config), search, options.max_length)
    weights = generator.prepare(model.params)
    generator(weights, inputs[:size])

    begin = time.perf_counter()
    outputs = np.concatenate(
        [
            generator(weights, inputs[i : i + size], _numbers(i, size, len(encoded)))
            for i in range(0, len(inputs), size)
        ]
    )[: len(encoded)]
    seconds = time.perf_counter() - begin
    return _Output(
        [model.vocabulary.decode(row) for row in outputs],
        int((outputs != special.pad).sum()),
        seconds,
    )


def _numbers(first: int, size: int, count: int) -> np.ndarray:
    """Return the numbers of a batch's examples, -1 for rows behind the last one."""
    numbers = np.arange(first, first + size)
    return np.where(numbers < count, numbers, -1)


# --- printing -------------------------------------------------------------------------------------


def _print_table(rows: list[_Row], outputs: list[list[str]]) -> None:
    """Print every text, and below it what each checkpoint makes of it."""
    for i, row in enumerate(rows):
        print(row.text)
        for letter, texts in zip(_letters(len(outputs)), outputs, strict=True):
            print(f"  {letter}  {texts[i]}")


def _print_jsonl(rows: list[_Row], outputs: list[list[str]]) -> None:
    """Print each JSON object with the predictions of the checkpoints, in their order."""
    for i, row in enumerate(rows):
        predictions = [texts[i] for texts in outputs]
        print(json.dumps({**row.source, "predictions": predictions}, ensure_ascii=False))
