"""Test rules of decoding: batches encoded in parts, ties, the nucleus, draws, batch sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.inference import decoding, generator, step
from gqa.inference.decoding import Beam, Sample
from gqa.inference.generator import Generator
from gqa.inference.step import Inference


@pytest.mark.parametrize("examples_at_once", [1, 2, 3, 10**9])
def test_a_batch_that_is_encoded_in_parts_is_the_batch(
    tiny, random_params, monkeypatch, examples_at_once
):
    """4 heads and 5 positions make 100 logits an example; parts have 1, 2, 3 or all 6 examples."""
    inputs = np.random.default_rng(0).integers(1, 32, (6, 5), dtype=np.int32)
    inputs[1, 3:] = inputs[4, 1:] = 0
    net = Inference(tiny, backend="cpu")
    weights = net.prepare(random_params(tiny))
    whole = jax.jit(lambda x: net.prefill(weights, x))(inputs)
    monkeypatch.setattr(step, "CPU_LOGITS", 100 * examples_at_once)
    parts = jax.jit(lambda x: net.prefill(weights, x))(inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), parts, whole)
    rows = [np.asarray(whole.kv[0][0]).reshape(6, -1)[i] for i in range(6)]
    assert len({row.tobytes() for row in rows}) == 6


def test_of_equal_logits_the_first_is_taken():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, -3.0, 5.0]])
    np.testing.assert_array_equal(decoding._arg_max(logits), [1, 0, 3])


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.3, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.95, 3), (1.0, 4)]
)
def test_a_nucleus_has_the_fewest_tokens_that_reach_its_sum(top_p, expected):
    probability = np.array([0.15, 0.5, 0.05, 0.3])
    kept = jnp.isfinite(decoding._nucleus(jnp.log(probability)[None], top_p))[0]
    order = np.argsort(-probability)
    assert set(np.flatnonzero(kept)) == set(order[:expected])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_a_length_penalty_is_one_for_a_single_token(alpha):
    search = Beam(2, alpha)
    assert search._penalty(1) == 1
    assert search._penalty(7) == pytest.approx(2**alpha)


def test_rows_draw_by_their_numbers(tiny, random_params):
    """With equal inputs, rows of equal numbers draw equal texts, rows of other numbers do not."""
    params, net = random_params(tiny), Inference(tiny)
    generator = Generator(net, Sample(temperature=3.0, seed=2), 8)
    weights = generator.prepare(params)
    inputs = np.full((4, 3), 5, np.int32)
    texts = generator(weights, inputs)
    assert len(np.unique(texts, axis=0)) == 4
    again = generator(weights, inputs, np.array([3, 3, -1, 0]))
    np.testing.assert_array_equal(again[0], again[1])
    np.testing.assert_array_equal(again[[0, 3]], texts[[3, 0]])
    assert not again[2].any()


@pytest.mark.parametrize(
    ("size", "num_shards", "expected"),
    [
        (64, 1, [64, 32, 16, 8]),
        (12, 1, [12, 6, 3]),
        (5, 1, [5]),
        (16, 4, [16, 8, 4]),
        (8, 8, [8]),
    ],
)
def test_a_batch_is_halved_three_times_at_most_and_never_below_its_shards(
    size, num_shards, expected
):
    generator = object.__new__(Generator)
    generator._num_shards = num_shards
    assert generator._batch_sizes(size) == expected


def test_layers_with_their_own_numbers_have_their_own_caches(tiny):
    config = dataclasses.replace(
        tiny, num_kv_heads_self_attention=(4, 1), num_kv_heads_cross_attention=(1, 2)
    )
    net = Inference(config, backend="tpu")
    cache = jax.eval_shape(lambda: net.init_cache(3, 2, 9))
    assert [k.shape for k, _ in cache] == [(6, 4, 8, 9), (6, 1, 8, 9)]
    assert [v.shape for _, v in cache] == [(6, 4, 9, 8), (6, 1, 9, 8)]
    assert generator.bucket(1, 10**9) == generator.SHORTEST == 64
