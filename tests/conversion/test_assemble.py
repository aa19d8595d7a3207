"""Test kernels by layer group: shared leaves, random draws, dtypes, and the warning."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.conversion import SHRINKAGE, check, convert, needs_input_covariances, per_layer_kv_heads
from gqa.conversion.attention_kernels import kernels_of
from gqa.conversion.calibration import ATTENTIONS
from gqa.runtime.errors import UserError
from tests.conversion.test_closed_form import covariances_of


@pytest.fixture
def params(tiny, random_params):
    return random_params(tiny)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("method", ["svd", "procrustes", "mean", "random"])
def test_the_same_number_in_every_layer_is_the_identity(tiny, params, method):
    new, config, _ = convert(params, tiny, {"self_attention": (4, 4)}, method, space="weight")
    assert config == tiny
    assert_equal(new, params)
    # It needs no covariances either, since nothing is weighed.
    check(tiny, {"self_attention": (4, 4), "cross_attention": 4}, "svd", calibrated=False)
    assert (
        per_layer_kv_heads(
            params, tiny, 4, {"self_attention": 2, "cross_attention": 3}, input_covariances=[]
        )
        == {}
    )


def test_an_attention_with_the_same_numbers_stays_beside_one_that_changes(tiny, params):
    new, config, _ = convert(
        params, tiny, {"self_attention": (4, 4), "cross_attention": (2, 2)}, "svd", space="weight"
    )
    other, same, _ = convert(params, tiny, {"cross_attention": 2}, "svd", space="weight")
    assert config == same
    assert_equal(new, other)


def test_every_run_of_layers_draws_its_own_random_heads(tiny, random_params):
    deep = dataclasses.replace(tiny, num_decoder_layers=3)
    heads = {"self_attention": (2, 2, 1), "cross_attention": (1, 2, 2)}  # runs of one layer each
    new, *_ = convert(random_params(deep), deep, heads, "random")
    layers = new["decoder"]["layers"]
    assert sorted(layers) == ["0", "1", "2"]
    one, other = (layers[run]["self_attention"]["key"] for run in ("0", "1"))
    assert one.shape == other.shape == (1, 16, 2, 8)
    assert (one != other).all()


@pytest.mark.parametrize("method", ["mean", "svd", "random"])
def test_parameters_keep_their_dtype(tiny, params, method):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    new, *_ = convert(half, tiny, 2, method, space="weight")
    assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype(jnp.bfloat16)}


def of_condition(tiny, numbers, num_keys=1):
    """Moments with these condition numbers, by attention and layer; the others have 1."""
    D = tiny.d_model

    def covariance(m):
        C = np.diag(np.geomspace(1, numbers.get(m[:2], 1.0), D))
        return m._replace(keys=C, queries=np.eye(D), num_keys=num_keys)

    return [covariance(m) for m in covariances_of(tiny)]


def test_only_moments_worse_than_a_billion_are_warned_of_and_the_worst_is_named(tiny, params):
    numbers = {
        ("self_attention", 0): 5e9,
        ("cross_attention", 1): 7e12,
        ("cross_attention", 0): 2e9,
    }
    worst = "layer 1 of attention 'cross_attention' have condition number 7e"
    with pytest.warns(UserWarning, match=worst):
        convert(params, tiny, 2, "procrustes", input_covariances=of_condition(tiny, numbers))
    # Of many tokens, a direction without signal is one that the network never uses.
    for fine in (
        of_condition(tiny, {("cross_attention", 1): 5e8}),
        of_condition(tiny, numbers, num_keys=10 * tiny.d_model),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(params, tiny, 2, "procrustes", input_covariances=fine)


def test_defaults_are_logits_and_a_shrinkage_of_a_hundredth(tiny, params):
    covariances = covariances_of(tiny)
    actual = convert(params, tiny, 2, "svd", input_covariances=covariances).params
    assert_equal(
        actual,
        convert(
            params, tiny, 2, "svd", input_covariances=covariances, space="logit", shrinkage=0.01
        ).params,
    )
    assert SHRINKAGE == 0.01
    assert needs_input_covariances("svd")
    with pytest.raises(UserError, match="method='svd' weighs heads"):
        check(tiny, {"cross_attention": 2}, "svd", calibrated=False)
    for keys in ({"shrinkage": 0.0}, {"space": "activation"}):
        other = convert(params, tiny, 2, "svd", input_covariances=covariances, **keys).params
        one, two = (kernels_of(p, "cross_attention")["key"] for p in (actual, other))
        assert np.abs(one - two).max() > 1e-3


def test_heads_are_as_large_as_those_of_their_own_group_after_regrouping(tiny, params):
    sizes = jnp.asarray([1.0, 5.0, 2.0, 9.0]).reshape(1, 1, 4, 1)
    layers = params["decoder"]["layers"]
    cross = layers["cross_attention"]
    cross = cross | {side: cross[side] * sizes for side in ("key", "value")}
    layers = layers | {"cross_attention": cross}
    params = params | {"decoder": params["decoder"] | {"layers": layers}}
    new, *_ = convert(params, tiny, {"cross_attention": 2}, "mean", grouping="strided", renorm=True)
    for side in ("key", "value"):
        before = np.linalg.norm(np.asarray(cross[side]), axis=(1, 3))  # [L, 4]
        after = np.linalg.norm(np.asarray(kernels_of(new, "cross_attention")[side]), axis=(1, 3))
        expected = np.stack([before[:, [0, 2]].mean(1), before[:, [1, 3]].mean(1)], 1)
        np.testing.assert_allclose(after, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_only_the_attention_that_was_named_changes(tiny, params, name):
    new, config, _ = convert(params, tiny, {name: 2}, "svd", input_covariances=covariances_of(tiny))
    fields = {n: getattr(config, f"num_kv_heads_{n}") for n in ATTENTIONS}
    assert fields == dict.fromkeys(ATTENTIONS, 4) | {name: 2}
    for other in ATTENTIONS:
        if other != name:
            assert_equal(kernels_of(new, other), kernels_of(params, other))


@pytest.mark.parametrize("method", ["mean", "svd"])
def test_a_deeper_encoder_is_converted_in_all_its_layers(tiny, random_params, method):
    """Its layers are one run, however those of the decoder are divided."""
    config = dataclasses.replace(tiny, num_encoder_layers=3)
    params = random_params(config)
    heads = {"encoder": 2, "self_attention": (2, 1)}
    new, *_ = convert(params, config, heads, method, space="weight")
    actual = kernels_of(new, "encoder")["key"]
    expected = kernels_of(
        convert(params, config, {"encoder": 2}, method, space="weight")[0], "encoder"
    )
    assert actual.shape == (3, 16, 2, 8)
    np.testing.assert_array_equal(actual, expected["key"])


def test_a_layer_that_keeps_its_heads_keeps_every_bit_and_warns_of_nothing(tiny, params):
    """Its covariances are not used, so that it does not matter how bad they are."""
    covariances = of_condition(tiny, {("self_attention", 0): 7e12})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new, *_ = convert(
            params, tiny, {"self_attention": (4, 2)}, "procrustes", input_covariances=covariances
        )
    before = kernels_of(params, "self_attention")
    for side, kernel in new["decoder"]["layers"]["0"]["self_attention"].items():
        np.testing.assert_array_equal(kernel[0], before[side][0])
