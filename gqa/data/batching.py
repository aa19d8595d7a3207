"""Tokens to batches: T5's span corruption, and sequence-to-sequence examples, packed or not.

A batch is a dict of int32 [B, length] arrays `inputs` and `targets`, EOS at the end of each text
and 0 behind it. Packed batches add `{inputs,targets}_{segments,positions}`: segments count from 1
within a row and are 0 on padding, positions count from 0 within a segment.

Training streams never end and are functions of (seed, step): their state is one integer, or
three where documents are too many to hold.
"""

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from gqa.data.examples import Example
from gqa.data.streaming import Stream
from gqa.data.tokenizer import EOS, NUM_SENTINELS, PAD, Tokenizer
from gqa.runtime import atomic_files
from gqa.runtime.errors import UserError

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0

Batch = dict[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]  # token ids of one example's inputs and targets, no EOS


def tokenize(
    texts: Sequence[str], tokenizer: Tokenizer, folder: str | os.PathLike
) -> list[np.ndarray]:
    """int32 ids of each text, no EOS; kept in `folder` under a hash of texts and vocabulary."""
    key = hashlib.sha256(tokenizer.hash.encode())
    for text in texts:
        key.update(len(text).to_bytes(8, "little") + text.encode())
    path = pathlib.Path(folder) / f"tokens-{key.hexdigest()[:16]}.npz"
    kept = _read_tokens(path, len(texts))
    if kept is not None:
        return kept
    encoded = [np.array(ids, np.int32) for ids in tokenizer.encode_batch(texts)]
    _write_tokens(path, encoded)
    return encoded


def _read_tokens(path: pathlib.Path, count: int) -> list[np.ndarray] | None:
    """What `_write_tokens` wrote of `count` texts; None if there is none or it is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                return None
        with np.load(path) as arrays:
            ids, lengths = arrays["ids"], arrays["lengths"]
    except Exception:  # a damaged zip file fails in a dozen ways, and writing tells what matters
        return None
    ends = np.cumsum(lengths, dtype=np.int64)
    whole = len(lengths) == count and len(ids) == lengths.sum()
    return np.split(ids, ends)[:-1] if whole else None


def _write_tokens(path: pathlib.Path, encoded: Sequence[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.writing(path) as temporary, open(temporary, "wb") as file:
        ids = np.concatenate([np.zeros(0, np.int32), *encoded])
        np.savez(file, ids=ids, lengths=np.array([len(text) for text in encoded], np.int64))


def tokenize_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, folder: str | os.PathLike
) -> list[Pair]:
    """Inputs and first target of each example as `tokenize` gives them."""
    inputs = tokenize([example.inputs for example in examples], tokenizer, folder)
    targets = tokenize([example.targets[0] for example in examples], tokenizer, folder)
    return list(zip(inputs, targets, strict=True))


# --- span corruption (T5, arXiv 1910.10683 section 3.1.4, and preprocessors.py of its code) -------


class SpanLengths(NamedTuple):
    """What one example of span corruption is made of; all in tokens, EOS counted."""

    tokens: int
    inputs: int
    targets: int


def span_lengths(inputs_length: int) -> SpanLengths:
    """The most raw tokens whose corrupted inputs fit: 512 -> (568, 512, 114), as in T5."""
    if inputs_length < 4:
        raise UserError(
            f"inputs_length={inputs_length} is too short for span corruption; use 4 or more"
        )
    tokens = 2
    while _corrupted_lengths(tokens + 1).inputs <= inputs_length:
        tokens += 1
        if _noise(tokens)[1] > NUM_SENTINELS:
            raise UserError(
                f"inputs_length={inputs_length} needs more sentinels than the {NUM_SENTINELS} "
                f"there are; use at most {_corrupted_lengths(tokens).inputs - 1}"
            )
    return _corrupted_lengths(tokens)


def _noise(tokens: int) -> tuple[int, int]:
    """How many of `tokens` are noise, and in how many spans."""
    noise = min(max(round(tokens * NOISE_DENSITY), 1), tokens - 1)
    return noise, max(round(noise / MEAN_SPAN_LENGTH), 1)


def _corrupted_lengths(tokens: int) -> SpanLengths:
    noise, spans = _noise(tokens)
    return SpanLengths(tokens, tokens - noise + spans + 1, noise + spans + 1)


def span_corruption(tokens: np.ndarray, rng: np.random.Generator, first_sentinel: int) -> Pair:
    """Replace random spans of `tokens` [n] by sentinels; return (inputs, targets), EOS on both.

    The k-th span becomes `first_sentinel - k` in the inputs; the targets are each sentinel followed
    by the tokens it stands for. Text comes first, a noise span last.
    """
    noise, spans = _noise(len(tokens))
    lengths = np.empty(2 * spans, np.int64)
    lengths[0::2] = _random_segmentation(len(tokens) - noise, spans, rng)
    lengths[1::2] = _random_segmentation(noise, spans, rng)
    is_noise = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
    starts = np.cumsum(lengths)[0::2]  # where each noise span begins
    sentinels = first_sentinel - np.arange(spans)

    inputs = tokens.copy()
    inputs[starts] = sentinels
    keep = ~is_noise
    keep[starts] = True
    noise_tokens = tokens[is_noise]
    noise_starts = np.cumsum(lengths[1::2]) - lengths[1::2]
    targets = np.insert(noise_tokens, noise_starts, sentinels)
    return np.append(inputs[keep], EOS), np.append(targets, EOS)


def _random_segmentation(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths [segments], each at least 1, that sum to `items`; every split equally likely."""
    cuts = np.sort(rng.permutation(items - 1)[: segments - 1]) + 1
    return np.diff(cuts, prepend=0, append=items)


def restore(inputs: np.ndarray, targets: np.ndarray, first_sentinel: int) -> np.ndarray:
    """Undo `span_corruption`: put what the targets say where the inputs have sentinels."""
    last_sentinel = first_sentinel - NUM_SENTINELS + 1
    spans: dict[int, list[int]] = {}
    for token in targets[targets != PAD]:
        if last_sentinel <= token <= first_sentinel:
            current = spans.setdefault(int(token), [])
        elif token != EOS:
            current.append(int(token))
    text = [spans.get(int(i), [int(i)]) for i in inputs if i not in (PAD, EOS)]
    return np.array([token for span in text for token in span], np.int32)


# --- training streams -----------------------------------------------------------------------------


def pretrain(
    parts: Sequence[np.ndarray],
    weights: Sequence[float] = (1.0,),
    *,
    inputs_length: int,
    batch_size: int,
    seed: int,
    first_sentinel: int,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Endless span-corruption batches over arrays of token ids [n], documents joined.

    The text is cut into segments of equal length, reshuffled every epoch with new noise; those of
    each part are drawn as often as its weight says. Batches have `inputs` [B, inputs_length] and
    `targets` [B, span_lengths(inputs_length).targets], with B = batch_size / count for `shard`
    (index, count) of the processes.
    """
    lengths = span_lengths(inputs_length)
    segments = [_segments(tokens, lengths.tokens) for tokens in parts]
    corrupt = _corruption(lengths, first_sentinel)
    examples = [part.random_map(corrupt) for part in _shuffled(segments, seed)]
    return _batches(_mix(examples, weights), batch_size, shard)


def pretrain_stream(
    documents: grain.MapDataset,
    encode: Callable[[str], Sequence[int]],
    *,
    inputs_length: int,
    batch_size: int,
    seed: int,
    first_sentinel: int,
    shard: tuple[int, int] = (0, 1),
) -> Stream:
    """Batches as of `pretrain`, of documents that are read and encoded as they are needed.

    They are reshuffled every epoch. Each of the processes joins documents of its own.
    """
    index, count = shard
    lengths = span_lengths(inputs_length)
    shuffled = documents.seed(seed).shuffle().repeat()[index::count]
    return Stream(
        shuffled.map(lambda text: np.array(encode(text), np.int32)),
        _corruption(lengths, first_sentinel),
        lengths.tokens,
        _share(batch_size, shard),
        (seed, index),
    )


def _corruption(lengths: SpanLengths, first_sentinel: int) -> Callable:
    """A function of (segment, rng) that makes one padded example."""

    def corrupt(segment: np.ndarray, rng: np.random.Generator) -> Batch:
        inputs, targets = span_corruption(segment, rng, first_sentinel)
        return {
            "inputs": _fill([inputs], lengths.inputs),
            "targets": _fill([targets], lengths.targets),
        }

    return corrupt


def _segments(tokens: np.ndarray, length: int) -> np.ndarray:
    """`tokens` as [n, length]; the rest that fills no segment is left out."""
    count = len(tokens) // length
    if not count:
        raise UserError(f"the text has {len(tokens)} tokens, one example needs {length}")
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)


def seq2seq(
    parts: Sequence[Sequence[Pair]],
    weights: Sequence[float] = (1.0,),
    *,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
    seed: int,
    pack: bool,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Endless batches of pairs, truncated to the lengths, reshuffled every epoch.

    With `pack` several pairs of a part share a row. Which ones do is drawn once from `seed`; the
    rows are what is shuffled then, so that any step can be computed without the ones before it.
    Rows of each part are drawn as often as its weight says.
    """
    if not all(map(len, parts)):
        raise UserError("the training split is empty")
    lengths = {"inputs": inputs_length, "targets": targets_length}
    cut = [[_truncate(p, inputs_length, targets_length) for p in pairs] for pairs in parts]
    rows = [_rows(pairs, tuple(lengths.values()), seed, pack) for pairs in cut]

    def row_arrays(row: Sequence[Pair]) -> Batch:
        batch = {}
        for side, (name, length) in enumerate(lengths.items()):
            texts = [pair[side] for pair in row]
            batch[name] = _fill(texts, length)
            if pack:
                batch[f"{name}_segments"] = _fill(
                    [np.full(len(text), k) for k, text in enumerate(texts, start=1)], length
                )
                batch[f"{name}_positions"] = _fill([np.arange(len(text)) for text in texts], length)
        return batch

    examples = [part.map(row_arrays) for part in _shuffled(rows, seed)]
    return _batches(_mix(examples, weights), batch_size, shard)


def _rows(
    pairs: Sequence[Pair], capacity: tuple[int, int], seed: int, pack: bool
) -> list[list[Pair]]:
    """The pairs of each row: one, or as many as fit."""
    if not pack:
        return [[pair] for pair in pairs]
    order = np.random.default_rng(seed).permutation(len(pairs))
    sizes = np.array([[len(text) for text in pairs[i]] for i in order])
    return [[pairs[i] for i in order[row]] for row in first_fit(sizes, capacity)]


def first_fit(sizes: np.ndarray, capacity: tuple[int, ...], window: int = 64) -> list[list[int]]:
    """Put items of `sizes` [n, sides] into rows of `capacity` [sides], each into the first it fits.

    Only the last `window` rows are open, which bounds the work. Returns the items of each row.
    """
    rows: list[list[int]] = []
    room = np.zeros((0, len(capacity)), np.int64)
    for item, size in enumerate(sizes):
        fits = (room >= size).all(axis=1)
        k = int(fits.argmax()) if fits.any() else len(room)
        if k == len(room):
            room = np.concatenate([room, [capacity]])[-window:]
            rows.append([])
            k = len(room) - 1
        rows[len(rows) - len(room) + k].append(item)
        room[k] -= size
    return rows


def _shuffled(parts: Sequence[Sequence], seed: int) -> list[grain.MapDataset]:
    return [grain.MapDataset.source(part).seed(seed).shuffle().repeat() for part in parts]


def _mix(parts: list[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def _batches(examples: grain.MapDataset, batch_size: int, shard: tuple[int, int]):
    """Iterate over this process's block of rows of every batch."""
    index, rows = shard[0], _share(batch_size, shard)

    def block(step: int) -> Batch:
        first = step * batch_size + index * rows
        parts = [examples[i] for i in range(first, first + rows)]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    local = grain.MapDataset.range(len(examples) // batch_size).map(block)
    # One batch ahead in one thread: the next is ready when the step is, and results keep order.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(local.to_iter_dataset(options))


def _share(batch_size: int, shard: tuple[int, int]) -> int:
    """Rows of a batch that each process has."""
    if batch_size % shard[1]:
        raise UserError(f"batch_size={batch_size} does not divide among {shard[1]} processes")
    return batch_size // shard[1]


# --- evaluation -----------------------------------------------------------------------------------


def corrupted(
    tokens: np.ndarray, *, inputs_length: int, first_sentinel: int, seed: int
) -> list[Pair]:
    """Span-corruption examples of held-out text [n], in order, with noise fixed by `seed`."""
    segments = _segments(tokens, span_lengths(inputs_length).tokens)
    noisy = (
        span_corruption(segment, np.random.default_rng((seed, i)), first_sentinel)
        for i, segment in enumerate(segments)
    )
    return [(inputs[:-1], targets[:-1]) for inputs, targets in noisy]


def evaluation(
    pairs: Sequence[Pair],
    *,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Batch, int]]:
    """Every pair once, in order, unpacked: (batch, number of real rows) of this process.

    The last batch is filled with empty rows. Of several processes each gets its block of every
    batch, the same number of batches each.
    """
    index, rows = shard[0], _share(batch_size, shard)
    for start in range(0, len(pairs), batch_size):
        first = start + index * rows
        part = [_truncate(p, inputs_length, targets_length) for p in pairs[first : first + rows]]
        batch = {
            "inputs": np.zeros((rows, inputs_length), np.int32),
            "targets": np.zeros((rows, targets_length), np.int32),
        }
        for row, (inputs, targets) in enumerate(part):
            batch["inputs"][row, : len(inputs)] = inputs
            batch["targets"][row, : len(targets)] = targets
        yield batch, len(part)


def _truncate(pair: Pair, inputs_length: int, targets_length: int) -> Pair:
    """Cut both sides to leave room for EOS, then add it."""
    inputs, targets = pair
    return np.append(inputs[: inputs_length - 1], EOS), np.append(
        targets[: targets_length - 1], EOS
    )


def _fill(texts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """One int32 row [length]: the texts one after the other, then padding."""
    row = np.full(length, PAD, np.int32)
    end = 0
    for text in texts:
        row[end : end + len(text)] = text
        end += len(text)
    return row
