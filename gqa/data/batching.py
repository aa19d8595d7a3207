"""Batches of token ids for training and evaluation, packed or not.

A batch is a dict of int32 arrays `inputs` [B, S] and `targets` [B, T]. Each text ends with EOS;
padding (0) follows. With packing, several examples share a row, and the batch also has
`{inputs,targets}_{segments,positions}` of the same shapes: the number of the example within its
row, counted from 1 (0 on padding), and the position within the example, counted from 0.

Training batches never end. A batch depends on the seed and the step alone, and the iterator's state
is one integer (three for `DocumentStream`), so a resumed run sees the same batches.

Of several processes, `shard` = (index, count) names one. It gets its block of the rows of every
batch: B is then `batch_size / count`.

Token ids come from `gqa.data.token_cache`, the noise of pretraining from
`gqa.data.span_corruption`.
"""

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from gqa.data import span_corruption
from gqa.data.document_stream import DocumentStream
from gqa.data.examples import TokenPair
from gqa.data.span_corruption import SpanLengths, span_lengths
from gqa.model.special_tokens import T5_TOKENS, SpecialTokens
from gqa.runtime.errors import UserError

Batch = dict[str, np.ndarray]

# How many of the last rows stay open for further examples while packing. It bounds the work.
OPEN_ROWS = 64


# --- pretraining: span corruption -----------------------------------------------------------------


def pretraining_batches(
    parts: Sequence[np.ndarray],
    weights: Sequence[float] = (1.0,),
    *,
    inputs_length: int,
    batch_size: int,
    seed: int,
    sentinels: np.ndarray,
    special: SpecialTokens = T5_TOKENS,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Return endless batches of span corruption over texts held in memory.

    Each text is cut into segments of equal length. Their order and their noise are drawn anew every
    epoch.

    Args:
        parts: token ids [n] of each part of a mixture, its documents concatenated.
        weights: how often the segments of each part are drawn.
        inputs_length: S of the batches; T is `span_lengths(inputs_length).targets`.
        batch_size: rows of a batch, over all processes.
        sentinels: ids of `<extra_id_0>`, `<extra_id_1>`, ...
        special: the tokens that end and pad rows, here and in the functions below.
    """
    lengths = span_lengths(inputs_length)
    segments = [span_corruption.cut_into_segments(tokens, lengths.tokens) for tokens in parts]
    corrupt = _corruption(lengths, sentinels, special)

    # `random_map` seeds the noise by the place in the endless dataset, so that every epoch has its
    # own.
    examples = [part.random_map(corrupt) for part in _shuffled(segments, seed)]
    return _batches(_mix(examples, weights), batch_size, shard)


def streamed_pretraining_batches(
    documents: grain.MapDataset,
    encode: Callable[[str], Sequence[int]],
    *,
    inputs_length: int,
    batch_size: int,
    seed: int,
    sentinels: np.ndarray,
    special: SpecialTokens = T5_TOKENS,
    shard: tuple[int, int] = (0, 1),
) -> DocumentStream:
    """Return batches like `pretraining_batches`, from documents that are read when needed.

    The order of the documents is drawn anew every epoch. Each process reads documents of its own.

    Args:
        documents: the texts of one epoch.
        encode: gives the token ids of a text.
    """
    index, count = shard
    lengths = span_lengths(inputs_length)

    # The shuffled order is the same in all processes. Of 2 processes, number 1 reads documents 1,
    # 3, 5, ... of it.
    shuffled = documents.seed(seed).shuffle().repeat()[index::count]
    return DocumentStream(
        shuffled.map(lambda text: np.array(encode(text), np.int32)),
        _corruption(lengths, sentinels, special),
        lengths.tokens,
        _rows_per_process(batch_size, shard),
        # With `index`, so that row i of different processes has different noise.
        (seed, index),
    )


def _corruption(
    lengths: SpanLengths, sentinels: np.ndarray, special: SpecialTokens
) -> Callable[[np.ndarray, np.random.Generator], Batch]:
    """Return a function of (segment, rng) that makes one padded example."""

    def corrupt(segment: np.ndarray, rng: np.random.Generator) -> Batch:
        inputs, targets = span_corruption.corrupt(segment, rng, sentinels)
        return {
            "inputs": _fill([_ended(inputs, special.eos)], lengths.inputs, special.pad),
            "targets": _fill([_ended(targets, special.eos)], lengths.targets, special.pad),
        }

    return corrupt


# --- fine-tuning: examples as they are ------------------------------------------------------------


def finetuning_batches(
    parts: Sequence[Sequence[TokenPair]],
    weights: Sequence[float] = (1.0,),
    *,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
    seed: int,
    pack: bool,
    special: SpecialTokens = T5_TOKENS,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Return endless batches of examples, truncated to the lengths, in a new order every epoch.

    With `pack`, several examples of a part share a row. Which examples share one is drawn once from
    `seed`; an epoch then shuffles whole rows, so that any step can be computed without the steps
    before it.

    Args:
        parts: examples of each part of a mixture.
        weights: how often the rows of each part are drawn.
        batch_size: rows of a batch, over all processes.

    Raises:
        UserError: if a part has no examples.
    """
    if not all(map(len, parts)):
        raise UserError("the training split is empty")
    lengths = inputs_length, targets_length

    # Truncate before packing, because the packing needs the lengths that remain.
    truncated = [[_truncate(pair, *lengths, special.eos) for pair in pairs] for pairs in parts]
    if pack:
        truncated = [_shuffled_once(pairs, seed) for pairs in truncated]
    rows = [_rows(pairs, lengths, pack) for pairs in truncated]

    examples = [
        part.map(lambda row: _row_arrays(row, lengths, pack, special.pad))
        for part in _shuffled(rows, seed)
    ]
    return _batches(_mix(examples, weights), batch_size, shard)


def _shuffled_once(pairs: Sequence[TokenPair], seed: int) -> list[TokenPair]:
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order]


def _rows(
    pairs: Sequence[TokenPair], lengths: tuple[int, int], pack: bool
) -> list[list[TokenPair]]:
    """Return the examples of each row: one, or as many as fit `lengths` (inputs, targets)."""
    if not pack or not pairs:
        return [[pair] for pair in pairs]
    sizes = np.array([[len(text) for text in pair] for pair in pairs])
    return [[pairs[i] for i in row] for row in first_fit(sizes, lengths)]


def _row_arrays(row: Sequence[TokenPair], lengths: tuple[int, int], pack: bool, pad: int) -> Batch:
    """Return the arrays of one row; a row without examples is padding.

    In segments and positions, padding is 0 whatever the token of padding is.
    """
    arrays = {}
    for side, (name, length) in enumerate(zip(("inputs", "targets"), lengths, strict=True)):
        texts = [pair[side] for pair in row]
        arrays[name] = _fill(texts, length, pad)
        if pack:
            arrays[f"{name}_segments"] = _fill(
                [np.full(len(text), k) for k, text in enumerate(texts, start=1)], length, 0
            )
            arrays[f"{name}_positions"] = _fill([np.arange(len(text)) for text in texts], length, 0)
    return arrays


def first_fit(
    sizes: np.ndarray, capacity: tuple[int, ...], window: int = OPEN_ROWS
) -> list[list[int]]:
    """Put each item into the first row with room for it; return the items of each row.

    Only the last `window` rows are considered.

    Args:
        sizes: [n, sides], the size of each item on each side (inputs and targets).
        capacity: [sides], the size of a row.
    """
    rows: list[list[int]] = []
    room = np.zeros((0, len(capacity)), np.int64)  # of the open rows, which are the last of `rows`
    for item, size in enumerate(sizes):
        fits = (room >= size).all(axis=1)

        # The first True is the oldest open row with room.
        k = int(fits.argmax()) if fits.any() else len(room)

        # No open row has room: open another, and close the oldest if there are too many.
        if k == len(room):
            room = np.concatenate([room, [capacity]])[-window:]
            rows.append([])
            k = len(room) - 1

        rows[len(rows) - len(room) + k].append(item)
        room[k] -= size
    return rows


# --- what both share: shuffle, mix, divide among processes ----------------------------------------


def _shuffled(parts: Sequence[Sequence | np.ndarray], seed: int) -> list[grain.MapDataset]:
    """Return each part as an endless dataset, in a new order every epoch."""
    return [grain.MapDataset.source(part).seed(seed).shuffle().repeat() for part in parts]


def _mix(parts: list[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def _batches(
    examples: grain.MapDataset, batch_size: int, shard: tuple[int, int]
) -> grain.DatasetIterator:
    """Iterate over this process's block of rows of every batch."""
    index, rows = shard[0], _rows_per_process(batch_size, shard)

    def block(step: int) -> Batch:
        # For example, with 8 rows on 2 processes, process 1 takes examples 28 to 31 at step 3.
        first = step * batch_size + index * rows
        parts = [examples[i] for i in range(first, first + rows)]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    # The length of an endless dataset is the largest integer, so these batches do not end in
    # practice.
    local = grain.MapDataset.range(len(examples) // batch_size).map(block)

    # A thread prepares batches ahead, so that the next one is ready when a step ends.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(local.to_iter_dataset(options))


def _rows_per_process(batch_size: int, shard: tuple[int, int]) -> int:
    if batch_size % shard[1]:
        raise UserError(f"batch_size={batch_size} does not divide among {shard[1]} processes")
    return batch_size // shard[1]


# --- evaluation -----------------------------------------------------------------------------------


def share_cut(texts: Sequence[np.ndarray], length: int) -> float:
    """Return the share of texts of token ids without EOS that do not fit `length` with EOS."""
    return sum(len(text) >= length for text in texts) / max(len(texts), 1)


def evaluation_batches(
    pairs: Sequence[TokenPair],
    *,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
    special: SpecialTokens = T5_TOKENS,
    pack: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Batch, int]]:
    """Yield every example once, in order, as (batch, number of rows with an example).

    The last batch is filled up with rows of padding. Every process gets the same number of batches.
    With `pack`, several examples share a row, which takes less time and gives the same losses.
    """
    lengths = inputs_length, targets_length
    truncated = [_truncate(pair, *lengths, special.eos) for pair in pairs]
    examples = _rows(truncated, lengths, pack)

    index, rows = shard[0], _rows_per_process(batch_size, shard)
    for start in range(0, len(examples), batch_size):
        first = start + index * rows
        block = examples[first : first + rows]

        # All batches have one shape, for which the evaluation is compiled once.
        padding: list[list[TokenPair]] = [[]] * (rows - len(block))
        arrays = [_row_arrays(row, lengths, pack, special.pad) for row in [*block, *padding]]
        yield {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}, len(block)


# --- one row --------------------------------------------------------------------------------------


def _truncate(pair: TokenPair, inputs_length: int, targets_length: int, eos: int) -> TokenPair:
    """Cut both sides to leave room for `eos`, then append it."""
    inputs, targets = pair
    return _ended(inputs[: inputs_length - 1], eos), _ended(targets[: targets_length - 1], eos)


def _ended(text: np.ndarray, eos: int) -> np.ndarray:
    # `np.append` takes ten times as long for a short text, and data sets have millions.
    row = np.empty(len(text) + 1, text.dtype)
    row[:-1], row[-1] = text, eos
    return row


def _fill(texts: Sequence[np.ndarray], length: int, pad: int) -> np.ndarray:
    """Return one int32 row [length]: the texts one after the other, then `pad`."""
    row = np.full(length, pad, np.int32)
    end = 0
    for text in texts:
        row[end : end + len(text)] = text
        end += len(text)
    return row
