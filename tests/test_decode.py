"""Greedy search over a scripted step function, and the cached model against teacher forcing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import decode
from gqa.evaluate import make_generate
from gqa.model import Transformer, init_params

V = 8


def scripted(script):
    """A step whose row b says script[b][index], and whose cache counts the calls."""
    script = jnp.array(script)

    def step(tokens, index, cache):
        previous = jnp.where(index == 0, 0, script[:, index - 1])
        seen = jnp.where(cache["live"], tokens == previous, True)
        live = cache["live"] & (script[:, index] != decode.EOS)
        cache = {"calls": cache["calls"] + 1, "live": live, "ok": cache["ok"] & seen.all()}
        return jax.nn.one_hot(script[:, index], V), cache

    rows = len(script)
    return step, {"calls": jnp.int32(0), "live": jnp.ones(rows, bool), "ok": jnp.bool(True)}


def test_rows_end_at_their_eos_and_pad_after_it():
    step, cache = scripted([[5, 1, 6, 6, 6], [3, 4, 1, 7, 7]])
    tokens = decode.greedy(step, cache, 2, 5)
    np.testing.assert_array_equal(tokens, [[5, 1, 0, 0, 0], [3, 4, 1, 0, 0]])


def test_stops_when_every_row_has_ended_and_feeds_back_what_it_chose():
    step, cache = scripted([[5, 1, 6, 6, 6], [3, 4, 1, 7, 7]])
    calls = []

    def counted(tokens, index, cache):
        logits, cache = step(tokens, index, cache)
        jax.debug.callback(
            lambda c, ok: calls.append((int(c), bool(ok))), cache["calls"], cache["ok"]
        )
        return logits, cache

    jax.block_until_ready(decode.greedy(counted, cache, 2, 5))
    jax.effects_barrier()
    assert sorted(calls) == [(1, True), (2, True), (3, True)]


def test_without_stop_every_position_is_filled():
    step, cache = scripted([[5, 1, 6, 1, 6]])
    np.testing.assert_array_equal(decode.greedy(step, cache, 1, 5, stop=False), [[5, 1, 6, 1, 6]])


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_greedy_is_the_arg_max_of_teacher_forcing(tiny, batch, num_kv_heads):
    heads = {"num_kv_heads_decoder": num_kv_heads, "num_kv_heads_cross": num_kv_heads}
    config = dataclasses.replace(tiny, **heads)
    # Embeddings apart from each other, so that the model does not repeat one token.
    params = jax.tree.map(lambda p: 2 * p, init_params(config, 3))
    inputs = jnp.array(batch["inputs"])
    tokens = make_generate(config, 12, stop=False)(params, inputs)
    # The model's own output as the target: position t then reads outputs 0..t-1.
    forced = Transformer(config).apply({"params": params}, {"inputs": inputs, "targets": tokens})
    np.testing.assert_array_equal(forced.argmax(-1), tokens)
    assert len(np.unique(tokens)) > 3
