"""Seconds of prefill (encoder and cross-attention K/V) and of decoding, measured in turns.

A shared machine is faster in one minute than in the next. Therefore the networks under comparison
take turns: one measurement each, repeatedly, and measurements of the same round are compared.
"""

import time
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gqa.inference.decoding import GREEDY
from gqa.inference.generator import Generator
from gqa.inference.step import Inference, Memory
from gqa.model.config import Config
from gqa.model.transformer import init_params

Turn = Callable[[], dict[str, float]]  # measures once; numbers by name
Name = TypeVar("Name", bound=Hashable)

ATTENTION_RUNS = 5  # of `attention` in a turn, since one takes only milliseconds


def take_turns(
    turns: dict[Name, Turn], repetitions: int, trace_folder: Path | None = None
) -> dict[Name, dict[str, np.ndarray]]:
    """Return the numbers [repetitions] that each turn measures, after one turn each to warm up.

    With a `trace_folder`, one more round follows whose numbers are not used, and which leaves a
    trace there for TensorBoard's profiler.
    """
    # The first turn of a network also compiles it.
    for turn in turns.values():
        turn()
    rounds = [{name: turn() for name, turn in turns.items()} for _ in range(repetitions)]

    # Recording a trace takes time of its own, so the traced round is not a measurement.
    if trace_folder is not None:
        with jax.profiler.trace(str(trace_folder)):
            for turn in turns.values():
                turn()

    return {
        name: {number: np.array([r[name][number] for r in rounds]) for number in rounds[0][name]}
        for name in turns
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds until the result of `run` is computed, and the result."""
    # JAX returns before a result is computed, so wait for it inside the measured time.
    begin = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - begin, result


def generation(
    net: Inference, weights: dict, inputs: Array, length: int, rows: int | None = None
) -> Turn:
    """Return a turn that times greedy decoding of inputs [B, S]; no text ends before `length`.

    The turn measures three parts, in seconds. "prefill" takes `rows` rows at once (default all).
    "decode" generates all tokens. "attention" is the cross-attention of one token in all layers,
    without the rest of the step.
    """
    # `stop=False`: no text ends early, so all networks generate equally many tokens.
    generator = Generator(net, GREEDY, length, stop=False)
    queries = attention_queries(net, len(inputs))
    attend = jax.jit(partial(attention, net))
    rows = rows or len(inputs)

    def prefill() -> Memory:
        # A large batch goes in parts: the encoder needs more room than the memory it leaves.
        parts = [
            generator.prefill(weights, inputs[i : i + rows]) for i in range(0, len(inputs), rows)
        ]
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    def turn() -> dict[str, float]:
        first, memory = timed(prefill)
        alone = [timed(partial(attend, queries, memory))[0] for _ in range(ATTENTION_RUNS)]
        rest, _ = timed(partial(generator.decode, weights, memory))
        return {"prefill": first, "decode": rest, "attention": float(np.median(alone))}

    return turn


def attention_queries(net: Inference, batch_size: int) -> Array:
    """Return random queries [B, 1, N, H]: one per head and sequence."""
    shape = (batch_size, 1, net.config.num_heads, net.config.head_dim)
    return jax.random.normal(jax.random.key(0), shape, net.config.dtype)


def attention(net: Inference, queries: Array, memory: Memory) -> list[Array]:
    """Return the cross-attention of one step without its projections: [B, 1, N, H] per layer."""
    layers = zip(net.decoder_layouts, memory.kv, strict=True)
    return [layout.cross_attention(queries, kv, memory.mask) for layout, kv in layers]


def measure(
    configs: dict[Name, Config],
    *,
    batch_size: int,
    inputs_length: int,
    targets_length: int,
    repetitions: int,
    trace_folder: Path | None = None,
) -> dict[Name, dict[str, np.ndarray]]:
    """Time each network with random weights on the same inputs; see `generation`, `take_turns`."""
    # All networks read the same inputs, so each id must exist in every vocabulary.
    vocab = min(config.vocab_size for config in configs.values())
    inputs = random_tokens(vocab, batch_size, inputs_length)

    turns = {}
    for name, config in configs.items():
        # The time does not depend on the values of the weights, so they need no training.
        net = Inference(config)
        weights = jax.jit(net.prepare)(init_params(config, 0))
        turns[name] = generation(net, weights, inputs, targets_length)

    return take_turns(turns, repetitions, trace_folder)


def random_tokens(vocab_size: int, batch_size: int, length: int, seed: int = 0) -> Array:
    """Return random token ids [B, length] without padding and EOS."""
    return jax.random.randint(jax.random.key(seed), (batch_size, length), 3, vocab_size)
