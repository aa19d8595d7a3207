"""Turns are taken, every number is kept, and what is timed is generation as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.evaluation import timing
from gqa.inference.step import Inference
from gqa.model.transformer import init_params


@pytest.mark.parametrize("repetitions", [1, 4])
def test_all_take_turns_after_one_to_warm_up(repetitions):
    order = []

    def turn(name):
        order.append(name)
        return {"seconds": float(len(order))}

    turns = {name: lambda name=name: turn(name) for name in "ab"}
    measured = timing.take_turns(turns, repetitions)
    assert order == ["a", "b"] * (1 + repetitions)
    assert measured["a"]["seconds"].tolist() == [3.0 + 2 * i for i in range(repetitions)]
    assert measured["b"]["seconds"].tolist() == [4.0 + 2 * i for i in range(repetitions)]


def test_every_network_is_timed_every_time(tiny):
    configs = {"mha": tiny, "mqa": dataclasses.replace(tiny, num_kv_heads_self_attention=1)}
    shape = {"batch_size": 2, "inputs_length": 8, "targets_length": 5}
    measured = timing.measure(configs, **shape, repetitions=3)
    assert measured.keys() == configs.keys()
    for parts in measured.values():
        assert parts.keys() == {"prefill", "decode", "attention"}
        assert all(seconds.shape == (3,) and (seconds > 0).all() for seconds in parts.values())


def test_a_timing_waits_for_the_result():
    class Pending:
        ready = False

        def block_until_ready(self):
            self.ready = True
            return self

    seconds, result = timing.timed(lambda: [Pending()])
    assert result[0].ready
    assert seconds >= 0


def test_a_batch_in_parts_is_the_batch(tiny, monkeypatch):
    """Prefill of some rows at once leaves decoding the memory of all of them."""
    seen = []

    class Generator(timing.Generator):
        def decode(self, weights, memory):
            seen.append((memory, super().decode(weights, memory)))
            return seen[-1][1]

    monkeypatch.setattr(timing, "Generator", Generator)
    net = Inference(tiny)
    weights = jax.jit(net.prepare)(init_params(tiny, 0))
    inputs = timing.random_tokens(tiny.vocab_size, 3, 8)
    timing.generation(net, weights, inputs, 5, rows=2)()
    [(memory, tokens)] = seen
    assert tokens.shape == (3, 5)
    jax.tree.map(
        lambda ours, whole: np.testing.assert_allclose(ours, whole, atol=1e-5),
        memory,
        jax.jit(net.prefill)(weights, inputs),
    )


def test_attention_alone_is_that_of_every_layer(tiny):
    """Values that are constants of their layer are what attention to them gives."""
    net = Inference(dataclasses.replace(tiny, num_kv_heads_cross_attention=2))
    weights = jax.eval_shape(lambda: net.prepare(init_params(net.config, 0)))
    memory = jax.eval_shape(net.prefill, weights, jnp.ones((3, 8), jnp.int32))
    memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)
    kv = [(k, v + 1 + layer) for layer, (k, v) in enumerate(memory.kv)]
    attention = jax.jit(functools.partial(timing.attention, net))
    found = attention(timing.attention_queries(net, 3), memory._replace(kv=kv))
    for layer, out in enumerate(found):
        assert out.shape == (3, 1, tiny.num_heads, tiny.head_dim)
        np.testing.assert_allclose(out, 1 + layer, rtol=1e-6)
    assert len(found) == tiny.num_decoder_layers


def test_random_tokens_are_neither_padding_nor_ends():
    tokens = timing.random_tokens(5, 50, 50)
    assert set(np.unique(tokens)) == {3, 4}
