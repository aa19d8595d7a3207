"""Test that closed forms are exact for invertible copies, and never worse than rotations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.conversion import closed_form, convert
from gqa.conversion.attended import AttendedCovariance
from gqa.conversion.attention_kernels import kernels_of, with_kernels
from gqa.conversion.calibration import ATTENTIONS, InputCovariance
from gqa.model.transformer import Transformer

SPACES = closed_form.SPACES


def spread(rng, size):
    """Second covariances [size, size] of inputs that move more along some directions."""
    x = rng.normal(size=(3 * size, size)) * np.geomspace(0.1, 3, size)
    return x.T @ x / len(x)


def attended_by(num_heads, size, seed=0):
    """What query heads attend to, each head something else."""
    rng = np.random.default_rng(seed)
    values = np.stack([spread(rng, size)[::-1, ::-1] for _ in range(num_heads)])
    return AttendedCovariance(values, spread(rng, size))


def covariances_of(config):
    rng = np.random.default_rng(1)
    D, read = config.d_model, attended_by(config.num_heads, config.d_model)
    return [
        InputCovariance(name, layer, spread(rng, D), spread(rng, D), 100, 100, read)
        for name in ATTENTIONS
        for layer in range(2)
    ]


def copies(params, name, invertible, groups=2):
    """Parameters whose heads are the first of their group, each times a matrix of its own."""
    rng = np.random.default_rng(2)
    kernels = dict(kernels_of(params, name))
    for side in ("key", "value"):
        kernel = np.array(kernels[side])
        L, _, N, H = kernel.shape
        maps = np.linalg.qr(rng.normal(size=(L, N, H, H)))[0]
        if invertible:
            maps = (maps * np.geomspace(0.5, 2, H)) @ maps.swapaxes(2, 3)
        first = kernel[:, :, :: N // groups].repeat(N // groups, axis=2)
        kernels[side] = jnp.asarray(np.einsum("LDNH,LNHI->LDNI", first, maps), jnp.float32)
    return with_kernels(params, name, kernels)


@functools.partial(jax.jit, static_argnums=1)
def logits(params, config, batch):
    return Transformer(config).apply({"params": params}, batch)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rotated_and_invertible_copies_convert_without_loss(tiny, random_params, batch, name):
    covariances = covariances_of(tiny)
    for invertible, method in ((False, "procrustes"), (False, "svd"), (True, "svd")):
        params = copies(random_params(tiny), name, invertible)
        before = logits(params, tiny, batch)
        for space in SPACES:
            new, config, _ = convert(
                params, tiny, {name: 2}, method, input_covariances=covariances, space=space
            )
            after = logits(new, config, batch)
            np.testing.assert_allclose(after, before, atol=5e-4, err_msg=f"{method} {space}")
    lossy = convert(params, tiny, {name: 2}, "procrustes", input_covariances=covariances).params
    after = logits(lossy, config, batch)
    assert np.abs(after - before).max() > 1e-2


def test_a_grouped_parent_loses_nothing_either(tiny, random_params, batch):
    """Its heads have several queries each; so 4 heads become 1 in two steps."""
    params, covariances = (
        copies(random_params(tiny), "cross_attention", True, groups=1),
        covariances_of(tiny),
    )
    before = logits(params, tiny, batch)
    new, config, _ = convert(
        params, tiny, {"cross_attention": 2}, "svd", input_covariances=covariances
    )
    new, config, _ = convert(
        new, config, {"cross_attention": 1}, "svd", input_covariances=covariances
    )
    np.testing.assert_allclose(logits(new, config, batch), before, atol=1e-3)


def test_rotating_heads_leaves_the_logits(tiny, random_params, batch):
    """What procrustes does before it pools is a change of coordinates."""
    params = random_params(tiny)
    before = logits(params, tiny, batch)
    for name in ATTENTIONS:
        kernels = kernels_of(params, name)
        turned = {side: np.array(kernel, np.float64) for side, kernel in kernels.items()}
        for layer in range(2):
            for side, partner in (("key", "query"), ("value", "out")):
                heads = turned[side][layer].transpose(1, 0, 2)
                R = closed_form.procrustes(closed_form.gram_matrix(heads, None))
                assert np.abs(R - np.eye(8)).max() > 0.1
                turned[side][layer] = np.einsum("NDH,NHI->DNI", heads, R)
                product = "DNH,NHI->DNI" if partner == "query" else "NHD,NHI->NID"
                turned[partner][layer] = np.einsum(product, turned[partner][layer], R)
        new = {side: jnp.asarray(kernel, jnp.float32) for side, kernel in turned.items()}
        params = with_kernels(params, name, new)
    np.testing.assert_allclose(logits(params, tiny, batch), before, atol=2e-4)


def error(heads, weights, C, method, space):
    """Sum over heads of what `pool`'s approximation misses, in the metric of `space`.

    Partners come back times `up`, with which the group's head is read as each member.
    """
    G, D, H = heads.shape
    partners = np.linalg.cholesky(weights).swapaxes(1, 2)[
        :, None
    ]  # [G, 1, H, H] with P'P = weights
    padded = np.zeros((G, 1, D, H))
    padded[:, :, :H] = partners
    head, new, _ = closed_form.pool(heads, padded, method, space, C, None)
    up = np.linalg.solve(partners, new[:, :, :H])[:, 0]
    missed = heads - head @ up.swapaxes(1, 2)
    by_partners = space in ("logit", "attention")
    root = weights if by_partners else np.broadcast_to(np.eye(H), (G, H, H))
    metric = np.eye(D) if C is None else C
    return np.einsum("GDH,DE,GEI,GHI->", missed, metric, missed, root)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    G=st.integers(1, 5),
    H=st.integers(1, 5),
    space=st.sampled_from(SPACES),
)
def test_svd_is_never_further_off_than_procrustes(seed, G, H, space):
    rng = np.random.default_rng(seed)
    D = H + int(rng.integers(0, 8))
    heads = rng.normal(size=(G, D, H))
    C = None if space == "weight" else spread(rng, D)
    weights = np.stack([spread(rng, H) for _ in range(G)])
    svd, procrustes = (error(heads, weights, C, method, space) for method in closed_form.METHODS)
    assert svd <= procrustes * (1 + 1e-9) + 1e-9


def test_procrustes_is_a_fixed_point_that_beats_no_rotation():
    """Each head is turned to the mean of all as well as a rotation can; the first stays."""
    rng = np.random.default_rng(3)
    heads = rng.normal(size=(5, 12, 4))
    C = spread(rng, 12)
    gram = closed_form.gram_matrix(heads, C)
    R = closed_form.procrustes(gram)
    np.testing.assert_allclose(R[0], np.eye(4), atol=1e-12)
    np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.tile(np.eye(4), (5, 1, 1)), atol=1e-12)
    towards = np.einsum("GHKJ,KJI->GHI", gram, R)
    np.testing.assert_allclose(closed_form.polar(towards), R, atol=1e-3)

    def energy(R):
        mean = np.einsum("GDH,GHI->DI", heads, R)
        return np.trace(mean.T @ C @ mean)

    assert energy(R) > 1.5 * energy(np.tile(np.eye(4), (5, 1, 1)))


def test_a_head_alone_stays_as_it_is():
    rng = np.random.default_rng(4)
    heads, partners = rng.normal(size=(1, 12, 4)), rng.normal(size=(1, 2, 12, 4))
    for method in closed_form.METHODS:
        for space in SPACES:
            head, new, _ = closed_form.pool(heads, partners, method, space, spread(rng, 12), None)
            np.testing.assert_allclose(head, heads[0], atol=1e-9)
            np.testing.assert_allclose(new, partners, atol=1e-9)


def test_shrinkage_keeps_the_trace():
    C = spread(np.random.default_rng(0), 6)
    half = closed_form.shrunk(C, 0.5)
    np.testing.assert_allclose(np.trace(half), np.trace(C))
    np.testing.assert_allclose(closed_form.condition(closed_form.shrunk(C, 1.0)), 1.0)
    assert closed_form.condition(half) < closed_form.condition(C)
    assert closed_form.shrunk(0 * C, 0.5) is None
    np.testing.assert_array_equal(closed_form.shrunk(C, 0.0), C)


def test_procrustes_finds_opposite_heads():
    """Whose plain mean is nothing, so that from no rotation there is nothing to turn them to."""
    rng = np.random.default_rng(5)
    head, C = rng.normal(size=(12, 4)), spread(rng, 12)
    R = closed_form.procrustes(closed_form.gram_matrix(np.stack([head, -head]), C))
    np.testing.assert_allclose(R, [np.eye(4), -np.eye(4)], atol=1e-9)


@pytest.mark.parametrize("H", [2, 4, 8])
def test_procrustes_is_optimal_for_two_heads(H):
    """The best fit of two heads is the nuclear norm of the product of their kernels."""
    for seed in range(20):
        heads = np.random.default_rng(seed).normal(size=(2, 2 * H, H))
        R = closed_form.procrustes(closed_form.gram_matrix(heads, None))
        fit = np.trace((heads[0] @ R[0]).T @ (heads[1] @ R[1]))
        assert fit == pytest.approx(np.linalg.norm(heads[0].T @ heads[1], "nuc"), rel=1e-6)


def test_procrustes_is_no_worse_than_turning_all_heads_to_any_one_of_them():
    for seed in range(20):
        heads = np.random.default_rng(seed).normal(size=(4, 8, 4))
        R = closed_form.procrustes(closed_form.gram_matrix(heads, None))
        size = np.linalg.norm((heads @ R).sum(0))
        for target in heads:
            turned = heads @ closed_form.polar(heads.swapaxes(1, 2) @ target)
            assert size >= np.linalg.norm(turned.sum(0)) - 1e-9
