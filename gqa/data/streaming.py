"""Training batches of documents that are too many to hold: each is read when it is needed."""

from collections.abc import Callable

import grain
import numpy as np

READERS = 4  # threads that read and encode


class Stream:
    """Endless batches of examples, each of `length` tokens of documents joined one after the other.

    Args:
        documents: token ids [n] of each, in the order they are joined, without end.
        example: makes arrays by name of token ids [length] and a random generator.
        seed: of those generators.

    Its state is three integers; from a saved one it goes on exactly.
    """

    def __init__(
        self,
        documents: grain.MapDataset,
        example: Callable[[np.ndarray, np.random.Generator], dict[str, np.ndarray]],
        length: int,
        batch_size: int,
        seed: tuple[int, ...],
    ):
        options = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=8 * READERS)
        self._documents = iter(documents.to_iter_dataset(options))
        self._example, self._length, self._size, self._seed = example, length, batch_size, seed
        self._step, self._read = 0, 0
        self._rest = np.zeros(0, np.int32)  # the end of the last document that was read

    def __next__(self) -> dict[str, np.ndarray]:
        rngs = [np.random.default_rng((*self._seed, self._step, i)) for i in range(self._size)]
        rows = [self._example(self._segment(), rng) for rng in rngs]
        self._step += 1
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _segment(self) -> np.ndarray:
        parts, size = [self._rest], len(self._rest)
        while size < self._length:
            parts.append(next(self._documents))
            size += len(parts[-1])
            self._read += 1
        joined = np.concatenate(parts)
        self._rest = joined[self._length :]
        return joined[: self._length]

    def get_state(self) -> dict[str, int]:
        """Where it is, as JSON."""
        return {"step": self._step, "documents": self._read, "rest": len(self._rest)}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from what `get_state` gave."""
        self._step, self._read, rest = state["step"], state["documents"], state["rest"]
        self._documents.set_state({"next_index": max(self._read - 1, 0)})
        last = next(self._documents) if self._read else np.zeros(0, np.int32)
        self._rest = last[len(last) - rest :]
