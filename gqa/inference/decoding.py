"""Search over a step function; knows no model.

A step takes the tokens [B, R] of R beams, their position and a cache, and gives logits [B, R, V] of
the next token and the new cache; of every cache array's first axis each of the B * R tokens has an
equal part, in their order.

A search keeps what it has of B examples in `rows`: arrays whose first axis is B, among them

    tokens [B, R, 1 + length]   chosen so far, behind the start token 0
    ended [B]                   the example is complete and no longer changes

Examples know nothing of each other, so a caller may leave out those that have ended, between one
`advance` and the next. Tokens are int32; 0 is padding and 1 ends a text.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

EOS = 1
NO_EOS = -1  # for texts that end at no token

Step = Callable[[Array, Array, Any], tuple[Array, Any]]


def advance(
    step: Step, search: "Search", rows: Any, cache: Any, begin: Array, end: Array, eos: int = EOS
) -> tuple[Any, Any]:
    """Choose the tokens of positions begin .. end - 1; ends early when every example has ended."""

    def unfinished(carry):
        index, rows, _ = carry
        return (index < end) & ~rows.ended.all()

    def choose(carry):
        index, rows, cache = carry
        last = jax.lax.dynamic_index_in_dim(rows.tokens, index, axis=2, keepdims=False)
        logits, cache = step(last, index, cache)
        rows, parents = search.update(rows, logits, index, eos)
        if parents is not None:
            cache = _follow(cache, parents)
        return index + 1, rows, cache

    carry = jnp.asarray(begin, jnp.int32), rows, cache
    return jax.lax.while_loop(unfinished, choose, carry)[1:]


def _follow(cache: Any, parents: Array) -> Any:
    """The cache with row b * R + parents[b, r] as row b * R + r, which costs nothing if it is."""
    B, R = parents.shape

    def gather(x: Array) -> Array:
        beams = x.reshape(B, R, -1, *x.shape[1:])
        return jax.vmap(lambda beams, parents: beams[parents])(beams, parents).reshape(x.shape)

    moved = (parents != jnp.arange(R)[None]).any()
    return jax.lax.cond(moved, lambda x: jax.tree.map(gather, x), lambda x: x, cache)


class Texts(NamedTuple):
    """Rows of `Sample`, with R = 1. Negative `numbers` [B] stand for no example at all."""

    numbers: Array
    tokens: Array
    ended: Array


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw each token from softmax(logits / temperature); temperature 0 takes the most likely one.

    Drawn are only the `top_k` most likely tokens (0: all) and of these the fewest whose
    probabilities sum to `top_p`. A draw depends on the seed, the position and the example's number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_beams = 1

    def start(self, numbers: Array, length: int) -> Texts:
        tokens = jnp.zeros((len(numbers), 1, 1 + length), jnp.int32)
        return Texts(numbers, tokens, numbers < 0)

    def update(self, rows: Texts, logits: Array, index: Array, eos: int) -> tuple[Texts, None]:
        chosen = jnp.where(rows.ended, 0, self._choose(logits[:, 0], rows.numbers, index))
        tokens = _put(rows.tokens, chosen[:, None], index)
        return rows._replace(tokens=tokens, ended=rows.ended | (chosen == eos)), None

    def _choose(self, logits: Array, numbers: Array, index: Array) -> Array:
        """A token [B] of each row of logits [B, V]."""
        if self.temperature == 0:
            return _arg_max(logits)
        tokens = None
        if self.top_k:
            logits, tokens = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))
        logits = _nucleus(logits / self.temperature, self.top_p)
        key = jax.random.fold_in(jax.random.key(self.seed), index)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        # The greatest of logits with Gumbel noise is a draw from their softmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        chosen = _arg_max(logits + noise)
        return chosen if tokens is None else _take(tokens, chosen[:, None])[:, 0]

    def outputs(self, rows: Texts) -> Array:
        """The texts [B, length], 0 behind their end."""
        return rows.tokens[:, 0, 1:]


GREEDY = Sample(temperature=0.0)


class Beams(NamedTuple):
    """Rows of `Beam`: R texts that go on, and the best that ended.

    scores [B, R] are sums of log-probabilities, best [B, 1 + length], best_score [B] is one divided
    by its length penalty, -inf if no text has ended yet.
    """

    tokens: Array
    scores: Array
    best: Array
    best_score: Array
    ended: Array


@dataclasses.dataclass(frozen=True)
class Beam:
    """Beam search as in T5: n tokens score log-probability / ((5 + n) / 6) ** length_penalty.

    A text's end counts among its n tokens (Wu et al., 2016, section 7; T5X's decoding.py). Of the
    2R best continuations those that end compete for the best text, R of the others go on. An
    example has ended when none of these can become better, even at the greatest length.
    """

    num_beams: int
    length_penalty: float

    def start(self, numbers: Array, length: int) -> Beams:
        B, R = len(numbers), self.num_beams
        tokens = jnp.zeros((B, R, 1 + length), jnp.int32)
        # All beams begin alike, so only the first may be continued.
        scores = jnp.full((B, R), -jnp.inf, jnp.float32)
        return Beams(tokens, scores.at[:, 0].set(0), tokens[:, 0], scores[:, 0], numbers < 0)

    def update(self, rows: Beams, logits: Array, index: Array, eos: int) -> tuple[Beams, Array]:
        parents, chosen, scores = self._continuations(rows.scores, logits)
        ends = chosen == eos

        # A beam has one continuation that ends, so at most R of the 2R do.
        going, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), self.num_beams)
        parents_kept, chosen_kept = _take(parents, kept), _take(chosen, kept)
        tokens = _put(_take(rows.tokens, parents_kept), chosen_kept, index)

        ended_scores = jnp.where(ends, scores / self._penalty(index + 1), -jnp.inf)
        top = ended_scores.argmax(-1, keepdims=True)
        text = _put(_take(rows.tokens, _take(parents, top)), _take(chosen, top), index)[:, 0]
        score = _take(ended_scores, top)[:, 0]
        better = score > rows.best_score
        best = jnp.where(better[:, None], text, rows.best)
        best_score = jnp.where(better, score, rows.best_score)

        length = tokens.shape[2] - 1
        ended = best_score >= going.max(-1) / self._penalty(length)
        new = Beams(tokens, going, best, best_score, ended)
        return _unless(rows.ended, new, rows), _unless(
            rows.ended, parents_kept, jnp.broadcast_to(jnp.arange(self.num_beams), kept.shape)
        )

    def _continuations(self, scores: Array, logits: Array) -> tuple[Array, Array, Array]:
        """The 2R best of all R * V: beams, tokens and scores [B, 2R], best first."""
        B, R, V = logits.shape
        each = min(2 * R, V)  # no beam has more among them
        top, tokens = jax.lax.top_k(logits, each)
        top += (scores - jax.nn.logsumexp(logits, axis=-1))[:, :, None]
        scores, places = jax.lax.top_k(top.reshape(B, R * each), 2 * R)
        return places // each, _take(tokens.reshape(B, R * each), places), scores

    def _penalty(self, length: Array | int) -> Array:
        return ((5 + length) / 6) ** self.length_penalty

    def outputs(self, rows: Beams) -> Array:
        """The best texts [B, length], 0 behind their end; where none ended, the best so far."""
        so_far = _take(rows.tokens, rows.scores.argmax(-1, keepdims=True))[:, 0]
        has_ended = (rows.best_score > -jnp.inf)[:, None]
        return jnp.where(has_ended, rows.best, so_far)[:, 1:]


Search = Sample | Beam


def beam_search(num_beams: int, length_penalty: float) -> Search:
    """`Beam`, or greedy search for one beam, which T5's rules would let go on behind its end."""
    return Beam(num_beams, length_penalty) if num_beams > 1 else GREEDY


def _arg_max(x: Array) -> Array:
    """The first place of the greatest of x [..., V]; ten times as fast as XLA's own on CPUs."""
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(x == x.max(-1, keepdims=True), places, x.shape[-1] - 1).min(-1)


def _nucleus(logits: Array, top_p: float) -> Array:
    """Logits [B, V], -inf but for the fewest most likely tokens that have `top_p` together.

    The probability of the least likely of them is found by halving: it needs no sorted vocabulary.
    """
    if top_p == 1:
        return logits
    probability = jax.nn.softmax(logits)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        together = jnp.where(probability >= middle[:, None], probability, 0).sum(-1)
        enough = together >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bounds = jnp.zeros(len(logits)), probability.max(-1)
    low, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(probability >= low[:, None], logits, -jnp.inf)


def _put(tokens: Array, chosen: Array, index: Array) -> Array:
    """tokens [B, R, 1 + length] with chosen [B, R] at position `index`, behind the start token."""
    return jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, :, None], index + 1, axis=2)


def _take(x: Array, places: Array) -> Array:
    """x[b, places[b, r]] for x [B, R, ...] and places [B, any number]."""
    return jax.vmap(lambda x, places: x[places])(x, places)


def _unless(ended: Array, new: Any, old: Any) -> Any:
    """Each example's `old` where it has ended, else `new`."""

    def select(new: Array, old: Array) -> Array:
        return jnp.where(ended.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    return jax.tree.map(select, new, old)
