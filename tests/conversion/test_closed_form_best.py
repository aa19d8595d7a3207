"""Test that closed forms reach the least possible error, measured on a layer's kernels."""

import itertools

import numpy as np
import pytest

from gqa.conversion import closed_form
from gqa.conversion.calibration import InputCovariance
from tests.conversion.test_closed_form import attended_by, spread

D, H, K, G, P = 12, 3, 2, 2, 2  # inputs, numbers a head, groups, heads a group, queries a head


def layer_of(seed):
    """One layer's kernels, and its covariances, those of queries unlike those of keys."""
    rng = np.random.default_rng(seed)
    kernels = {
        "query": rng.normal(size=(D, K * G * P, H)) * rng.uniform(0.3, 3, (K * G * P, H)),
        "key": rng.normal(size=(D, K * G, H)),
        "value": rng.normal(size=(D, K * G, H)),
        "out": rng.normal(size=(K * G * P, H, D)) * rng.uniform(0.3, 3, (K * G * P, H, 1)),
    }
    return kernels, InputCovariance(
        *("self_attention", 0, spread(rng, D), spread(rng, D)[::-1, ::-1], 100, 100),
        attended_by(K * G * P, D, seed),
    )


def root(C):
    """A matrix R with R'R = C."""
    return np.eye(D) if C is None else np.linalg.cholesky(C).T


def maps(kernels, side):
    """What each query head does with a key or a value, [N, D, D], and its head [D, H] there."""
    partner = kernels["query"].transpose(1, 2, 0) if side == "key" else kernels["out"]
    heads = kernels[side].transpose(1, 0, 2)
    heads = np.repeat(heads, len(partner) // len(heads), 0)
    return heads @ partner


def tail(matrices):
    """Energy of matrices [n, D, m] side by side beyond H singular values, and all of it."""
    values = np.square(np.linalg.svd(np.concatenate(matrices, 1))[1])
    return values[H:].sum(), values.sum()


def by_group(matrices):
    return np.split(np.asarray(matrices), K)


def metrics(side, space, covariance):
    """Roots of the covariances left and right of a head's map."""
    left = None if space == "weight" else covariance.keys
    if space == "attention":
        share = 0.01 * np.trace(covariance.attended.keys) / np.trace(left)
        left = covariance.attended.keys + share * left
    right = covariance.queries if side == "key" else None
    return root(left), root(right)


def bounds(kernels, side, space, covariance):
    """The least error of one head a group, and the whole energy, [2] for each group."""
    left, right = metrics(side, space, covariance)
    if space == "attention" and side == "value":
        # The mean of what the group's query heads attend to.
        means = covariance.attended.values.reshape(K, G * P, D, D).mean(1)
        groups = zip(means, by_group(maps(kernels, side)), strict=True)
        return np.array([tail(root(mean) @ group) for mean, group in groups])
    if space in ("logit", "attention"):
        return np.array([tail(left @ m @ right.T) for m in by_group(maps(kernels, side))])
    return np.array([tail(left @ m) for m in by_group(kernels[side].transpose(1, 0, 2))])


def partners(kernels, side):
    """Queries, or outputs transposed, [N, D, H]."""
    if side == "key":
        return kernels["query"].transpose(1, 0, 2)
    return kernels["out"].transpose(0, 2, 1)


def errors(old, new, side, space, covariance):
    """How far the new kernels are from the old ones in a space, for each group."""
    left, right = metrics(side, space, covariance)
    if space in ("logit", "attention"):
        missed = left @ (maps(old, side) - maps(new, side)) @ right.T
    else:
        # A query head was multiplied by `up`: its KV head's approximation is the new head by up'.
        up = np.linalg.pinv(partners(old, side)) @ partners(new, side)
        before = np.repeat(old[side].transpose(1, 0, 2), P, 0)
        after = np.repeat(new[side].transpose(1, 0, 2), G * P, 0)
        missed = left @ (before - after @ up.swapaxes(1, 2)) / P**0.5
    return np.array([np.square(group).sum() for group in by_group(missed)])


@pytest.mark.parametrize("space", closed_form.SPACES)
@pytest.mark.parametrize("seed", range(3))
def test_svd_reaches_the_least_error_of_any_head(space, seed):
    kernels, covariance = layer_of(seed)
    given = covariance._replace(keys=None, queries=None) if space == "weight" else covariance
    new, _ = closed_form.convert_layer(kernels, K, "svd", space, given, 0.0)
    # In the space "attention" a group's values have no one metric; see the next test.
    for side in ("key",) if space == "attention" else ("key", "value"):
        least = bounds(kernels, side, space, covariance if space != "weight" else given)[:, 0]
        actual = errors(kernels, new, side, space, covariance if space != "weight" else given)
        np.testing.assert_allclose(actual, least, rtol=1e-3, err_msg=side)


@pytest.mark.parametrize("seed", range(3))
def test_each_query_head_reads_the_new_values_as_well_as_it_can(seed):
    """Better than with the group's mean covariance, and no change of the output kernel helps."""
    kernels, covariance = layer_of(seed)
    new, _ = closed_form.convert_layer(kernels, K, "svd", "attention", covariance, 0.0)
    read = covariance.attended.values

    def error(made, metrics):
        """What each query head adds to the output in error, given what it attends to."""
        missed = maps(kernels, "value") - maps(made, "value")
        return np.einsum("NDE,NDF,NFE->N", missed, metrics, missed)

    # As if all query heads of a group attended to the same: then svd is the best there is.
    means = np.repeat(read.reshape(K, G * P, D, D).mean(1), G * P, 0)
    alike = covariance._replace(attended=covariance.attended._replace(values=means))
    start, _ = closed_form.convert_layer(kernels, K, "svd", "attention", alike, 0.0)
    least = bounds(kernels, "value", "attention", covariance)[:, 0]
    np.testing.assert_allclose(error(start, means).reshape(K, -1).sum(1), least, rtol=1e-3)

    best = error(new, read)
    assert (best <= error(start, read) * (1 + 1e-4)).all()
    assert best.sum() < 0.99 * error(start, read).sum()
    rng = np.random.default_rng(seed)
    for _ in range(5):
        up = np.eye(H) + 0.02 * rng.normal(size=(K * G * P, H, H))
        assert (error(new | {"out": up @ new["out"]}, read) >= best * (1 - 1e-4)).all()


@pytest.mark.parametrize("space", closed_form.SPACES)
def test_discarded_is_the_share_beyond_the_singular_values_kept(space):
    kernels, covariance = layer_of(3)
    given = covariance._replace(keys=None, queries=None) if space == "weight" else covariance
    actual = closed_form.discarded_energy(kernels, K, space, given, 0.0)
    expected = 0.0
    for side in ("key", "value"):
        lost, whole = bounds(kernels, side, space, given).sum(0)
        expected += lost / whole
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(
        closed_form.discarded_energy(kernels, K * G, space, given, 0.0), 0, atol=1e-9
    )
    zeros = {name: np.zeros_like(x) for name, x in kernels.items()}
    assert closed_form.discarded_energy(zeros, K, space, given, 0.0) == 0.0


def test_procrustes_turns_the_second_of_two_heads_to_the_first():
    """The best rotation of two: U V' of the singular vectors of their product in the metric."""
    kernels, covariance = layer_of(4)
    rng = np.random.default_rng(5)
    for side, group in itertools.product(("key", "value"), range(K)):
        first = kernels[side][:, G * group]
        near = first @ np.linalg.qr(rng.normal(size=(H, H)))[0]
        kernels[side][:, G * group + 1] = near + 0.3 * rng.normal(size=first.shape)
    for C in (covariance.keys, None):
        new, worst = closed_form.convert_layer(
            kernels, K, "procrustes", "activation", covariance._replace(keys=C), 0.0
        )
        assert worst == pytest.approx(1.0 if C is None else np.linalg.cond(C))
        for side, group in itertools.product(("key", "value"), range(K)):
            one, other = (kernels[side][:, G * group + g] for g in range(G))
            U, _, Vh = np.linalg.svd(other.T @ (one if C is None else C @ one))
            expected = (one + other @ U @ Vh) / 2
            np.testing.assert_allclose(new[side][:, group], expected, atol=1e-4)
            turned = partners(kernels, side)[G * P * group + P :][:P] @ U @ Vh
            actual = partners(new, side)[G * P * group + P :][:P]
            np.testing.assert_allclose(actual, turned, atol=1e-3)


@pytest.mark.parametrize("space", ["activation", "logit"])
def test_shrinkage_mixes_both_moments_with_the_identity_first(space):
    kernels, covariance = layer_of(6)

    def mixed(C):
        return 0.7 * C + 0.3 * np.trace(C) / D * np.eye(D)

    by_hand = covariance._replace(keys=mixed(covariance.keys), queries=mixed(covariance.queries))
    actual, _ = closed_form.convert_layer(kernels, K, "svd", space, covariance, 0.3)
    expected, _ = closed_form.convert_layer(kernels, K, "svd", space, by_hand, 0.0)
    without, _ = closed_form.convert_layer(kernels, K, "svd", space, covariance, 0.0)
    for name in kernels:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-4)
        assert np.abs(actual[name] - without[name]).max() > 1e-2
    lost = [
        closed_form.discarded_energy(kernels, K, space, *x)
        for x in ((covariance, 0.3), (by_hand, 0.0))
    ]
    assert lost[0] == pytest.approx(lost[1])


def test_the_first_heads_block_of_singular_vectors_is_symmetric():
    """Nearest to leaving that head as it is; the vectors stay orthonormal."""
    rng = np.random.default_rng(7)
    heads = rng.normal(size=(3, D, H))
    V = closed_form.svd(closed_form.gram_matrix(heads, None), np.broadcast_to(np.eye(H), (3, H, H)))
    np.testing.assert_allclose(np.einsum("GHI,GHJ->IJ", V, V), np.eye(H), atol=1e-9)
    np.testing.assert_allclose(V[0], V[0].T, atol=1e-9)
    assert np.linalg.eigvalsh(V[0]).min() > 0
    # They are those of the largest singular values.
    kept = np.square(np.einsum("GDH,GHI->DI", heads, V)).sum()
    np.testing.assert_allclose(
        kept, np.square(np.linalg.svd(np.concatenate(heads, 1))[1][:H]).sum()
    )


def test_a_new_head_weighs_its_members_by_orthogonal_columns():
    """Keys are not stretched by the queries' roots; the queries take that."""
    rng = np.random.default_rng(8)
    heads, queries = rng.normal(size=(2, D, H)), rng.normal(size=(2, 1, D, H)) * [0.1, 1, 10]
    head, _, _ = closed_form.pool(heads, queries, "svd", "logit", None, None)
    down = np.linalg.pinv(np.concatenate(heads, 1)) @ head  # [G * H, H]
    product = down.T @ down
    np.testing.assert_allclose(product, product[0, 0] * np.eye(H), atol=1e-6 * product[0, 0])


def test_roots_and_conditions_are_those_of_known_matrices():
    assert closed_form.condition(np.diag([2.0, 3.0, 8.0])) == pytest.approx(4)
    assert closed_form.condition(np.diag([0.0, 3.0])) == np.inf
    root, inverse, worst = closed_form.roots(np.stack([np.diag([9.0, 4.0]), np.diag([1e-30, 1.0])]))
    np.testing.assert_allclose(root[0], np.diag([3, 2]))
    np.testing.assert_allclose(inverse[0], np.diag([1 / 3, 1 / 2]))
    # Raised to 1e-9 of the largest eigenvalue of both, 9.
    np.testing.assert_allclose(np.diag(root[1]) ** 2, [9e-9, 1.0])
    assert worst > 1e9
    np.testing.assert_array_equal(closed_form.roots(np.zeros((1, 2, 2)))[0], [np.eye(2)])
