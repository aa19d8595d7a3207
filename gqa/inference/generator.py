"""Text from a network: decoding in segments, over arrays no larger than what is left to do."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa.inference import decoding
from gqa.inference.decoding import Search
from gqa.inference.step import Inference, Memory
from gqa.model.transformer import init_params
from gqa.runtime import sharding

SHORTEST = 64  # the smallest bucket of lengths
EVERY = 32  # positions after which the rows that ended are looked for
HALVINGS = 3  # of a batch whose rows end


def bucket(length: int, longest: int) -> int:
    """The first of 64, 128, 256 ... `longest` that is `length` or more."""
    size = SHORTEST
    while size < length:
        size *= 2
    return min(size, longest)


class _Placed(NamedTuple):
    """Where the arrays of a generator lie, and in how many parts a batch; None: JAX decides."""

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
    """`search` over `net`: texts of up to `length` tokens, filled to `length` if not `stop`.

        generate = Generator(Inference(config), GREEDY, length=512)
        weights = generate.prepare(params)                              once a checkpoint
        tokens = generate(weights, inputs)                              prefill, then decode

    Self-attention reads a cache of the current length's bucket. When the examples that go on fit
    half of the batch, the others are left out of it, down to an eighth. So decoding is compiled
    for at most 4 batch sizes times 1 + log2(length / 64) lengths, for each shape of inputs.

    With a `mesh`, which is also `jax.set_mesh`'s, everything lies as `net.layout` says, and a batch
    is never made smaller than the parts it is split into. On a mesh of several processes each gives
    the same inputs and gets all tokens.
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
        """Tokens [B, length] for inputs [B, S]; see `decode`."""
        if self._rows is not None:
            inputs = sharding.put(inputs, self._rows)
        return self.decode(weights, self.prefill(weights, inputs), numbers)

    def decode(
        self, weights: dict, memory: Memory, numbers: np.ndarray | None = None
    ) -> np.ndarray:
        """Tokens [B, length] for what `prefill` gave, 0 behind the end of a text.

        `numbers` [B] are the examples' numbers in draws, by default 0 .. B - 1; rows of a negative
        number stand for no example and stay 0.
        """
        B = len(memory.mask)
        numbers = np.arange(B) if numbers is None else np.asarray(numbers)
        outputs = np.zeros((B, self.length), np.int32)
        places, ended = np.arange(B), numbers < 0  # of the rows that are left
        rows = self._start(numbers.astype(np.int32))
        cache = self._init_cache(B, self.search.num_beams, bucket(1, self.length))
        sizes = self._batch_sizes(B)
        begin = 0
        while begin < self.length and not ended.all():
            size = min(size for size in sizes if size >= (~ended).sum())
            if size < len(places):
                outputs[places] = self._outputs(rows)
                keep = np.argsort(ended, kind="stable")[:size]  # those that go on come first
                rows, cache, memory = self._keep(rows, cache, memory, keep)
                places, ended = places[keep], ended[keep]
            room = bucket(begin + 1, self.length)
            if self.net.room(cache) < room:
                cache = self._grow(cache, room)
            end = min(begin + EVERY, room) if self.stop else room
            rows, cache = self._advance(weights, rows, cache, memory, begin, end)
            begin = end
            if self.stop:
                ended = np.asarray(self._ended(rows))
        outputs[places] = self._outputs(rows)
        return outputs

    def _batch_sizes(self, B: int) -> list[int]:
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
        """All arrays, each with equal parts for each example, with the examples `keep` alone."""

        def part(x: Array) -> Array:
            return x.reshape(len(rows.ended), -1, *x.shape[1:])[keep].reshape(-1, *x.shape[1:])

        return jax.tree.map(part, (rows, cache, memory))
