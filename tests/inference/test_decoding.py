"""Test searches over scripted steps, and over small languages whose texts can be enumerated."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.data.tokenizer import EOS
from gqa.inference.decoding import GREEDY, NO_EOS, Beam, Sample, advance, beam_search
from gqa.model.special_tokens import SpecialTokens

BEAM = Beam(num_beams=3, length_penalty=0.6)


def scripted(script):
    """Return a step that makes script[b][index] the likeliest token of example b.

    The cache of the step counts its calls.
    """
    script = jnp.array(script)

    def step(tokens, index, cache):
        likely = jax.nn.one_hot(script[:, None, index], 10) * 50
        return jnp.broadcast_to(likely, (*tokens.shape, 10)), cache + 1

    return step


def language(B, V, length, seed=0):
    """Return a step whose next-token probabilities depend on all tokens so far.

    Also returned are the table [B, prefixes, V] of log-probabilities, and a function from R to the
    empty cache of R beams. The cache holds the number of each beam's prefix.
    """
    table = np.random.default_rng(seed).normal(size=(B, V ** (length + 1), V)) * 1.5
    table = np.array(jax.nn.log_softmax(table), np.float32)
    logits = jnp.asarray(table) + 3  # a step need not return normalised logits

    def step(tokens, index, prefix):
        prefix = prefix * V + tokens.reshape(-1) + 1
        rows = jnp.repeat(jnp.arange(B), tokens.shape[1])
        return logits[rows, prefix].reshape(*tokens.shape, V), prefix

    return step, table, lambda R: jnp.zeros(B * R, jnp.int32)


def log_probability(table, text):
    """Return the log-probability of a text with its end token, from an example's table."""
    total, prefix = 0.0, 1  # behind the start token
    for token in text:
        total += table[prefix, token]
        prefix = prefix * table.shape[1] + token + 1
    return total


@functools.partial(jax.jit, static_argnames=("step", "search", "B", "length", "eos"))
def run(step, search, cache, B, length, eos=EOS):
    rows = search.start(jnp.arange(B), length)
    return advance(step, search, rows, cache, 0, length, SpecialTokens(eos=eos))


def texts(step, search, cache, B, length, eos=EOS):
    return np.asarray(search.outputs(run(step, search, cache, B, length, eos)[0]))


def strip(row):
    """Return the text of an output row, up to and with its end token if it has one."""
    row = [int(token) for token in row]
    return tuple(row[: row.index(EOS) + 1] if EOS in row else row)


@pytest.mark.parametrize("search", [GREEDY, BEAM], ids=["greedy", "beam"])
class TestEnds:
    SCRIPT = ((5, 1, 6, 6, 6), (3, 4, 1, 7, 7))

    def test_rows_pad_behind_their_end(self, search):
        outputs = texts(scripted(self.SCRIPT), search, jnp.zeros(2 * search.num_beams), 2, 5)
        np.testing.assert_array_equal(outputs, [[5, 1, 0, 0, 0], [3, 4, 1, 0, 0]])

    def test_the_last_row_that_ends_ends_the_search(self, search):
        _, calls = run(scripted(self.SCRIPT), search, jnp.zeros(2 * search.num_beams), 2, 5)
        np.testing.assert_array_equal(calls, 3)

    def test_without_an_end_every_position_is_filled(self, search):
        cache = jnp.zeros(2 * search.num_beams)
        outputs = texts(scripted(self.SCRIPT), search, cache, 2, 5, NO_EOS)
        np.testing.assert_array_equal(outputs, self.SCRIPT)

    def test_rows_of_no_example_ask_for_nothing(self, search):
        step, cache = scripted(self.SCRIPT), jnp.zeros(2 * search.num_beams)
        rows = search.start(jnp.array([0, -1]), 5)
        rows, calls = advance(step, search, rows, cache, 0, 5)
        np.testing.assert_array_equal(search.outputs(rows), [[5, 1, 0, 0, 0], [0] * 5])
        np.testing.assert_array_equal(calls, 2)


SEARCHES = [GREEDY, Sample(seed=3), Sample(0.7, top_k=3, top_p=0.9), BEAM, Beam(2, 0.0)]


@pytest.mark.parametrize("search", SEARCHES)
def test_examples_do_not_know_of_each_other(search):
    """Running in segments, and dropping ended examples in between, changes no text."""
    B, V, length = 6, 4, 5
    step, _, empty = language(B, V, length)
    R = search.num_beams
    expected = texts(step, search, empty(R), B, length)

    rows, cache = advance(step, search, search.start(jnp.arange(B), length), empty(R), 0, 2)
    keep = np.flatnonzero(~rows.ended)[::-1]
    rows = jax.tree.map(lambda x: x[keep], rows)
    cache = cache.reshape(B, R)[keep].reshape(-1)

    def kept_step(tokens, index, prefix):
        whole = jnp.zeros((B, R), jnp.int32)
        tokens, prefix = whole.at[keep].set(tokens), whole.at[keep].set(prefix.reshape(-1, R))
        logits, prefix = step(tokens, index, prefix.reshape(-1))
        return logits[keep], prefix.reshape(B, R)[keep].reshape(-1)

    rows, _ = advance(kept_step, search, rows, cache, 2, length)
    assert 1 < len(keep) < B
    np.testing.assert_array_equal(search.outputs(rows), expected[keep])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_enough_beams_find_the_best_of_all_texts(alpha):
    B, V, length = 60, 4, 4
    step, table, empty = language(B, V, length)
    search = Beam(num_beams=54, length_penalty=alpha)  # as many as the last position's 27 * 4 need
    rows, _ = run(step, search, empty(54), B, length)
    others = [token for token in range(V) if token != EOS]
    endings = [(*text, EOS) for n in range(length) for text in itertools.product(others, repeat=n)]
    for example, row in enumerate(search.outputs(rows)):
        scores = {
            text: log_probability(table[example], text) / ((5 + len(text)) / 6) ** alpha
            for text in endings
        }
        best = max(scores, key=scores.get)
        assert strip(row) == best
        assert rows.best_score[example] == pytest.approx(scores[best], rel=1e-5)
    assert len({len(strip(row)) for row in search.outputs(rows)}) > 1


def t5_beam_search(table, num_beams, alpha, length):
    """Apply T5's rules to one example, with a list of up to `num_beams` finished texts."""

    def penalty(n):
        return ((5 + n) / 6) ** alpha

    live, finished = [((), 0.0)], []
    for n in range(1, length + 1):
        texts = [(*text, token) for text, _ in live for token in range(table.shape[1])]
        scored = [(text, log_probability(table, text)) for text in texts]
        best = sorted(scored, key=lambda item: -item[1])[: 2 * num_beams]
        finished += [(text, score / penalty(n)) for text, score in best if text[-1] == EOS]
        finished = sorted(finished, key=lambda item: -item[1])[:num_beams]
        live = [item for item in best if item[0][-1] != EOS][:num_beams]
        if len(finished) == num_beams and finished[-1][1] > live[0][1] / penalty(length):
            break
    return (finished or live)[0][0]


@pytest.mark.parametrize("search", [BEAM, Beam(2, 0.0), Beam(4, 2.0)])
def test_beam_search_is_that_of_t5(search):
    """Keeping only the best finished text, and ending as soon as it is safe, changes nothing."""
    B, V, length = 40, 5, 4
    step, table, empty = language(B, V, length, seed=1)
    rows, _ = run(step, search, empty(search.num_beams), B, length)
    chosen = [strip(row) for row in search.outputs(rows)]
    assert chosen == [
        t5_beam_search(t, search.num_beams, search.length_penalty, length) for t in table
    ]
    greedy = [strip(row) for row in texts(step, GREEDY, empty(1), B, length)]
    assert sum(one != other for one, other in zip(chosen, greedy, strict=True)) > 5
    assert (
        not rows.ended.all()
    )  # some examples have no finished text, or none that is sure to stay the best
    scores = [log_probability(t, text) for t, text in zip(table, chosen, strict=True)]
    lengths = np.array([len(text) for text in chosen])
    scores /= ((5 + lengths) / 6) ** search.length_penalty
    has_ended = np.array([EOS in text for text in chosen])
    np.testing.assert_allclose(rows.best_score[has_ended], scores[has_ended], rtol=1e-5)


def test_where_no_text_can_end_the_best_so_far_is_taken():
    B, V, length = 4, 5, 4
    step, table, empty = language(B, V, length)

    def endless(tokens, index, prefix):
        logits, prefix = step(tokens, index, prefix)
        return logits.at[:, :, EOS].set(-jnp.inf), prefix

    outputs = texts(endless, Beam(64, 0.6), empty(64), B, length)
    others = [token for token in range(V) if token != EOS]
    for example, row in enumerate(outputs):
        scores = {
            text: log_probability(table[example] - np.log(1 - np.exp(table[example, :, 1:2])), text)
            for text in itertools.product(others, repeat=length)
        }
        assert strip(row) == max(scores, key=scores.get)


def test_one_beam_is_greedy_search():
    assert beam_search(1, 0.6) == GREEDY
    assert beam_search(4, 0.6) == Beam(4, 0.6)


GREEDY_LIMITS = [Sample(temperature=1e-4), Sample(top_k=1), Sample(top_p=1e-6)]


@pytest.mark.parametrize("search", GREEDY_LIMITS)
def test_the_limits_of_sampling_are_greedy(search):
    B, V, length = 12, 5, 4
    step, table, empty = language(B, V, length)
    outputs = texts(step, search, empty(1), B, length)
    np.testing.assert_array_equal(outputs, texts(step, GREEDY, empty(1), B, length))
    np.testing.assert_array_equal(outputs[:, 0], table[:, 1].argmax(-1))


PROBABILITY = np.array([0.05, 0.1, 0.4, 0.15, 0.3])


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        (Sample(), PROBABILITY),
        (Sample(temperature=0.5), PROBABILITY**2 / (PROBABILITY**2).sum()),
        (Sample(top_k=2), np.array([0, 0, 4, 0, 3]) / 7),
        (Sample(top_p=0.65), np.array([0, 0, 4, 0, 3]) / 7),
        (Sample(top_p=0.75), np.array([0, 0, 8, 3, 6]) / 17),
        # Of the three most likely, renormalised, the first two reach 0.8.
        (Sample(top_k=3, top_p=0.8), np.array([0, 0, 4, 0, 3]) / 7),
    ],
)
def test_tokens_are_as_frequent_as_they_should_be(search, expected):
    B, length = 500, 8

    def step(tokens, index, cache):
        return jnp.broadcast_to(jnp.log(PROBABILITY) - 2, (*tokens.shape, 5)), cache

    outputs = texts(step, search, jnp.zeros(B), B, length, NO_EOS)
    count = np.bincount(outputs.ravel(), minlength=5)
    error = np.sqrt(expected * (1 - expected) * outputs.size)
    assert (abs(count - expected * outputs.size) <= 4 * error).all()
    # Draws of different rows and positions are independent.
    assert (outputs[1:] == outputs[:-1]).mean() == pytest.approx((expected**2).sum(), abs=0.05)
    assert (outputs[:, 1:] == outputs[:, :-1]).mean() == pytest.approx(
        (expected**2).sum(), abs=0.05
    )


def test_a_seed_and_a_number_decide_a_sample():
    B, V, length = 20, 5, 4
    step, _, empty = language(1, V, length)

    @functools.partial(jax.jit, static_argnums=0)
    def sample(seed, numbers):
        def same(tokens, index, prefix):  # every row is the same example
            logits, prefix = jax.vmap(lambda t, p: step(t[None], index, p[None]))(tokens, prefix)
            return logits[:, 0], prefix[:, 0]

        search = Sample(seed=seed)
        rows = search.start(numbers, length)
        rows, _ = advance(same, search, rows, jnp.repeat(empty(1), B), 0, length)
        return search.outputs(rows)

    numbers = jnp.arange(B)
    outputs = np.array(sample(3, numbers))
    assert len(np.unique(outputs, axis=0)) > 5
    np.testing.assert_array_equal(sample(3, numbers[::-1]), outputs[::-1])
    assert (sample(4, numbers) != outputs).any()
