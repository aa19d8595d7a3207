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
        inputs: token ids; 0 is padding.
        max_length: number of tokens of the longest text.
        search: `GREEDY`, `Sample` or `Beam` of `gqa.inference.decoding`.
        stop: whether a text ends at the token 1. If not, every text has `max_length` tokens.

    Returns:
        Token ids, 0 behind the end of a text.
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


class _Placed(NamedTuple):
    """How a mesh splits the arrays of a generator; None: JAX decides.

    `parts` is the number of parts that a batch is split into.
    """

    parts: int = 1
    whole: NamedSharding | None = None
    rows: NamedSharding | None = None
    weights: Any = None
    cache: list[NamedSharding] | None = None
    memory: Memory | None = None


def _placed(net: Inference, mesh: Mesh) -> _Placed:
    whole = NamedSharding(mesh, PartitionSpec())
    rows, caches = (
        sharding.batch_sharding(mesh),
        sharding.cache_sharding(net.config, mesh, net.layout, net.fused),
    )
    if net.layout.model > 1:
        shapes = jax.eval_shape(lambda: net.prepare(init_params(net.config, 0)))
        # Weights that "data" splits would be gathered again for every token.
        layout = dataclasses.replace(net.layout, fsdp=False)
        weights = sharding.param_shardings(shapes, mesh, layout)
    else:
        weights = whole
    parts = max(map(sharding.num_parts, (rows, *caches.own, *caches.cross)))
    return _Placed(parts, whole, rows, weights, caches.own, Memory(caches.cross, caches.mask))


class Generator:
    """Generates texts of up to `length` tokens by a `search` over `net`.

        generate = Generator(Inference(config), GREEDY, length=512)
        weights = generate.prepare(params)                              once a checkpoint
        tokens = generate(weights, inputs)                              prefill, then decode

    If `stop` is False, texts do not end at the token 1 and all have `length` tokens.

    Self-attention reads a cache whose capacity is the current length's `bucket`. When the
    unfinished examples fit into half of the batch, the batch is halved, at most three times. So
    decoding is compiled for at most 4 batch sizes times 1 + log2(length / 64) capacities, for each
    shape of inputs.

    With a `mesh`, the arrays are split as `net.layout` says, and a batch is never made smaller than
    the number of parts it is split into. Call the generator under `jax.set_mesh(mesh)`. On a mesh
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
        at = _Placed() if mesh is None else _placed(net, mesh)
        self._parts, self._rows = at.parts, at.rows
        prefill = partial(net.prefill, num_beams=search.num_beams)
        self.prepare = jax.jit(net.prepare, out_shardings=at.weights)
        self.prefill = jax.jit(prefill, in_shardings=(at.weights, at.rows), out_shardings=at.memory)
        self._start = jax.jit(partial(search.start, length=length), out_shardings=at.rows)
        self._init_cache = jax.jit(net.init_cache, static_argnums=(0, 1, 2), out_shardings=at.cache)
        self._grow = jax.jit(net.grow, static_argnums=1, out_shardings=at.cache)
        kept = None if mesh is None else (at.rows, at.cache, at.memory)
        self._keep = jax.jit(self._keep_rows, out_shardings=kept)
        self._advance = jax.jit(
            self._advance_rows, donate_argnames="cache", out_shardings=kept and kept[:2]
        )
        self._outputs = jax.jit(search.outputs, out_shardings=at.whole)
        self._ended = jax.jit(lambda rows: rows.ended, out_shardings=at.whole)

    def __call__(
        self, weights: dict, inputs: Array, numbers: np.ndarray | None = None
    ) -> np.ndarray:
        """Generate tokens [B, length] for inputs [B, S]; see `decode`."""
        if self._rows is not None:
            inputs = sharding.put(inputs, self._rows)
        return self.decode(weights, self.prefill(weights, inputs), numbers)

    def decode(
        self, weights: dict, memory: Memory, numbers: np.ndarray | None = None
    ) -> np.ndarray:
        """Generate tokens [B, length] from the result of `prefill`, 0 behind the end of a text.

        `numbers` [B] decide, with the seed, what `Sample` draws for each example; by default they
        are 0 .. B - 1. A row with a negative number stands for no example, and its tokens stay 0.
        """
        B = len(memory.mask)
        numbers = np.arange(B) if numbers is None else np.asarray(numbers)
        outputs = np.zeros((B, self.length), np.int32)

        # For each row that is still in the batch: its place in `outputs`, and whether it has ended.
        places, ended = np.arange(B), numbers < 0
        rows = self._start(numbers.astype(np.int32))
        cache = self._init_cache(B, self.search.num_beams, bucket(1, self.length))
        sizes = self._batch_sizes(B)
        begin = 0

        while begin < self.length and not ended.all():
            # Shrink the batch if the unfinished examples fit a smaller one.
            size = min(size for size in sizes if size >= (~ended).sum())
            if size < len(places):
                outputs[places] = self._outputs(rows)
                keep = np.argsort(ended, kind="stable")[:size]  # unfinished examples come first
                rows, cache, memory = self._keep(rows, cache, memory, keep)
                places, ended = places[keep], ended[keep]

            capacity = bucket(begin + 1, self.length)
            if self.net.capacity(cache) < capacity:
                cache = self._grow(cache, capacity)

            # Without `stop` no example ends, so there is nothing to look for before the cache is
            # full.
            end = min(begin + EVERY, capacity) if self.stop else capacity
            rows, cache = self._advance(weights, rows, cache, memory, begin, end)
            begin = end
            if self.stop:
                ended = np.asarray(self._ended(rows))

        outputs[places] = self._outputs(rows)
        return outputs

    def _batch_sizes(self, B: int) -> list[int]:
        """Return the sizes that a batch of B examples may shrink to, B first."""
        sizes = [B]
        while len(sizes) <= HALVINGS and sizes[-1] % (2 * self._parts) == 0:
            sizes.append(sizes[-1] // 2)
        return sizes

    def _advance_rows(self, weights, rows, cache, memory, begin, end):
        def step(tokens, index, cache):
            return self.net.step(weights, tokens, index, cache, memory)

        eos = decoding.EOS if self.stop else decoding.NO_EOS
        return decoding.advance(step, self.search, rows, cache, begin, end, eos)

    def _keep_rows(self, rows, cache, memory, keep: Array):
        """Select the examples `keep`; axis 0 of every array has an equal slice for each example."""

        def part(x: Array) -> Array:
            return x.reshape(len(rows.ended), -1, *x.shape[1:])[keep].reshape(-1, *x.shape[1:])

        return jax.tree.map(part, (rows, cache, memory))
