"""Training batches from a text too large for memory: documents are read when they are needed.

`gqa.data.batching` builds the stream; texts that fit in memory take its other functions.
"""

from collections.abc import Callable

import grain
import numpy as np

NUM_THREADS = 4  # that read and encode documents ahead of the training step


class DocumentStream:
    """An endless iterator over batches of examples made from consecutive documents.

    The documents are concatenated and cut into segments of `length` tokens. Each segment becomes
    one example, so a document may continue in the next example.

    The state is three integers: the step, the number of documents read, and the number of tokens
    of the last document that are not used yet. Setting a saved state continues exactly.

    Args:
        documents: token ids [n] of each document, without end.
        make_example: makes arrays by name from token ids [length] and a random generator.
        length: tokens of a segment.
        batch_size: examples of a batch.
        seed: integers that, with the step and the row, seed the random generator of an example.
    """

    def __init__(
        self,
        documents: grain.MapDataset,
        make_example: Callable[[np.ndarray, np.random.Generator], dict[str, np.ndarray]],
        length: int,
        batch_size: int,
        seed: tuple[int, ...],
    ):
        options = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=8 * NUM_THREADS)
        self._documents = iter(documents.to_iter_dataset(options))
        self._make_example, self._length = make_example, length
        self._batch_size, self._seed = batch_size, seed
        self._step, self._num_read = 0, 0
        self._rest = np.zeros(0, np.int32)  # unused end of the last document read

    def __next__(self) -> dict[str, np.ndarray]:
        """Return the next batch: arrays [batch_size, ...] by name."""
        # Every row has a generator of its own that follows from the step, so that a resumed stream
        # draws the noise that an uninterrupted one would have drawn.
        rngs = [
            np.random.default_rng((*self._seed, self._step, i)) for i in range(self._batch_size)
        ]
        rows = [self._make_example(self._next_segment(), rng) for rng in rngs]
        self._step += 1
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _next_segment(self) -> np.ndarray:
        """Return the next `length` tokens, reading as many documents as that takes."""
        parts, size = [self._rest], len(self._rest)
        while size < self._length:
            parts.append(next(self._documents))
            size += len(parts[-1])
            self._num_read += 1

        tokens = np.concatenate(parts)
        self._rest = tokens[self._length :]
        return tokens[: self._length]

    def get_state(self) -> dict[str, int]:
        """Return the position in the stream, as JSON."""
        return {"step": self._step, "documents": self._num_read, "rest": len(self._rest)}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue from a position that `get_state` returned."""
        self._step, self._num_read, rest_length = state["step"], state["documents"], state["rest"]
        # The last document is read once more, because its unused end is not part of the state.
        self._documents.set_state({"next_index": max(self._num_read - 1, 0)})
        last = next(self._documents) if self._num_read else np.zeros(0, np.int32)
        self._rest = last[len(last) - rest_length :]
