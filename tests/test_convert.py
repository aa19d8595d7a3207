"""Conversion: identity at equal head count, lossless for tied heads, and nothing else touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.convert import ATTENTIONS, METHODS, convert
from gqa.errors import UserError
from gqa.model import Transformer, init_params


@pytest.fixture
def params(tiny):
    return init_params(tiny, 0)


def kernels(params, name):
    stack, attention = ATTENTIONS[name]
    return params[stack]["layers"][attention]


def tie(params, name, groups):
    """Parameters whose heads of one attention are copies of the first of their group."""
    params = jax.tree.map(lambda p: p, params)
    for kernel in ("key", "value"):
        L, D, N, H = kernels(params, name)[kernel].shape
        grouped = kernels(params, name)[kernel].reshape(L, D, groups, N // groups, H)
        tied = jnp.broadcast_to(grouped[:, :, :, :1], grouped.shape)
        kernels(params, name)[kernel] = tied.reshape(L, D, N, H)
    return params


@pytest.mark.parametrize("method", METHODS)
def test_equal_head_count_is_the_identity(tiny, params, method):
    new, config = convert(params, tiny, tiny.num_heads, method)
    assert config == tiny
    jax.tree.map(np.testing.assert_array_equal, new, params)


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_identical_heads_convert_without_loss(tiny, params, batch, method, name, groups):
    tied = tie(params, name, groups)
    new, config = convert(tied, tiny, {name: groups}, method)
    before = Transformer(tiny).apply({"params": tied}, batch)
    after = Transformer(config).apply({"params": new}, batch)
    np.testing.assert_allclose(after, before, atol=2e-5)


def test_mean_and_first_take_neighbouring_heads(tiny, params):
    old = kernels(params, "cross")["value"]
    new = kernels(convert(params, tiny, 2, "mean")[0], "cross")["value"]
    np.testing.assert_allclose(new[:, :, 1], (old[:, :, 2] + old[:, :, 3]) / 2, atol=1e-6)
    new = kernels(convert(params, tiny, 2, "first")[0], "cross")["value"]
    np.testing.assert_array_equal(new[:, :, 1], old[:, :, 2])


def test_random_draws_from_the_initialiser_by_seed(tiny, params):
    draws = [convert(params, tiny, 2, "random", seed)[0] for seed in (0, 0, 1)]
    first, again, other = (kernels(p, "decoder") for p in draws)
    np.testing.assert_array_equal(first["key"], again["key"])
    assert (first["key"] != other["key"]).all()
    assert (first["key"] != first["value"]).all()
    assert (first["key"] != kernels(draws[0], "cross")["key"]).all()
    assert (first["key"][0] != first["key"][1]).all()
    std = tiny.d_model**-0.5
    assert 0.8 * std < float(first["key"].std()) < 1.2 * std


def test_only_decoder_keys_and_values_change_by_default(tiny, params):
    new, config = convert(params, tiny, 1)
    assert (config.num_kv_heads_encoder, config.num_kv_heads_decoder) == (4, 1)
    assert config.num_kv_heads_cross == 1
    changed = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: a.shape != b.shape or bool((a != b).any()), new, params)
    )
    paths = {jax.tree_util.keystr(p, simple=True, separator="/") for p, c in changed if c}
    assert paths == {
        f"decoder/layers/{attention}/{kernel}"
        for attention in ("self_attention", "cross_attention")
        for kernel in ("key", "value")
    }


def test_a_grouped_checkpoint_converts_further(tiny, params):
    direct, config = convert(params, tiny, 1, "mean")
    two, two_config = convert(params, tiny, 2, "mean")
    twice, twice_config = convert(two, two_config, 1, "mean")
    assert twice_config == config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), twice, direct)


@pytest.mark.parametrize(
    ("num_kv_heads", "method", "message"),
    [
        (3, "mean", "num_kv_heads_decoder=3 does not divide the 4 heads .* use one of 1, 2, 4"),
        (0, "mean", "num_kv_heads_decoder=0 does not divide"),
        (2, "median", "convert.method='median'; use one of mean, first, random"),
        ({"self": 2}, "mean", "no attention 'self'.*encoder, decoder, cross"),
    ],
)
def test_what_cannot_be_converted_is_refused(tiny, params, num_kv_heads, method, message):
    with pytest.raises(UserError, match=message):
        convert(params, tiny, num_kv_heads, method)
