"""Test the pooling methods against plain loops over the members of a group."""

import jax
import numpy as np

from gqa.conversion import pooling

KEY = jax.random.key(0)


def heavy_tailed(seed, shape):
    """Numbers of which a few are far from the others."""
    return np.random.default_rng(seed).standard_t(1, shape).astype(np.float32)


def members(keys, values, layer, group):
    """Each head of a group as one long vector, its keys and values joined."""
    joined = [np.moveaxis(x[layer, :, group], 1, 0).reshape(x.shape[3], -1) for x in (keys, values)]
    return np.concatenate(joined, 1).astype(np.float64)


def test_the_medoid_has_the_least_sum_of_distances():
    """Of distances: their squares would choose the head nearest to the mean, a different one."""
    L, D, K, G, H = 20, 2, 2, 5, 2
    keys, values = (heavy_tailed(seed, (L, D, K, G, H)) for seed in (0, 1))
    new_keys, new_values = pooling.medoid(keys, values, KEY)
    by_squares = 0
    for layer, group in np.ndindex(L, K):
        heads = members(keys, values, layer, group)
        distances = np.linalg.norm(heads[:, None] - heads, axis=2)
        chosen = distances.sum(1).argmin()
        np.testing.assert_array_equal(new_keys[layer, :, group], keys[layer, :, group, chosen])
        np.testing.assert_array_equal(new_values[layer, :, group], values[layer, :, group, chosen])
        by_squares += np.square(distances).sum(1).argmin() != chosen
    assert by_squares > 3


def test_the_largest_has_the_largest_norm_of_keys_and_values_joined():
    L, D, K, G, H = 20, 3, 2, 4, 2
    keys, values = (heavy_tailed(seed, (L, D, K, G, H)) for seed in (2, 3))
    new_keys, new_values = pooling.largest(keys, values, KEY)
    for layer, group in np.ndindex(L, K):
        chosen = np.linalg.norm(members(keys, values, layer, group), axis=1).argmax()
        np.testing.assert_array_equal(new_keys[layer, :, group], keys[layer, :, group, chosen])
        np.testing.assert_array_equal(new_values[layer, :, group], values[layer, :, group, chosen])


def test_first_and_mean_are_those_of_keys_and_of_values():
    keys, values = (heavy_tailed(seed, (2, 3, 2, 3, 4)) for seed in (4, 5))
    for actual, x in zip(pooling.first(keys, values, KEY), (keys, values), strict=True):
        np.testing.assert_array_equal(actual, x[..., 0, :])
    for actual, x in zip(pooling.mean(keys, values, KEY), (keys, values), strict=True):
        expected = (x[..., 0, :] + x[..., 1, :] + x[..., 2, :]) / 3
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_random_heads_have_the_variance_of_one_by_the_inputs():
    """T5 draws a projection's weights with variance 1/D; D is not the number of outputs here."""
    L, D, K, G, H = 3, 256, 2, 2, 8
    keys = np.zeros((L, D, K, G, H), np.float32)
    for new in pooling.random(keys, keys, KEY):
        assert new.shape == (L, D, K, H)
        np.testing.assert_allclose(np.std(new) * D**0.5, 1, rtol=0.05)
        assert abs(float(new.mean())) < 0.05 * D**-0.5


def test_renormed_blocks_have_the_mean_norm_and_zeros_stay():
    groups = heavy_tailed(6, (2, 3, 2, 4, 5))
    pooled = groups.mean(3)
    pooled[1, :, 0] = 0
    new = np.asarray(pooling.restore_norm(pooled, groups))
    for layer, group in np.ndindex(2, 2):
        norms = [np.linalg.norm(groups[layer, :, group, g]) for g in range(4)]
        actual = np.linalg.norm(new[layer, :, group])
        zero = (layer, group) == (1, 0)
        np.testing.assert_allclose(actual, 0 if zero else np.mean(norms), rtol=1e-5)
        # Only the size changes.
        norm = np.linalg.norm(pooled[layer, :, group])
        expected = pooled[layer, :, group] * (actual / norm if norm else 1)
        np.testing.assert_allclose(new[layer, :, group], expected, rtol=1e-5, atol=1e-6)
