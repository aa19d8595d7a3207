"""Test that parameters and covariances with NaN or infinity are refused by name before any work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.conversion import ATTENTIONS, METHODS, convert, per_layer_kv_heads
from gqa.conversion.attended import AttendedCovariance
from gqa.conversion.attention_kernels import at, replaced
from gqa.conversion.calibration import InputCovariance
from gqa.model.transformer import init_params
from gqa.runtime.errors import CheckpointError, UserError

KEY = ("decoder", "layers", "cross_attention", "key")


@pytest.fixture
def params(tiny):
    return init_params(tiny, 0)


def covariances(bad=None):
    """Identities for every attention and layer; `bad` stands in the last cross-attention's."""
    identity = np.eye(16)
    last = identity.copy()
    last[0, 0] = 1.0 if bad is None else bad
    return [
        InputCovariance(
            *(name, i, identity),
            last if (name, i) == ("cross_attention", 1) else identity,
            *(9, 9, AttendedCovariance(np.stack([identity] * 4), identity)),
        )
        for name in ATTENTIONS
        for i in range(2)
    ]


def poisoned(params, path, number):
    leaf = at(params, path)
    return replaced(params, path, leaf.reshape(-1).at[3].set(number).reshape(leaf.shape))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_is_not_finite_is_named(tiny, params, method, number):
    with pytest.raises(CheckpointError, match=r"decoder/layers/cross_attention/key .* 1 of \d+ "):
        convert(poisoned(params, KEY, number), tiny, 2, method, input_covariances=covariances())


@pytest.mark.parametrize("path", [("embedding",), ("encoder", "norm", "scale")])
def test_every_parameter_is_checked(tiny, params, path):
    """Calibration runs the whole network, so a parameter elsewhere does harm, too."""
    bad = poisoned(params, path, np.nan)
    with pytest.raises(CheckpointError, match="/".join(path)):
        convert(bad, tiny, 2)
    with pytest.raises(CheckpointError, match="/".join(path)):
        per_layer_kv_heads(
            bad, tiny, 2, {"self_attention": 4, "cross_attention": 4}, space="weight"
        )


def test_sixteen_bits_are_checked_too(tiny, params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    convert(half, tiny, 2)
    with pytest.raises(CheckpointError, match="cross_attention/key"):
        convert(poisoned(half, KEY, np.inf), tiny, 2)


@pytest.mark.parametrize(
    ("method", "grouping"), [("svd", "contiguous"), ("procrustes", "contiguous")]
)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_covariance_that_is_not_finite_is_named(tiny, params, method, grouping, number):
    with pytest.raises(UserError, match="cross_attention in layer 1 has NaN or infinity"):
        convert(params, tiny, 2, method, grouping=grouping, input_covariances=covariances(number))


def test_groupings_and_budgets_check_covariances(tiny, params):
    with pytest.raises(UserError, match="cross_attention in layer 1"):
        convert(params, tiny, 2, "mean", grouping="act_cos", input_covariances=covariances(np.nan))
    with pytest.raises(UserError, match="cross_attention in layer 1"):
        per_layer_kv_heads(
            params,
            tiny,
            2,
            {"self_attention": 4, "cross_attention": 4},
            input_covariances=covariances(np.nan),
        )
