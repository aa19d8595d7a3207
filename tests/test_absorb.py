"""Closed forms: exact for copies under any invertible map, and never worse than rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.calibrate import ATTENTIONS, Moment
from gqa.convert import absorb, convert
from gqa.convert.tree import kernels_of, with_kernels
from gqa.model import Transformer

SPACES = absorb.SPACES


def spread(rng, size):
    """Second moments [size, size] of inputs that move more along some directions."""
    x = rng.normal(size=(3 * size, size)) * np.geomspace(0.1, 3, size)
    return x.T @ x / len(x)


def moments_of(config):
    rng = np.random.default_rng(1)
    D = config.d_model
    return [
        Moment(name, layer, spread(rng, D), spread(rng, D), 100, 100)
        for name in ATTENTIONS
        for layer in range(2)
    ]


def copies(params, name, invertible):
    """Parameters whose heads are the first of their pair, times matrices that nothing undoes."""
    rng = np.random.default_rng(2)
    kernels = dict(kernels_of(params, name))
    for side in ("key", "value"):
        kernel = np.array(kernels[side])
        L, D, N, H = kernel.shape
        maps = np.linalg.qr(rng.normal(size=(L, N, H, H)))[0]
        if invertible:
            maps = maps * np.geomspace(0.5, 2, H)[:, None] @ maps[:, ::-1]
        first = kernel[:, :, ::2].repeat(2, axis=2)
        kernels[side] = jnp.asarray(np.einsum("LDNH,LNHI->LDNI", first, maps), jnp.float32)
    return with_kernels(params, name, kernels)


@jax.jit
def logits(params, batch):
    raise NotImplementedError


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rotated_and_invertible_copies_convert_without_loss(tiny, random_params, batch, name):
    moments = moments_of(tiny)
    for invertible, method in ((False, "procrustes"), (False, "svd"), (True, "svd")):
        params = copies(random_params(tiny), name, invertible)
        before = Transformer(tiny).apply({"params": params}, batch)
        for space in SPACES:
            new, config = convert(params, tiny, {name: 2}, method, moments=moments, space=space)
            after = Transformer(config).apply({"params": new}, batch)
            np.testing.assert_allclose(after, before, atol=5e-4, err_msg=f"{method} {space}")
    lossy = convert(params, tiny, {name: 2}, "procrustes", moments=moments)[0]
    after = Transformer(config).apply({"params": lossy}, batch)
    assert np.abs(after - before).max() > 1e-2
