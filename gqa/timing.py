"""Inference time: prefill (encoder and cross K/V) and each decoded token, in interleaved runs."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gqa import decode, model
from gqa.model import Config


class Times(NamedTuple):
    """Seconds of each repetition."""

    prefill: np.ndarray
    decode: np.ndarray


def measure(
    configs: dict[str, Config],
    *,
    batch_size: int,
    inputs_length: int,
    targets_length: int,
    repetitions: int,
    seed: int = 0,
) -> dict[str, Times]:
    """Time each network (random weights) on the same inputs, `targets_length` tokens forced.

    The networks take turns, so that a machine that slows down slows all of them.
    """
    key = jax.random.key(seed)
    vocab = min(config.vocab_size for config in configs.values())
    inputs = jax.random.randint(key, (batch_size, inputs_length), 3, vocab)
    runs = {name: _compiled(config, inputs, targets_length) for name, config in configs.items()}
    seconds: dict[str, list] = {name: [] for name in configs}
    for _ in range(repetitions):
        for name, (prefill, generate) in runs.items():
            first, memory = _timed(prefill)
            rest, _ = _timed(lambda generate=generate, memory=memory: generate(memory))
            seconds[name].append((first, rest))
    return {name: Times(*np.array(values).T) for name, values in seconds.items()}


def _compiled(config: Config, inputs: Array, length: int) -> tuple[Callable, Callable]:
    """The two timed parts of one network as functions of nothing and of the memory, warmed up."""
    params = jax.jit(model.unstack, static_argnums=1)(model.init_params(config, 0), config)

    @jax.jit
    def prefill(params):
        return model.prefill(params, config, inputs)

    @jax.jit
    def generate(params, memory):
        def step(tokens, index, cache):
            return model.decode_step(params, config, tokens, index, cache, *memory)

        cache = model.init_cache(config, len(inputs), length)
        return decode.greedy(step, cache, len(inputs), length, stop=False)

    memory = prefill(params)
    jnp.sum(generate(params, memory)).block_until_ready()
    return lambda: prefill(params), lambda memory: generate(params, memory)


def _timed(run: Callable) -> tuple[float, object]:
    begin = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - begin, result
