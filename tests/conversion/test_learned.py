"""Test learned pooling: its start, its training, and that it ends as plain parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.conversion import convert
from gqa.conversion.attention_kernels import kernels_of
from gqa.conversion.learned import METHODS, blend, expand, fold, pull, without_pools
from gqa.model.transformer import Transformer

HEADS = {"self_attention": 2, "cross_attention": 1}


@pytest.fixture
def params(tiny, random_params):
    return random_params(tiny)


def grouped(tiny):
    return dataclasses.replace(tiny, num_kv_heads_self_attention=2, num_kv_heads_cross_attention=1)


def assert_close(one, other):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), one, other)


def drawn(tree):
    """The tree with pools that are not as they started."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        pool = str(path[-1].key).endswith("_pool")
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if pool else leaf

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.mark.parametrize("method", METHODS)
def test_they_start_as_the_mean(tiny, params, method):
    tree = expand(params, HEADS, method)
    assert_close(fold(tree), convert(params, tiny, HEADS, "mean").params)
    shape = {"weighted": (2, 2, 2), "fuse": (2, 2, 2, 2)}[method]
    assert kernels_of(tree, "self_attention")["key_pool"].shape == shape
    assert "key_pool" not in kernels_of(tree, "encoder")


def test_weights_are_per_head_and_side(params):
    tree = drawn(expand(params, HEADS, "weighted"))
    plain = kernels_of(fold(tree), "self_attention")
    kernels = kernels_of(tree, "self_attention")
    for side in ("key", "value"):
        weights = kernels[f"{side}_pool"]
        expected = sum(weights[1, 1, g] * kernels[side][1, :, 2 + g] for g in range(2))
        np.testing.assert_allclose(plain[side][1, :, 1], expected, atol=1e-5)


def test_fusion_starts_as_the_parent_and_ends_as_one_head(tiny, params, batch):
    tree = expand(params, HEADS, "fuse")
    jax.tree.map(np.testing.assert_array_equal, blend(tree, 0.0), params)
    tree = drawn(tree)
    end, plain = blend(tree, 1.0), fold(tree)
    before = Transformer(tiny).apply({"params": end}, batch)
    after = Transformer(grouped(tiny)).apply({"params": plain}, batch)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3)


def test_fusion_draws_mixtures_together(params):
    tree = drawn(expand(params, HEADS, "fuse"))

    def apart(progress):
        keys = kernels_of(blend(tree, progress), "cross_attention")["key"]
        return float(jnp.square(keys - keys.mean(2, keepdims=True)).sum())

    distances = [apart(progress) for progress in (0.0, 0.2, 0.4, 0.5, 1.0)]
    assert distances[0] > distances[1] > distances[2] > 1e-2
    assert max(distances[3:]) < 1e-6
    np.testing.assert_allclose([pull(p) for p in (0.0, 0.25, 0.5, 0.75)], [0, 0.5, 1, 1])


@pytest.mark.parametrize(
    ("method", "plain"), [("weighted", fold), ("fuse", lambda t: blend(t, 0.2))]
)
def test_gradients_reach_kernels_and_pools(params, method, plain):
    tree = drawn(expand(params, HEADS, method))

    def objective(tree):
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(plain(tree)))

    grads = jax.grad(objective)(tree)
    for name in HEADS:
        for leaf in ("key", "value", "key_pool", "value_pool"):
            assert np.abs(kernels_of(grads, name)[leaf]).min() > 0, leaf


@pytest.mark.parametrize("method", METHODS)
def test_expanding_adds_pools_alone_and_they_can_be_taken_off(params, method):
    tree = expand(params, HEADS, method)
    plain = without_pools(tree)
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, plain, params)
    # An attention that keeps its heads gets no pool.
    same = expand(params, {"self_attention": 4, "encoder": 4}, method)
    assert jax.tree.structure(same) == jax.tree.structure(params)


@pytest.mark.parametrize("method", METHODS)
def test_pools_have_the_kernels_dtype_and_buffers_of_their_own(params, method):
    """A training step that donates its parameters may not be given one buffer twice."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for tree, dtype in ((params, jnp.float32), (half, jnp.bfloat16)):
        kernels = kernels_of(expand(tree, HEADS, method), "self_attention")
        key, value = kernels["key_pool"], kernels["value_pool"]
        assert key.dtype == value.dtype == dtype
        assert key.unsafe_buffer_pointer() != value.unsafe_buffer_pointer()


def test_each_fused_head_is_its_own_mixture_of_its_group(params):
    """Row i of a mixture makes head i; halfway to merging it is half the mean of the rows."""
    tree = drawn(expand(params, HEADS, "fuse"))
    kernels, start = (
        kernels_of(tree, "self_attention"),
        kernels_of(blend(tree, 0.0), "self_attention"),
    )
    halfway, end = (kernels_of(p, "self_attention") for p in (blend(tree, 0.25), fold(tree)))
    for side in ("key", "value"):
        heads, pool = (np.asarray(kernels[name]) for name in (side, f"{side}_pool"))
        for layer, group, i in np.ndindex(2, 2, 2):
            initial, mean = (
                sum(rows[g] * heads[layer, :, 2 * group + g] for g in range(2))
                for rows in (pool[layer, group, i], pool[layer, group].mean(0))
            )
            actual = start[side][layer, :, 2 * group + i]
            np.testing.assert_allclose(actual, initial, atol=1e-5)
            actual = halfway[side][layer, :, 2 * group + i]
            np.testing.assert_allclose(actual, (initial + mean) / 2, atol=1e-5)
            np.testing.assert_allclose(end[side][layer, :, group], mean, atol=1e-5)
