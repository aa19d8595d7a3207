"""Regrouping is a change of order that leaves the function, and finds heads that are alike."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.attention import grouped_query_attention
from gqa.calibrate import ATTENTIONS, Moment
from gqa.convert import convert
from gqa.convert.grouping import GROUPINGS, orders, permuted, search, similarity
from gqa.convert.tree import kernels_of, with_kernels
from gqa.model import Transformer


@functools.partial(jax.jit, static_argnums=1)
def logits(params, config, batch):
    return Transformer(config).apply({"params": params}, batch)


def moments():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6, 60, 16)) * np.geomspace(0.1, 3, 16)
    C = x.swapaxes(1, 2) @ x / 60
    names = itertools.product(ATTENTIONS, range(2))
    return [Moment(*name, matrix, matrix, 60, 60) for name, matrix in zip(names, C, strict=True)]


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_regrouping_leaves_the_logits(tiny, random_params, batch, grouping):
    params = random_params(tiny)
    heads = dict.fromkeys(ATTENTIONS, 2)
    new = permuted(params, orders(params, heads, grouping, 1, moments()))
    np.testing.assert_allclose(logits(new, tiny, batch), logits(params, tiny, batch), atol=2e-4)
    moved = [
        bool((kernels_of(new, name)["key"] != kernels_of(params, name)["key"]).any())
        for name in ATTENTIONS
    ]
    assert any(moved) == (grouping != "contiguous")


def test_a_grouped_parents_queries_move_with_their_head(tiny, random_params, batch):
    params, config = convert(random_params(tiny), tiny, dict.fromkeys(ATTENTIONS, 2))
    new = params
    for name in ATTENTIONS:
        new = permuted(new, {name: np.array([[1, 0]] * 2)})
    np.testing.assert_allclose(logits(new, config, batch), logits(params, config, batch), atol=2e-4)
    assert (
        kernels_of(new, "cross")["query"][:, :, :2]
        == kernels_of(params, "cross")["query"][:, :, 2:]
    ).all()


def test_layers_that_share_a_bias_move_alike(tiny, random_params):
    order = np.array([[0, 1, 2, 3], [1, 0, 2, 3]])
    permuted(random_params(tiny), {"cross": order})
    with pytest.raises(ValueError, match="share a bias"):
        permuted(random_params(tiny), {"decoder": order})


def test_conversion_is_that_of_an_index_map(tiny, random_params):
    """Heads in their own order, each reading the KV head that a map names, give the same output."""
    params = random_params(tiny)
    x, y = (np.random.default_rng(i).normal(size=(1, 5 + i, 16)).astype(np.float32) for i in (0, 1))
    table = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 5, 6)), jnp.float32)

    def outputs(kernels, bias, layer):
        q, k, v = (
            jnp.einsum("BTD,DNH->BTNH", z, kernels[side][layer])
            for z, side in ((x, "query"), (y, "key"), (y, "value"))
        )
        out = grouped_query_attention(q, k, v, bias)
        return jnp.einsum("BTNH,NHD->BTD", out, kernels["out"][layer])

    members = np.array([[0, 2], [1, 3]])  # what strided groups are
    for name in ATTENTIONS:
        new, _ = convert(params, tiny, {name: 2}, "mean", grouping="strided")
        order = members.reshape(-1)
        old = kernels_of(params, name)
        mapped = dict(old)
        for side in ("key", "value"):
            pooled = old[side][:, :, members].mean(3)
            mapped[side] = pooled[:, :, np.array([0, 1, 0, 1])]
        found = outputs(kernels_of(new, name), table[:, order], 1)
        np.testing.assert_allclose(found, outputs(mapped, table, 1), rtol=1e-4, atol=1e-4)
        stack = ATTENTIONS[name][0]
        columns = order if name != "cross" else np.arange(4)
        np.testing.assert_array_equal(
            new[stack]["position_bias"]["table"],
            params[stack]["position_bias"]["table"][:, columns],
        )


def alike_in_pairs(params, name, turned):
    """Parameters in which heads 0 and 3, and 1 and 2, have like keys and values."""
    rng = np.random.default_rng(7)
    kernels = dict(kernels_of(params, name))
    for side in ("key", "value"):
        kernel = np.array(kernels[side])
        for one, other in ((0, 3), (1, 2)):
            R = np.linalg.qr(rng.normal(size=(8, 8)))[0] if turned else np.eye(8)
            kernel[:, :, other] = kernel[:, :, one] @ R + 0.1 * rng.normal(
                size=kernel[:, :, 0].shape
            )
        kernels[side] = jnp.asarray(kernel, jnp.float32)
    return with_kernels(params, name, kernels)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(
    ("grouping", "turned"),
    [("weight_cos", False), ("act_cos", False), ("act_aligned", False), ("act_aligned", True)],
)
def test_heads_that_are_alike_share_a_group(tiny, random_params, name, grouping, turned):
    params = alike_in_pairs(random_params(tiny), name, turned)
    new = permuted(params, orders(params, {name: 2}, grouping, 0, moments()))
    order = np.array([0, 3, 1, 2])
    np.testing.assert_array_equal(
        kernels_of(new, name)["key"], kernels_of(params, name)["key"][:, :, order]
    )


def test_rotations_hide_likeness_from_plain_cosines(tiny, random_params):
    kernels = kernels_of(alike_in_pairs(random_params(tiny), "cross", turned=True), "cross")
    plain, aligned = (similarity(kernels, 0, None, aligned) for aligned in (False, True))
    assert plain[0, 3] < 1 < 1.8 < aligned[0, 3] <= 2
    np.testing.assert_allclose(plain.diagonal(), 2)
    np.testing.assert_allclose(aligned, aligned.T)


def test_layers_of_cross_attention_are_grouped_apart(tiny, random_params):
    params = random_params(tiny)
    new = permuted(params, orders(params, {"cross": 2, "decoder": 2}, "random", 2))
    found = {}
    for name in ("cross", "decoder"):
        old, moved = (np.array(kernels_of(p, name)["key"][:, 0, :, 0]) for p in (params, new))
        found[name] = [
            np.argmax(o[:, None] == m, axis=0).tolist() for o, m in zip(old, moved, strict=True)
        ]
    assert found["cross"][0] != found["cross"][1]
    assert found["decoder"][0] == found["decoder"][1]


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_the_best_of_all_groupings(seed):
    x = np.random.default_rng(seed).normal(size=(6, 6))
    alike = x + x.T
    found = search(alike, 2, np.random.default_rng(1))

    def total(order):
        return sum(alike[np.ix_(group, group)].sum() for group in (order[:3], order[3:]))

    best = max(total(order) for order in itertools.permutations(range(6)))
    np.testing.assert_allclose(total(found), best)
    assert found[0] == 0
    np.testing.assert_array_equal(np.sort(found), np.arange(6))
