"""Test that regrouping leaves the function as it is, and joins similar heads."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.conversion import convert
from gqa.conversion.attention_kernels import kernels_of, with_kernels
from gqa.conversion.calibration import ATTENTIONS, InputCovariance
from gqa.conversion.grouping import GROUPINGS, find_head_orders, permute_heads, search, similarity
from gqa.model.attention import grouped_query_attention
from gqa.model.transformer import Transformer


@functools.partial(jax.jit, static_argnums=1)
def logits(params, config, batch):
    return Transformer(config).apply({"params": params}, batch)


def input_covariances():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6, 60, 16)) * np.geomspace(0.1, 3, 16)
    C = x.swapaxes(1, 2) @ x / 60
    names = itertools.product(ATTENTIONS, range(2))
    return [
        InputCovariance(*name, matrix, matrix, 60, 60)
        for name, matrix in zip(names, C, strict=True)
    ]


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_regrouping_leaves_the_logits(tiny, random_params, batch, grouping):
    params = random_params(tiny)
    heads = dict.fromkeys(ATTENTIONS, 2)
    new = permute_heads(params, find_head_orders(params, heads, grouping, 1, input_covariances()))
    np.testing.assert_allclose(logits(new, tiny, batch), logits(params, tiny, batch), atol=2e-4)
    moved = [
        bool((kernels_of(new, name)["key"] != kernels_of(params, name)["key"]).any())
        for name in ATTENTIONS
    ]
    assert any(moved) == (grouping != "contiguous")


def test_a_grouped_parents_queries_move_with_their_head(tiny, random_params, batch):
    params, config, _ = convert(random_params(tiny), tiny, dict.fromkeys(ATTENTIONS, 2))
    new = params
    for name in ATTENTIONS:
        new = permute_heads(new, {name: np.array([[1, 0]] * 2)})
    np.testing.assert_allclose(logits(new, config, batch), logits(params, config, batch), atol=2e-4)
    assert (
        kernels_of(new, "cross_attention")["query"][:, :, :2]
        == kernels_of(params, "cross_attention")["query"][:, :, 2:]
    ).all()


def test_layers_that_share_a_bias_move_alike(tiny, random_params):
    order = np.array([[0, 1, 2, 3], [1, 0, 2, 3]])
    permute_heads(random_params(tiny), {"cross_attention": order})
    with pytest.raises(ValueError, match="share a bias"):
        permute_heads(random_params(tiny), {"self_attention": order})


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
        new, *_ = convert(params, tiny, {name: 2}, "mean", grouping="strided")
        order = members.reshape(-1)
        old = kernels_of(params, name)
        mapped = dict(old)
        for side in ("key", "value"):
            pooled = old[side][:, :, members].mean(3)
            mapped[side] = pooled[:, :, np.array([0, 1, 0, 1])]
        actual = outputs(kernels_of(new, name), table[:, order], 1)
        np.testing.assert_allclose(actual, outputs(mapped, table, 1), rtol=1e-4, atol=1e-4)
        stack = ATTENTIONS[name][0]
        columns = order if name != "cross_attention" else np.arange(4)
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
    new = permute_heads(
        params, find_head_orders(params, {name: 2}, grouping, 0, input_covariances())
    )
    order = np.array([0, 3, 1, 2])
    np.testing.assert_array_equal(
        kernels_of(new, name)["key"], kernels_of(params, name)["key"][:, :, order]
    )


def test_rotations_hide_likeness_from_plain_cosines(tiny, random_params):
    kernels = kernels_of(
        alike_in_pairs(random_params(tiny), "cross_attention", turned=True), "cross_attention"
    )
    plain, aligned = (similarity(kernels, 0, None, aligned) for aligned in (False, True))
    assert plain[0, 3] < 1 < 1.8 < aligned[0, 3] <= 2
    np.testing.assert_allclose(plain.diagonal(), 2)
    np.testing.assert_allclose(aligned, aligned.T)


def test_layers_of_cross_attention_are_grouped_apart(tiny, random_params):
    params = random_params(tiny)
    new = permute_heads(
        params, find_head_orders(params, {"cross_attention": 2, "self_attention": 2}, "random", 2)
    )
    actual = {}
    for name in ("cross_attention", "self_attention"):
        old, moved = (np.array(kernels_of(p, name)["key"][:, 0, :, 0]) for p in (params, new))
        actual[name] = [
            np.argmax(o[:, None] == m, axis=0).tolist() for o, m in zip(old, moved, strict=True)
        ]
    assert actual["cross_attention"][0] != actual["cross_attention"][1]
    assert actual["self_attention"][0] == actual["self_attention"][1]


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_the_best_of_all_groupings(seed):
    x = np.random.default_rng(seed).normal(size=(6, 6))
    alike = x + x.T
    actual = search(alike, 2, np.random.default_rng(1))

    def total(order):
        return sum(alike[np.ix_(group, group)].sum() for group in (order[:3], order[3:]))

    best = max(total(order) for order in itertools.permutations(range(6)))
    np.testing.assert_allclose(total(actual), best)
    assert actual[0] == 0
    np.testing.assert_array_equal(np.sort(actual), np.arange(6))


def pairs_by_layer(params, name, layers):
    """Parameters in which each layer has its own pairs of like heads, and noise of its own."""
    rng = np.random.default_rng(8)
    kernels = dict(kernels_of(params, name))
    for side in ("key", "value"):
        kernel = np.array(kernels[side])
        for layer, (pairs, noise) in enumerate(layers):
            for one, other in pairs:
                far = noise * rng.normal(size=kernel[layer, :, 0].shape)
                kernel[layer, :, other] = kernel[layer, :, one] + far
        kernels[side] = jnp.asarray(kernel, jnp.float32)
    return with_kernels(params, name, kernels)


@pytest.mark.parametrize("sure", [0, 1])
def test_layers_that_share_an_order_decide_by_the_sum_of_their_similarities(
    tiny, random_params, sure
):
    """Self-attention goes by the layer whose heads are alike more; cross-attention by each."""
    ways = [((0, 2), (1, 3)), ((0, 3), (1, 2))]
    layers = [(pairs, 0.01 if i == sure else 0.6) for i, pairs in enumerate(ways)]
    expected = [[0, 2, 1, 3], [0, 3, 1, 2]]
    params = pairs_by_layer(random_params(tiny), "self_attention", layers)
    actual = find_head_orders(params, {"self_attention": 2}, "weight_cos")["self_attention"]
    np.testing.assert_array_equal(actual, [expected[sure]] * 2)
    params = pairs_by_layer(random_params(tiny), "cross_attention", layers)
    actual = find_head_orders(params, {"cross_attention": 2}, "weight_cos")["cross_attention"]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("grouping", ["act_cos", "act_aligned"])
def test_heads_are_alike_where_their_inputs_move(tiny, random_params, grouping):
    """Heads 0 and 3 agree in what keys read; by weights, or what queries read, 0 and 2 do."""
    params = random_params(tiny)
    kernels = dict(kernels_of(params, "cross_attention"))
    for side in ("key", "value"):
        kernel = np.array(kernels[side])
        kernel[:, :4, 3], kernel[:, :4, 2] = kernel[:, :4, 0], kernel[:, :4, 1]
        kernel[:, 4:, 2], kernel[:, 4:, 3] = kernel[:, 4:, 0], kernel[:, 4:, 1]
        kernels[side] = jnp.asarray(kernel)
    params = with_kernels(params, "cross_attention", kernels)
    read, other = (np.diag(np.where(np.arange(16) < 4, a, b)) for a, b in ((1, 0.01), (0.01, 1)))
    covariances = [
        InputCovariance("cross_attention", layer, read, other, 60, 60) for layer in range(2)
    ]
    actual = find_head_orders(params, {"cross_attention": 2}, grouping, 0, covariances)[
        "cross_attention"
    ]
    np.testing.assert_array_equal(actual, [[0, 3, 1, 2]] * 2)
    actual = find_head_orders(params, {"cross_attention": 2}, "weight_cos")["cross_attention"]
    np.testing.assert_array_equal(actual, [[0, 2, 1, 3]] * 2)


def test_similarity_is_the_sum_of_two_cosines(tiny, random_params):
    """Of keys and of values as long vectors; rotations can only bring heads nearer."""
    kernels = {
        side: np.array(x) for side, x in kernels_of(random_params(tiny), "cross_attention").items()
    }
    kernels["value"][1, :, 3] = 0
    rng = np.random.default_rng(9)
    root = rng.normal(size=(16, 16))
    plain, aligned = (similarity(kernels, 1, root.T @ root, a) for a in (False, True))
    expected, best = np.zeros((4, 4)), np.zeros((4, 4))
    for side, one, other in itertools.product(("key", "value"), range(4), range(4)):
        x, y = (root @ kernels[side][1, :, n] for n in (one, other))
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        if norms:  # a head of zeros is like none
            expected[one, other] += (x * y).sum() / norms
            best[one, other] += np.linalg.svd(x.T @ y)[1].sum() / norms
    np.testing.assert_allclose(plain, expected, atol=1e-6)
    np.testing.assert_allclose(aligned, best, atol=1e-6)


def test_strided_groups_take_every_kth_head_and_random_ones_go_by_seed(tiny, random_params):
    params = random_params(tiny)
    actual = find_head_orders(
        params, {"cross_attention": 2, "self_attention": 1, "encoder": 4}, "strided"
    )
    assert actual.keys() == {"cross_attention", "self_attention"}
    np.testing.assert_array_equal(actual["cross_attention"], [[0, 2, 1, 3]] * 2)
    np.testing.assert_array_equal(actual["self_attention"], [[0, 1, 2, 3]] * 2)
    six = {"decoder": {"layers": {"cross_attention": {"key": np.zeros((1, 2, 6, 2))}}}}
    for K, order in {2: [0, 2, 4, 1, 3, 5], 3: [0, 3, 1, 4, 2, 5]}.items():
        actual = find_head_orders(six, {"cross_attention": K}, "strided")["cross_attention"]
        np.testing.assert_array_equal(actual, [order])
    draws = [
        find_head_orders(params, {"cross_attention": 2}, "random", seed)["cross_attention"]
        for seed in (0, 0, 1, 2)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert len({str(draw) for draw in draws}) > 1


@pytest.mark.parametrize("seed", range(12))
def test_the_search_is_as_good_in_groups_of_pairs(seed):
    """Against every way to pair eight heads."""
    x = np.random.default_rng(seed).normal(size=(8, 8))
    alike = x + x.T

    def pairings(heads):
        if not heads:
            yield []
        for partner in heads[1:]:
            rest = [h for h in heads[1:] if h != partner]
            yield from ([(heads[0], partner), *others] for others in pairings(rest))

    def total(pairs):
        return sum(alike[one, other] for one, other in pairs)

    actual = search(alike, 4, np.random.default_rng(seed)).reshape(4, 2)
    best = max(total(pairs) for pairs in pairings(list(range(8))))
    assert total(actual) == pytest.approx(best)
    assert (actual[:, 0] < actual[:, 1]).all()
    assert (np.diff(actual[:, 0]) > 0).all()
