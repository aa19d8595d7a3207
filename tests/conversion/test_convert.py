"""Test conversion: identity at equal heads, lossless for tied heads, other leaves untouched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.conversion import (
    ATTENTIONS,
    GROUPINGS,
    METHODS,
    calibration,
    check,
    convert,
    needs_input_covariances,
    query_scale,
)
from gqa.conversion.grouping import find_head_orders, permute_covariances, permute_heads
from gqa.model.transformer import Transformer, init_params
from gqa.runtime.errors import UserError
from tests.conversion.test_closed_form import attended_by

LOSSLESS = [method for method in METHODS if method != "random"]
ALL = tuple(ATTENTIONS)


@pytest.fixture
def params(tiny):
    return init_params(tiny, 0)


@functools.partial(jax.jit, static_argnums=1)
def logits(params, config, batch):
    return Transformer(config).apply({"params": params}, batch)


def some_covariances(layers=2, d_model=16):
    """Moments of correlated inputs, without running a network."""
    rng = np.random.default_rng(5)
    read = attended_by(4, d_model)

    def draw():
        x = rng.normal(size=(60, d_model)) * np.geomspace(0.1, 3, d_model)
        return x.T @ x / len(x)

    return [
        calibration.InputCovariance(name, layer, draw(), draw(), 60, 60, read)
        for name in ATTENTIONS
        for layer in range(layers)
    ]


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
    renorm = method not in ("weighted", "fuse")
    new, config, _ = convert(params, tiny, tiny.num_heads, method, grouping="random", renorm=renorm)
    assert config == tiny
    jax.tree.map(np.testing.assert_array_equal, new, params)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_identical_heads_convert_without_loss(tiny, random_params, batch, name, groups):
    tied = tie(random_params(tiny), name, groups)
    before = logits(tied, tiny, batch)
    for method in LOSSLESS:
        for renorm in (False, True) if method not in ("weighted", "fuse") else (False,):
            new, config, _ = convert(
                tied,
                tiny,
                {name: groups},
                method,
                input_covariances=some_covariances(),
                renorm=renorm,
            )
            after = logits(new, config, batch)
            np.testing.assert_allclose(after, before, atol=2e-4, err_msg=method)


def test_mean_and_first_take_neighbouring_heads(tiny, params):
    old = kernels(params, "cross_attention")["value"]
    new = kernels(convert(params, tiny, 2, "mean").params, "cross_attention")["value"]
    np.testing.assert_allclose(new[:, :, 1], (old[:, :, 2] + old[:, :, 3]) / 2, atol=1e-6)
    new = kernels(convert(params, tiny, 2, "first").params, "cross_attention")["value"]
    np.testing.assert_array_equal(new[:, :, 1], old[:, :, 2])


def test_random_draws_from_the_initialiser_by_seed(tiny, params):
    draws = [convert(params, tiny, 2, "random", seed).params for seed in (0, 0, 1)]
    first, again, other = (kernels(p, "self_attention") for p in draws)
    np.testing.assert_array_equal(first["key"], again["key"])
    assert (first["key"] != other["key"]).all()
    assert (first["key"] != first["value"]).all()
    assert (first["key"] != kernels(draws[0], "cross_attention")["key"]).all()
    assert (first["key"][0] != first["key"][1]).all()
    std = tiny.d_model**-0.5
    assert 0.8 * std < float(first["key"].std()) < 1.2 * std


def test_only_decoder_keys_and_values_change_by_default(tiny, params):
    new, config, _ = convert(params, tiny, 1)
    assert (config.num_kv_heads_encoder, config.num_kv_heads_self_attention) == (4, 1)
    assert config.num_kv_heads_cross_attention == 1
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
    direct, config, _ = convert(params, tiny, 1, "mean")
    two, two_config, _ = convert(params, tiny, 2, "mean")
    twice, twice_config, _ = convert(two, two_config, 1, "mean")
    assert twice_config == config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), twice, direct)


def test_select_takes_whole_heads(tiny, params):
    """Keys and values of one head; the medoid is nearest to the others, the largest is largest."""
    kernel = np.zeros((2, 16, 4, 8), np.float32)
    kernel[:, 0, :, 0] = [[5, 1, 2, -3], [1, 2, -4, 3]]  # heads of both layers
    cross = kernels(params, "cross_attention")
    cross["key"], cross["value"] = jnp.asarray(kernel), jnp.asarray(2 * kernel)
    for method, chosen in {"largest": [5, -4], "medoid": [1, 1]}.items():
        new = kernels(convert(params, tiny, 1, method).params, "cross_attention")
        np.testing.assert_array_equal(new["key"][:, 0, 0, 0], chosen)
        np.testing.assert_array_equal(new["value"][:, 0, 0, 0], 2 * np.array(chosen))
    cross["value"] = cross["value"].at[:, 0, 3, 0].set(100)
    new = kernels(convert(params, tiny, 1, "largest").params, "cross_attention")
    np.testing.assert_array_equal(new["key"][:, 0, 0, 0], [-3, 3])


def test_renorm_gives_the_members_mean_norm(tiny, params):
    def norms(kernel, groups):
        norms = np.linalg.norm(np.asarray(kernel), axis=(1, 3))
        return norms.reshape(len(norms), groups, -1).mean(2)

    old = kernels(params, "self_attention")
    for method in ("mean", "procrustes"):
        plain, scaled = (
            kernels(
                convert(params, tiny, 2, method, space="weight", renorm=r).params, "self_attention"
            )
            for r in (False, True)
        )
        for side in ("key", "value"):
            np.testing.assert_allclose(norms(scaled[side], 2), norms(old[side], 2), rtol=1e-5)
            assert (norms(plain[side], 2) < 0.95 * norms(old[side], 2)).all()


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_grouping_composes_with_every_method(tiny, random_params, grouping):
    """It is another order of heads, then the method on neighbours."""
    params, covariances = random_params(tiny), some_covariances()
    heads = {"encoder": 2, "self_attention": 2, "cross_attention": 1}
    orders = find_head_orders(params, heads, grouping, 3, covariances)
    moved = permute_heads(params, orders)
    for method in ("mean", "random", "medoid", "svd", "prune"):
        how = {"space": "attention"} if method == "svd" else {}
        how["input_covariances"] = covariances
        one = convert(params, tiny, heads, method, 3, grouping=grouping, **how).params
        how["input_covariances"] = list(permute_covariances(covariances, orders))
        other = convert(moved, tiny, heads, method, 3, **how).params
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.filterwarnings("ignore:covariances of layer")  # of few tokens
@pytest.mark.parametrize(("method", "space"), [("prune", "logit"), ("svd", "attention")])
def test_what_heads_attend_to_moves_with_them(tiny, random_params, batch, method, space):
    """Covariances of the parent give what covariances of the reordered parent give."""
    params = random_params(tiny)
    orders = find_head_orders(params, {"self_attention": 2, "cross_attention": 2}, "strided")
    of_parent, of_moved = (
        list(calibration.input_covariances(p, tiny, [batch], attended=True))
        for p in (params, permute_heads(params, orders))
    )
    for one, other in zip(permute_covariances(of_parent, orders), of_moved, strict=True):
        np.testing.assert_allclose(one.attended.values, other.attended.values, atol=1e-4)
        np.testing.assert_allclose(one.attended.keys, other.attended.keys, atol=1e-4)

    how = {"space": space, "grouping": "strided", "shrinkage": 0.3}
    one = convert(params, tiny, 2, method, input_covariances=of_parent, **how).params
    without = [m._replace(attended=None) for m in of_parent]
    with pytest.raises(UserError, match=r"of self_attention in layer 0 .* attended=True$"):
        convert(params, tiny, 2, method, input_covariances=without, **how)
    sequential = convert(params, tiny, 2, method, batches=[batch], **how).params
    one, other = (kernels(p, "self_attention") for p in (one, sequential))
    for side in ("key", "value", "query", "out"):
        np.testing.assert_allclose(one[side][0], other[side][0], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_again(tiny, random_params, method):
    draws = [
        convert(
            random_params(tiny),
            tiny,
            2,
            method,
            s,
            grouping="random",
            input_covariances=some_covariances(),
        )
        for s in (4, 4, 5)
    ]
    jax.tree.map(np.testing.assert_array_equal, draws[0][0], draws[1][0])
    first, other = (kernels(draw[0], "cross_attention")["key"] for draw in (draws[0], draws[2]))
    assert not np.allclose(first, other)


def test_batches_convert_layer_by_layer(tiny, random_params, batch):
    """The first layer's attention is as with covariances of the parent; what follows is not."""
    params = random_params(tiny)
    covariances = list(calibration.input_covariances(params, tiny, [batch], ALL))
    heads = dict.fromkeys(ATTENTIONS, 2)
    # Few tokens: the warning is about what the next test tests.
    with pytest.warns(UserWarning, match="condition number"):
        parallel, config, _ = convert(params, tiny, heads, "svd", input_covariances=covariances)
    with pytest.warns(UserWarning, match="condition number"):
        sequential, same, _ = convert(params, tiny, heads, "svd", batches=[batch])
    assert config == same
    assert jax.tree.map(jnp.shape, parallel) == jax.tree.map(jnp.shape, sequential)
    one, other = (kernels(p, "encoder")["key"] for p in (parallel, sequential))
    np.testing.assert_allclose(one[0], other[0], atol=1e-5)
    assert np.abs(one[1] - other[1]).max() > 0.01
    one, other = (kernels(p, "self_attention")["key"] for p in (parallel, sequential))
    np.testing.assert_allclose(one[0], other[0], atol=1e-5)  # reads embeddings
    one, other = (kernels(p, "cross_attention")["key"] for p in (parallel, sequential))
    assert np.abs(one[0] - other[0]).max() > 0.01


def test_batches_go_with_a_grouping_by_activations(tiny, random_params, batch):
    params = tie(random_params(tiny), "self_attention", 4)
    order = np.array([0, 2, 1, 3])  # heads 0 and 2, and 1 and 3, are copies
    decoder = kernels(params, "self_attention")
    for side in ("key", "value"):
        decoder[side] = tie(params, "self_attention", 2)["decoder"]["layers"]["self_attention"][
            side
        ][:, :, order]
    with pytest.warns(UserWarning, match="condition number"):
        new, config, _ = convert(
            params, tiny, {"self_attention": 2}, "svd", batches=[batch], grouping="act_cos"
        )
    np.testing.assert_allclose(logits(new, config, batch), logits(params, tiny, batch), atol=2e-4)


def of_rank(rank):
    """Moments that only `rank` tokens have made."""
    x = np.random.default_rng(6).normal(size=(rank, 16))
    C = x.T @ x / max(rank, 1)
    return [m._replace(keys=C, queries=C) for m in some_covariances()]


def without(params, heads):
    """Parameters whose `heads` ask for nothing and add nothing, in the decoder."""
    params = jax.tree.map(lambda x: x, params)
    for name in ("self_attention", "cross_attention"):
        kernel = kernels(params, name)
        kernel["query"] = kernel["query"].at[:, :, heads].set(0)
        kernel["out"] = kernel["out"].at[:, heads].set(0)
    return params


@pytest.mark.parametrize("shrinkage", [0.0, 0.01])
@pytest.mark.parametrize(
    ("method", "rank", "dead"),
    [
        ("svd", 0, []),
        ("svd", 3, []),
        ("svd", 60, [1]),
        ("svd", 60, [0, 1, 2, 3]),
        ("procrustes", 0, []),
        ("procrustes", 3, [0]),
    ],
)
def test_degenerate_moments_warn_and_give_finite_weights(
    tiny, random_params, batch, method, rank, dead, shrinkage
):
    """No token, fewer than dimensions, dead heads."""
    params = without(random_params(tiny), np.array(dead, int))
    with pytest.warns(UserWarning, match=r"attention '\w+' have condition number (inf|\d\S+):"):
        new, config, _ = convert(
            params, tiny, 2, method, input_covariances=of_rank(rank), shrinkage=shrinkage
        )
    assert np.isfinite(logits(new, config, batch)).all()
    if shrinkage:
        assert max(x.max() for x in query_scale(params, new).values()) < 10


def test_query_scale_is_of_root_mean_squares(tiny, params):
    new = jax.tree.map(lambda x: x, params)
    cross = kernels(new, "cross_attention")
    cross["query"] = cross["query"] * jnp.array([2.0, 3.0]).reshape(2, 1, 1, 1)
    scale = query_scale(params, new)
    np.testing.assert_allclose(scale["cross_attention"], [2, 3], rtol=1e-6)
    np.testing.assert_array_equal(scale["self_attention"], [1, 1])
    every = np.arange(4)
    np.testing.assert_array_equal(
        query_scale(without(params, every), new)["cross_attention"], [1, 1]
    )


def test_svd_keeps_the_size_of_keys(tiny, random_params):
    params = random_params(tiny)
    new = convert(params, tiny, 1, "svd", input_covariances=some_covariances()).params
    for name in ("self_attention", "cross_attention"):
        for side in ("key", "value"):
            old = np.linalg.norm(np.asarray(kernels(params, name)[side]), axis=(1, 3)).mean(1)
            actual = np.linalg.norm(np.asarray(kernels(new, name)[side]), axis=(1, 3))[:, 0]
            np.testing.assert_allclose(actual, old, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (("mean",), False),
        (("svd", "weight"), False),
        (("svd", "activation"), True),
        (("procrustes", "logit"), True),
        (("mean", "weight", "act_cos"), True),
        (("first", "logit", "weight_cos"), False),
        (("prune", "weight"), True),
    ],
)
def test_what_needs_input_covariances_says_so(tiny, params, arguments, needed):
    assert needs_input_covariances(*arguments) == needed
    keys = dict(zip(("method", "space", "grouping"), arguments, strict=False))
    check(tiny, {"self_attention": 2}, **keys)
    check(tiny, {"self_attention": 4}, **keys, calibrated=False)
    if needed:
        with pytest.raises(
            UserError, match=r"^(method|grouping)=.*give input_covariances, or calibration batches$"
        ):
            convert(params, tiny, 2, **keys)


def test_covariances_of_no_layer_are_refused(tiny, params):
    with pytest.raises(ValueError, match="covariances of 0 layers of 2 for self"):
        convert(params, tiny, 2, "svd", input_covariances=iter([]))


def test_moments_of_other_layers_are_refused(tiny, params):
    covariances = [m for m in some_covariances() if m.attention != "cross_attention"]
    with pytest.raises(ValueError, match="covariances of 0 layers of 2 for cross"):
        convert(params, tiny, 2, "svd", input_covariances=covariances)


@pytest.mark.parametrize(
    ("num_kv_heads", "method", "message"),
    [
        (
            3,
            "mean",
            "num_kv_heads_self_attention=3 does not divide num_heads=4; use one of 1, 2, 4",
        ),
        (0, "mean", "num_kv_heads_self_attention=0 does not divide"),
        (2, "median", "^method='median'; use one of mean, first, random"),
        (2, "svd", "^method='svd' weighs"),
        ({"self": 2}, "mean", "no attention 'self'.*encoder, self_attention, cross_attention"),
    ],
)
def test_what_cannot_be_converted_is_refused(tiny, params, num_kv_heads, method, message):
    with pytest.raises(UserError, match=message):
        convert(params, tiny, num_kv_heads, method)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"space": "keys"}, "^space='keys'; use one of weight, activation, logit"),
        ({"grouping": "near"}, "^grouping='near'; use one of contiguous, strided"),
        ({"method": "fuse", "renorm": True}, "^renorm=True does not go with .*'fuse'"),
    ],
)
def test_what_does_not_exist_or_go_together_is_refused(tiny, params, keys, message):
    with pytest.raises(UserError, match=message):
        convert(params, tiny, 2, **keys)
