"""Whole texts from a network: `generate` for one call, `Generator` for many.

Decoding runs in segments of positions. Between two segments the cache grows and examples that have
ended leave the batch, so that no step reads more than the unfinished examples need. A single step
is in `step.py`, the choice of tokens in `decoding.py`.
"""

import dataclasses
import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from gqa.inference import decoding
from gqa.inference.decoding import GREEDY, Search
from gqa.inference.step import Inference, Memory, Tokens
from gqa.model.config import Config
from gqa.model.transformer import init_params
from gqa.runtime import sharding

SHORTEST = 64  # the smallest capacity of a cache, in positions
EVERY = 32  # positions of a segment, after which finished examples leave the batch
HALVINGS = 3  # how often a batch may shrink to half its size


def generate(
    params: dict,
    config: Config,
    inputs: Int[Tokens, "B S"],
    *,
    max_length: int,
    search: Search = GREEDY,
    stop: bool = True,
) -> Int[np.ndarray, "B {max_length}"]:
    """Generate a text for each of the inputs.

    The programs are compiled once for each config, search, length and shape of inputs. To generate
    from one checkpoint many times, use a `Generator`, which also keeps the rearranged parameters.

    Args:
        params: of `gqa.load`, or of `gqa.model.transformer.init_params`.
        inputs: token ids, padded with `config.pad_token_id`.
        max_length: number of tokens of the longest text.
        search: `GREEDY`, `Sample` or `Beam` of `gqa.inference.decoding`.
        stop: whether a text ends at `config.eos_token_id`. If not, all have `max_length` tokens.

    Returns:
        Token ids, with padding behind the end of a text.
    """
    generator = _compiled(config, search, max_length, stop)
    return generator(generator.prepare(params), inputs)


@functools.lru_cache(maxsize=8)
def _compiled(config: Config, search: Search, max_length: int, stop: bool) -> "Generator":
    return Generator(Inference(config), search, max_length, stop)


def bucket(length: int, longest: int) -> int:
    """Return the first of 64, 128, 256 ... `longest` that is `length` or more."""
    size = SHORTEST
    while size < length:
        size *= 2
    return min(size, longest)


class _Shardings(NamedTuple):
    """How a mesh splits the arrays of a generator. Where a field is None, JAX decides.

    num_shards: the number of devices or groups of devices that a batch is split over.
    replicated: of arrays that every device holds in full.
    batch: of arrays whose first axis is the batch: inputs, and the rows of a search.
    weights, cache, memory: of the trees that `prepare`, `init_cache` and `prefill` return.
    """

    num_shards: int = 1
    replicated: NamedSharding | None = None
    batch: NamedSharding | None = None
    weights: Any = None
    cache: list[NamedSharding] | None = None
    memory: Any = None


def _shardings(net: Inference, mesh: Mesh) -> _Shardings:
    """Return how `mesh` splits the arrays of a generator over `net`."""
    replicated = NamedSharding(mesh, PartitionSpec())
    batch = sharding.batch_sharding(mesh)
    caches = sharding.cache_sharding(net.config, mesh, net.layout, net.fused)

    weights: Any = replicated
    if net.layout.model > 1:
        shapes = jax.eval_shape(lambda: net.prepare(init_params(net.config, 0)))
        # Weights that are split over the axis "data" would be gathered again for every token.
        layout = dataclasses.replace(net.layout, fsdp=False)
        weights = sharding.param_shardings(shapes, mesh, layout)

    num_shards = max(
        map(sharding.num_parts, (batch, *caches.self_attention, *caches.cross_attention))
    )
    memory: Any = Memory(caches.cross_attention, caches.mask)  # type: ignore[arg-type]
    return _Shardings(num_shards, replicated, batch, weights, caches.self_attention, memory)


class Generator:
    """Generates texts of up to `length` tokens by a `search` over `net`.

        generate = Generator(Inference(config), GREEDY, length=512)
        weights = generate.prepare(params)                              once per checkpoint
        tokens = generate(weights, inputs)                              prefill, then decode

    If `stop` is False, no token ends a text and all texts have `length` tokens.

    Self-attention reads a cache whose capacity is the current length's `bucket`. When the
    unfinished examples fit into half of the batch, the batch is halved, at most three times. So
    decoding is compiled for at most 4 batch sizes times 1 + log2(length / 64) capacities, for each
    shape of inputs.

    With a `mesh`, the arrays are split as `net.layout` says, and a batch is never made smaller than
    the number of shards it is split into. Call the generator under `jax.set_mesh(mesh)`. On a mesh
    of several processes, each process gives the same inputs and gets all tokens.
    """

    def __init__(
        self,
        net: Inference,
        search: Search,
        length: int,
        stop: bool = True,
        mesh: Mesh | None = None,
    ):
        self.net, self.search, self.length, self.stop = net, search, length, stop
        self.special = net.config.special_tokens
        split = _Shardings() if mesh is None else _shardings(net, mesh)
        self._num_shards, self._batch_sharding = split.num_shards, split.batch
        state = None if mesh is None else (split.batch, split.cache, split.memory)

        # Programs that run once per checkpoint or once per batch.
        prefill = partial(net.prefill, num_beams=search.num_beams)
        self.prepare = jax.jit(net.prepare, out_shardings=split.weights)
        self.prefill = jax.jit(
            prefill, in_shardings=(split.weights, split.batch), out_shardings=split.memory
        )
        start = partial(search.start, length=length, special=self.special)
        self._start = jax.jit(start, out_shardings=split.batch)
        self._init_cache = jax.jit(
            net.init_cache, static_argnums=(0, 1, 2), out_shardings=split.cache
        )

        # Programs that run once per segment. The cache is donated, so that a step writes into its
        # memory instead of a copy.
        self._advance = jax.jit(
            self._advance_rows, donate_argnames="cache", out_shardings=state and state[:2]
        )
        self._grow = jax.jit(net.grow, static_argnums=1, out_shardings=split.cache)
        self._keep = jax.jit(self._keep_rows, out_shardings=state)
        self._outputs = jax.jit(search.outputs, out_shardings=split.replicated)
        self._ended = jax.jit(lambda rows: rows.ended, out_shardings=split.replicated)

    def __call__(
        self,
        weights: dict,
        inputs: Int[Tokens, "B S"],
        numbers: Int[np.ndarray, " B"] | None = None,
    ) -> Int[np.ndarray, "B length"]:
        """Generate tokens for padded inputs; see `decode`."""
        if self._batch_sharding is not None:
            inputs = sharding.put(inputs, self._batch_sharding)
        return self.decode(weights, self.prefill(weights, inputs), numbers)

    def decode(
        self, weights: dict, memory: Memory, numbers: Int[np.ndarray, " B"] | None = None
    ) -> Int[np.ndarray, "B length"]:
        """Generate tokens from the result of `prefill`, with padding behind the end of each text.

        `numbers` decide, with the seed, what `Sample` draws for each example; by default they are
        0 .. B - 1. A row with a negative number stands for no example, and stays padding.
        """
        B = len(memory.mask)
        numbers = np.arange(B) if numbers is None else np.asarray(numbers)
        outputs = np.full((B, self.length), self.special.pad, np.int32)

        # For each row that is still in the batch: its row of `outputs`, and whether it has ended.
        output_rows, ended = np.arange(B), numbers < 0

        # The cache begins with the smallest capacity and grows with the texts.
        rows = self._start(numbers.astype(np.int32))
        cache = self._init_cache(B, self.search.num_beams, bucket(1, self.length))
        sizes = self._batch_sizes(B)
        begin = 0

        while begin < self.length and not ended.all():
            # Shrink the batch if the unfinished examples fit a smaller one.
            size = min(size for size in sizes if size >= (~ended).sum())
            if size < len(output_rows):
                # Keep the texts so far, because those of ended examples leave the batch now.
                outputs[output_rows] = self._outputs(rows)
                keep = np.argsort(ended, kind="stable")[:size]  # unfinished examples come first
                rows, cache, memory = self._keep(rows, cache, memory, keep)
                output_rows, ended = output_rows[keep], ended[keep]

            capacity = bucket(begin + 1, self.length)
            if self.net.capacity(cache) < capacity:
                cache = self._grow(cache, capacity)

            # Without `stop` no example ends early, so a segment lasts until the cache is full.
            end = min(begin + EVERY, capacity) if self.stop else capacity
            rows, cache = self._advance(weights, rows, cache, memory, begin, end)
            begin = end
            if self.stop:
                ended = np.asarray(self._ended(rows))

        outputs[output_rows] = self._outputs(rows)
        return outputs

    def _batch_sizes(self, B: int) -> list[int]:
        """Return the sizes that a batch of B examples may shrink to, B first."""
        sizes = [B]
        while len(sizes) <= HALVINGS and sizes[-1] % (2 * self._num_shards) == 0:
            sizes.append(sizes[-1] // 2)
        return sizes

    def _advance_rows(
        self, weights: dict, rows: Any, cache: list, memory: Memory, begin: Array, end: Array
    ) -> tuple[Any, list]:
        """Choose the tokens of positions begin .. end - 1; returns the new rows and cache."""

        def step(tokens: Array, index: Array, cache: Any) -> tuple[Array, Any]:
            return self.net.step(weights, tokens, index, cache, memory)

        special = self.special if self.stop else self.special._replace(eos=decoding.NO_EOS)
        return decoding.advance(step, self.search, rows, cache, begin, end, special)

    def _keep_rows(
        self, rows: Any, cache: list, memory: Memory, keep: Array
    ) -> tuple[Any, list, Memory]:
        """Select the examples `keep`; axis 0 of every array has an equal slice for each example."""

        def select(x: Array) -> Array:
            return x.reshape(len(rows.ended), -1, *x.shape[1:])[keep].reshape(-1, *x.shape[1:])

        return jax.tree.map(select, (rows, cache, memory))
