"""Test that decoding equals teacher forcing in every layout, and copies no cache."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.inference import cpu_layout, decoding
from gqa.inference.step import Inference
from gqa.model.transformer import Transformer, init_params, shift_right

T5_1_0 = {"activation": "relu", "tied_logits": True}
LENGTH = 7


def config_of(tiny, K, **version):
    return dataclasses.replace(
        tiny, num_kv_heads_self_attention=K, num_kv_heads_cross_attention=K, **version
    )


def teacher_forced(params, config, inputs, targets):
    batch = {"inputs": inputs, "targets": targets}
    return jax.jit(Transformer(config).apply)({"params": params}, batch)


def step_by_step(net, params, inputs, targets, room):
    """Logits [B, R, T, V] of targets [B, R, T], from a cache with `room` that grows half-way."""
    B, R, T = targets.shape
    weights = jax.jit(net.prepare)(params)
    memory = jax.jit(net.prefill, static_argnums=2)(weights, inputs, R)
    cache = net.init_cache(B, R, room)
    step = jax.jit(net.step)
    previous = shift_right(jnp.asarray(targets).reshape(B * R, T), 0).reshape(B, R, T)
    logits = []
    for index in range(T):
        if index == room:
            cache = net.grow(cache, T)
        new, cache = step(weights, previous[:, :, index], index, cache, memory)
        logits.append(new)
    assert net.capacity(cache) >= T
    return np.stack(logits, axis=2)


@pytest.mark.parametrize(
    ("K", "R", "version", "backend"),
    [
        (4, 1, {}, "cpu"),
        (1, 1, {}, "cpu"),
        (2, 3, T5_1_0, "cpu"),
        (4, 1, {}, "tpu"),
        (2, 1, T5_1_0, "tpu"),
        (1, 3, {}, "tpu"),
        ((1, 4), 1, {}, "cpu"),
        ((4, 2), 3, {}, "cpu"),
        ((1, 4), 3, {}, "tpu"),
    ],
)
def test_steps_equal_teacher_forcing(
    tiny, batch, random_params, monkeypatch, K, R, version, backend
):
    """Each of the R beams is a row of the cache. Blocks of 3 divide neither lengths nor widths."""
    monkeypatch.setattr(cpu_layout, "BLOCK", 3)
    config = config_of(tiny, K, **version)
    params, inputs = random_params(config), batch["inputs"]
    rng = np.random.default_rng(1)
    targets = rng.integers(1, 32, (2, R, LENGTH), dtype=np.int32)
    flat = targets.reshape(2 * R, LENGTH)
    expected = teacher_forced(params, config, np.repeat(inputs, R, axis=0), flat)
    net = Inference(config, cache_dtype="float32", backend=backend)
    logits = step_by_step(net, params, inputs, targets, room=3)
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("K", "R"), [(4, 1), (1, 3), ((1, 2), 1)])
def test_cudnn_attends_to_the_inputs_as_the_definition_does(
    tiny, batch, random_params, cudnn_by_xla, K, R
):
    """Without a GPU, XLA computes cuDNN's calls. Both round to bfloat16, but at different steps."""
    config, rng = config_of(tiny, K), np.random.default_rng(1)
    params = random_params(config)
    targets = rng.integers(1, 32, (2, R, LENGTH), dtype=np.int32)
    fused, plain = (Inference(config, "bfloat16", backend) for backend in ("cudnn", "tpu"))
    logits, expected = (
        step_by_step(net, params, batch["inputs"], targets, 3) for net in (fused, plain)
    )
    assert set(cudnn_by_xla) == {"cudnn"}
    assert (fused.fused, plain.fused) == (True, False)
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())


def test_a_bfloat16_cache_costs_a_little_precision(tiny, batch, random_params):
    config = config_of(tiny, 2)
    params, targets = random_params(config), batch["targets"][:, None]
    nets = [Inference(config, cache_dtype=dtype) for dtype in ("float32", "bfloat16")]
    exact, half = (step_by_step(net, params, batch["inputs"], targets, LENGTH) for net in nets)
    assert 1e-4 < np.abs(half - exact).max() / np.abs(exact).max() < 0.05


def test_the_backend_decides_the_cache(tiny):
    for backend, dtype in (("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")):
        net = Inference(tiny, backend=backend)
        assert net.cache_dtype == dtype
        leaves = jax.tree.leaves(jax.eval_shape(lambda net=net: net.init_cache(2, 3, 5)))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
        # The layout for CPUs merges KV heads into the first axis; the other has an axis for them.
        heads = tiny.num_kv_heads_self_attention if backend == "cpu" else 1
        assert {leaf.shape[0] for leaf in leaves} == {6 * heads}


# Operations that move no array, and loops and branches, whose bodies are examined themselves.
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional")


def large_instructions(program, size):
    """List (computation, operation) of the instructions that write `size` numbers or more.

    `program` is an optimized HLO module as text. A fusion counts as the operation of its root: if
    the root updates a slice, the fusion does so in place.
    """
    large, roots, fused, computation = [], {}, set(), None
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        elif matched := re.match(r"\s+(ROOT )?%\S+ = (.*?) ([a-z][\w\-]*)\(", line):
            root, shapes, op = matched.groups()
            if root:
                roots[computation] = op
            if op == "fusion":
                op = re.search(r"calls=%([\w.\-]+)", line)[1]
                fused.add(op)
            lengths = [map(int, dims.split(",")) for dims in re.findall(r"\[([\d,]+)\]", shapes)]
            if any(math.prod(dims) >= size for dims in lengths) and op not in FREE:
                large.append((computation, op))
    return [(where, roots.get(op, op)) for where, op in large if where not in fused]


@pytest.mark.parametrize(("K", "R"), [(4, 1), (2, 1), (1, 1), (4, 4), (2, 4)])
def test_decoding_writes_nothing_of_a_caches_size_but_the_new_position(tiny, K, R):
    """Examine the optimized program. Only beams that moved may be gathered, in a branch."""
    config = config_of(tiny, K, head_dim=64)
    net, search, B, S, T = (
        Inference(config, backend="cpu"),
        decoding.beam_search(R, 0.6),
        4,
        320,
        192,
    )

    def generate(weights, rows, cache, memory):
        def step(tokens, index, cache):
            return net.step(weights, tokens, index, cache, memory)

        return decoding.advance(step, search, rows, cache, 0, T)

    params = jax.eval_shape(lambda: init_params(config, 0))
    weights = jax.eval_shape(net.prepare, params)
    memory = jax.eval_shape(lambda w: net.prefill(w, jnp.ones((B, S), jnp.int32), R), weights)
    rows, cache = jax.eval_shape(lambda: (search.start(jnp.arange(B), T), net.init_cache(B, R, T)))
    compiled = jax.jit(generate, donate_argnums=2).lower(weights, rows, cache, memory).compile()
    smallest = min(x.size for x in jax.tree.leaves((cache, memory.kv)))
    largest_else = max(x.size for x in jax.tree.leaves((rows, memory.mask)))
    assert smallest > largest_else
    program = compiled.as_text()
    branches = re.findall(r"(?:branch_computations=\{|(?:true|false)_computation=)([^}]*)", program)
    branches = set(re.findall(r"%([\w.\-]+)", " ".join(branches)))
    large = large_instructions(program, smallest)
    always = [op for computation, op in large if computation not in branches]
    assert always == ["dynamic-update-slice"] * len(jax.tree.leaves(cache))
    assert bool(branches) == (R > 1)
    # Every cache is donated, so the loop fills no second copy of a cache.
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)
    )
