"""Search for texts: greedy search, sampling and beam search over any step function.

This file knows no model: a model enters as a step function. The step of the network is in
`step.py`, and `generator.py` runs both over whole batches.

A step function takes the tokens [B, R] of R beams for B examples, the position of these tokens and
a cache. It returns the logits [B, R, V] of the next tokens and the new cache. The first axis of
every cache array holds an equal, contiguous slice for each of the B * R beams, in row-major order.

A search keeps the state of B examples in `rows`, a tuple of arrays whose first axis is B. Among
these arrays are

    tokens [B, R, 1 + length]   the start token, the tokens chosen so far, and padding behind them
    ended [B]                   whether the example is complete and no longer changes

No example depends on another, so a caller may drop the ended examples from the batch between two
calls of `advance`. Tokens are int32; which of them start, end and pad a text is an argument.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gqa.model.special_tokens import T5_TOKENS, SpecialTokens

NO_EOS = -1  # no token has this number, so that no text ends early

Step = Callable[[Array, Array, Any], tuple[Array, Any]]


def advance(
    step: Step,
    search: "Search",
    rows: Any,
    cache: Any,
    begin: Int[Array, ""] | int,
    end: Int[Array, ""] | int,
    special: SpecialTokens = T5_TOKENS,
) -> tuple[Any, Any]:
    """Choose the tokens of positions begin .. end - 1; stops early when every example has ended.

    Args:
        rows: the state of the search, as `search.start` or an earlier `advance` returned it.
        cache: the cache of `step`.
        special: the tokens that end and pad a text; with eos = `NO_EOS` no text ends early.

    Returns:
        The new rows and the new cache.
    """

    def unfinished(carry: tuple[Array, Any, Any]) -> Array:
        index, rows, _ = carry
        return (index < end) & ~rows.ended.all()

    def choose(carry: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
        # tokens[..., index] is the token before position `index`, because tokens begin with the
        # start token. The step reads it and gives the logits of position `index`.
        index, rows, cache = carry
        last = jax.lax.dynamic_index_in_dim(rows.tokens, index, axis=2, keepdims=False)
        logits, cache = step(last, index, cache)

        # A search with beams may continue one beam twice and drop another, so the cache follows.
        rows, parents = search.update(rows, logits, index, special)
        if parents is not None:
            cache = _follow(cache, parents)
        return index + 1, rows, cache

    carry = jnp.asarray(begin, jnp.int32), rows, cache
    return jax.lax.while_loop(unfinished, choose, carry)[1:]


def _follow(cache: Any, parents: Array) -> Any:
    """Return the cache in which row b * R + r is the old row b * R + parents[b, r].

    If every beam is its own parent, nothing is copied.
    """
    B, R = parents.shape

    def gather(x: Array) -> Array:
        beams = x.reshape(B, R, -1, *x.shape[1:])
        return jax.vmap(lambda beams, parents: beams[parents])(beams, parents).reshape(x.shape)

    moved = (parents != jnp.arange(R)[None]).any()
    return jax.lax.cond(moved, lambda x: jax.tree.map(gather, x), lambda x: x, cache)


class Texts(NamedTuple):
    """The rows of `Sample`, with R = 1 beam. A row whose number is negative holds no example."""

    numbers: Int[Array, " B"]
    tokens: Int[Array, "B 1 length+1"]
    ended: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw each token from softmax(logits / temperature); temperature 0 takes the likeliest token.

    Tokens are drawn from the `top_k` likeliest tokens (0: from all) and, among these, from the
    smallest set of likeliest tokens whose probabilities sum to `top_p` or more. A draw depends on
    the seed, the position and the example's number only.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_beams = 1

    def start(
        self, numbers: Int[Array, " B"], length: int, special: SpecialTokens = T5_TOKENS
    ) -> Texts:
        """Return the rows of texts that have the start token alone and room for `length` tokens.

        `numbers` number the examples; a negative number stands for no example.
        """
        return Texts(numbers, _empty(len(numbers), 1, length, special), numbers < 0)

    def update(
        self,
        rows: Texts,
        logits: Float[Array, "B 1 V"],
        index: Int[Array, ""],
        special: SpecialTokens,
    ) -> tuple[Texts, None]:
        """Append a token at position `index`; returns the new rows, and no parents of beams."""
        chosen = self._choose(logits[:, 0], rows.numbers, index)
        chosen = jnp.where(rows.ended, special.pad, chosen)
        tokens = _put(rows.tokens, chosen[:, None], index)
        return rows._replace(tokens=tokens, ended=rows.ended | (chosen == special.eos)), None

    def _choose(self, logits: Array, numbers: Array, index: Array) -> Array:
        """Choose a token [B] from each row of logits [B, V]."""
        if self.temperature == 0:
            return _arg_max(logits)

        # With `top_k`, logits are those of the k likeliest tokens, whose ids are in `tokens`.
        tokens = None
        if self.top_k:
            logits, tokens = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))
        logits = _nucleus(logits / self.temperature, self.top_p)

        # One key for each (seed, position, example): a draw does not depend on the other examples
        # of the batch, so texts do not change with the batch size.
        key = jax.random.fold_in(jax.random.key(self.seed), index)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

        # The arg max of logits plus Gumbel noise is a draw from the logits' softmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        chosen = _arg_max(logits + noise)
        return chosen if tokens is None else _take(tokens, chosen[:, None])[:, 0]

    def outputs(self, rows: Texts) -> Int[Array, "B length"]:
        """Return the texts, with padding behind the end of each."""
        return rows.tokens[:, 0, 1:]


GREEDY = Sample(temperature=0.0)


class Beams(NamedTuple):
    """The rows of `Beam`: R unfinished texts, and the best finished text, for each example.

    tokens, scores: the unfinished texts and the sums of their tokens' log-probabilities.
    best, best_score: the best finished text, and its log-probability divided by its length
        penalty; -inf if no text has ended yet.
    ended: whether the example is complete.
    """

    tokens: Int[Array, "B R length+1"]
    scores: Float[Array, "B R"]
    best: Int[Array, "B length+1"]
    best_score: Float[Array, " B"]
    ended: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Beam:
    """Beam search as in T5: n tokens score log-probability / ((5 + n) / 6) ** length_penalty.

    The token that ends a text counts among its n tokens (Wu et al., 2016, section 7; T5X's
    decoding.py). Of the 2R best continuations of an example, those that end compete for the best
    text, and the best R of the others go on. An example has ended when none of the R texts that go
    on can become better than the best finished text, even at the greatest length.
    """

    num_beams: int
    length_penalty: float

    def start(
        self, numbers: Int[Array, " B"], length: int, special: SpecialTokens = T5_TOKENS
    ) -> Beams:
        """Return the rows of beams that have the start token alone and room for `length` tokens.

        A negative number stands for no example; the numbers have no other meaning here.
        """
        B, R = len(numbers), self.num_beams
        tokens = _empty(B, R, length, special)
        # All beams begin with the same text, so only the first beam may be continued.
        scores = jnp.full((B, R), -jnp.inf, jnp.float32)
        return Beams(tokens, scores.at[:, 0].set(0), tokens[:, 0], scores[:, 0], numbers < 0)

    def update(
        self,
        rows: Beams,
        logits: Float[Array, "B R V"],
        index: Int[Array, ""],
        special: SpecialTokens,
    ) -> tuple[Beams, Int[Array, "B R"]]:
        """Append a token at position `index`.

        Returns the new rows and, for each new beam, the old beam whose text it continues.
        """
        parents, chosen, scores = self._continuations(rows.scores, logits)
        ends = chosen == special.eos

        # The texts that go on. Each beam has one continuation that ends, so at most R of the 2R end
        # and R others are left.
        going, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), self.num_beams)
        parents_kept, chosen_kept = _take(parents, kept), _take(chosen, kept)
        tokens = _put(_take(rows.tokens, parents_kept), chosen_kept, index)

        # The best of the texts that end here replaces a worse finished text.
        ended_scores = jnp.where(ends, scores / self._penalty(index + 1), -jnp.inf)
        top = ended_scores.argmax(-1, keepdims=True)
        text = _put(_take(rows.tokens, _take(parents, top)), _take(chosen, top), index)[:, 0]
        score = _take(ended_scores, top)[:, 0]
        better = score > rows.best_score
        best = jnp.where(better[:, None], text, rows.best)
        best_score = jnp.where(better, score, rows.best_score)

        # Log-probabilities only fall, so a score at the greatest length bounds all later scores.
        length = tokens.shape[2] - 1
        ended = best_score >= going.max(-1) / self._penalty(length)
        new = Beams(tokens, going, best, best_score, ended)

        # An ended example keeps its rows, and each of its beams is its own parent.
        unmoved = jnp.broadcast_to(jnp.arange(self.num_beams), kept.shape)
        return _unless(rows.ended, new, rows), _unless(rows.ended, parents_kept, unmoved)

    def _continuations(self, scores: Array, logits: Array) -> tuple[Array, Array, Array]:
        """Return the best 2R of all R * V continuations: beams, tokens and scores [B, 2R].

        The best continuation comes first.
        """
        B, R, V = logits.shape

        # No beam can have more than 2R of the best 2R continuations. So each beam's best 2R are
        # taken first, and the best 2R among these R * 2R are those among all R * V.
        each = min(2 * R, V)
        top, tokens = jax.lax.top_k(logits, each)
        top += (scores - jax.nn.logsumexp(logits, axis=-1))[:, :, None]
        scores, places = jax.lax.top_k(top.reshape(B, R * each), 2 * R)
        return places // each, _take(tokens.reshape(B, R * each), places), scores

    def _penalty(self, length: Array | int) -> Array | float:
        """Return the number that the log-probability of a text of `length` tokens is divided by."""
        return ((5 + length) / 6) ** self.length_penalty

    def outputs(self, rows: Beams) -> Int[Array, "B length"]:
        """Return the best finished text of each example, with padding behind its end.

        If no text of an example has ended, its best unfinished text is returned.
        """
        so_far = _take(rows.tokens, rows.scores.argmax(-1, keepdims=True))[:, 0]
        has_ended = (rows.best_score > -jnp.inf)[:, None]
        return jnp.where(has_ended, rows.best, so_far)[:, 1:]


Search = Sample | Beam


def beam_search(num_beams: int, length_penalty: float) -> Search:
    """Return beam search, or greedy search if `num_beams` is 1.

    With one beam, T5's rules would continue the best unfinished text after a text has ended.
    """
    return Beam(num_beams, length_penalty) if num_beams > 1 else GREEDY


def search_of(options: Any, seed: int) -> Search:
    """Return the search that settings or parsed flags describe.

    Args:
        options: an object with the attributes `search` ("greedy", "beam" or "sample"), `num_beams`,
            `length_penalty`, `temperature`, `top_k` and `top_p`. The search reads those it has.
        seed: of sampling.
    """
    if options.search == "beam":
        return beam_search(options.num_beams, options.length_penalty)
    if options.search == "sample":
        return Sample(options.temperature, options.top_k, options.top_p, seed)
    return GREEDY


def _empty(B: int, R: int, length: int, special: SpecialTokens = T5_TOKENS) -> Array:
    """Return texts [B, R, 1 + length] of the start token alone, with padding behind it."""
    return jnp.full((B, R, 1 + length), special.pad, jnp.int32).at[:, :, 0].set(special.start)


def _arg_max(x: Array) -> Array:
    """Return the index of the first maximum along the last axis of x [..., V].

    On CPUs this is ten times as fast as `jnp.argmax`.
    """
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(x == x.max(-1, keepdims=True), places, x.shape[-1] - 1).min(-1)


def _nucleus(logits: Array, top_p: float) -> Array:
    """Return logits [B, V] with -inf for every token outside the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities sum to `top_p` or more.
    The least probability in the nucleus is searched by bisection, which, unlike a sum over sorted
    probabilities, does not sort the vocabulary.
    """
    if top_p == 1:
        return logits
    probability = jax.nn.softmax(logits)

    # Invariant: tokens with a probability of at least `low` sum to `top_p` or more.
    def bisect(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        total = jnp.where(probability >= middle[:, None], probability, 0).sum(-1)
        enough = total >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bounds = jnp.zeros(len(logits)), probability.max(-1)
    low, _ = jax.lax.fori_loop(0, 32, bisect, bounds)
    return jnp.where(probability >= low[:, None], logits, -jnp.inf)


def _put(tokens: Array, chosen: Array, index: Array) -> Array:
    """Write `chosen` [B, R] into tokens [B, R, 1 + length] at `index`, not counting the start."""
    return jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, :, None], index + 1, axis=2)


def _take(x: Array, indices: Array) -> Array:
    """Return x[b, indices[b, i]] for every b and i, for x [B, R, ...] and indices [B, I]."""
    return jax.vmap(lambda x, indices: x[indices])(x, indices)


def _unless(ended: Array, new: Any, old: Any) -> Any:
    """Select, for each example, the rows of `old` if it has ended, else the rows of `new`."""

    def select(new: Array, old: Array) -> Array:
        return jnp.where(ended.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    return jax.tree.map(select, new, old)
