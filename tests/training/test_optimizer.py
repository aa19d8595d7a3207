"""Test that Adafactor sees T5's matrices, and that conversion maps its moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gqa import conversion
from gqa.conversion import grouping, optimizer_state
from gqa.conversion.optimizer_state import convert_optimizer_state, pool_moments
from gqa.model.config import Config
from gqa.model.transformer import init_params
from gqa.runtime.errors import UserError
from gqa.training import optimizer as optimizers


@pytest.fixture(scope="module")
def wide() -> Config:
    """Wide enough that Adafactor factors the moments: both sides of a kernel are 128 or more."""
    heads = {f"num_kv_heads_{name}": 16 for name in conversion.ATTENTIONS}
    return Config(130, 128, 132, 16, 16, 2, 2, **heads)


@pytest.fixture(scope="module")
def params(wide):
    return init_params(wide, 0)


def normal_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


def two_updates(optimizer, params, grads):
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for g in grads:
        updates, state = update(g, state, params)
    return updates, state


@pytest.fixture(scope="module")
def trained(params):
    """Two gradients, the last updates and the state after them."""
    grads = [normal_like(params, seed) for seed in (1, 2)]
    return grads, *two_updates(optimizers.adafactor(), params, grads)


@pytest.mark.parametrize(
    ("path", "matrix"),
    [
        (("decoder", "layers", "self_attention", "query"), (128, 256)),
        (("decoder", "layers", "cross_attention", "out"), (256, 128)),
        (("encoder", "layers", "mlp", "wi_0"), (128, 132)),
        (("encoder", "layers", "mlp_norm", "scale"), (128,)),
    ],
)
def test_each_layer_is_its_own_matrix_to_optax(params, trained, path, matrix):
    grads, ours, _ = trained
    reference = optax.adafactor(learning_rate=1.0, min_dim_size_to_factor=128)
    for layer in range(2):

        def leaf(tree, layer=layer):
            for name in path:
                tree = tree[name]
            return tree[layer].reshape(matrix)

        expected, _ = two_updates(reference, leaf(params), [leaf(g) for g in grads])
        np.testing.assert_allclose(-leaf(ours), expected, rtol=2e-5, atol=1e-7)


def test_moments_are_factored_where_t5_factors_them(params):
    state = optimizers.adafactor().init(params)
    moments = state["decoder"]["layers"]["self_attention"]["key"][0]
    assert moments.v_row.shape == (2, 128)
    assert moments.v_col.shape == (2, 256)
    assert state["embedding"][0].v_row.shape == (128,)
    assert state["decoder"]["position_bias"]["table"][0].v.shape == (32, 16)


def test_rates():
    rate = optimizers.rsqrt(warmup=100, scale=2.0)
    np.testing.assert_allclose(rate(jnp.int32(0)), 0.2)
    np.testing.assert_allclose(rate(jnp.int32(100)), 0.2)
    np.testing.assert_allclose(rate(jnp.int32(400)), 0.1)
    assert optimizers.constant(1e-3)(jnp.int32(7)) == np.float32(1e-3)


@pytest.mark.parametrize("num_kv_heads", [16, 8, 1])
@pytest.mark.parametrize("how", ["map", "reset"])
def test_converted_state_fits_the_converted_parameters(wide, params, trained, num_kv_heads, how):
    state = trained[-1]
    network = conversion.convert(params, wide, num_kv_heads)
    converted = convert_optimizer_state(state, params, network, how)
    fresh = optimizers.adafactor().init(network.params)
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, fresh)
    if num_kv_heads == 16 and how == "map":
        jax.tree.map(np.testing.assert_array_equal, converted, state)
    if how == "reset":
        jax.tree.map(np.testing.assert_array_equal, converted, fresh)


@pytest.mark.parametrize("num_kv_heads", [8, 1])  # factored, and too narrow to be
def test_mapping_keeps_the_total_second_moment_and_the_count(wide, params, trained, num_kv_heads):
    state = trained[-1]
    network = conversion.convert(params, wide, num_kv_heads)
    converted = convert_optimizer_state(state, params, network, "map")
    old, pooled = (s["decoder"]["layers"]["self_attention"]["key"][0] for s in (state, converted))
    total = old.v_row.sum(1) * 256  # row means of 256 columns
    columns = 16 * num_kv_heads
    actual = pooled.v_row.sum(1) * columns if num_kv_heads > 1 else pooled.v.sum((1, 2))
    np.testing.assert_allclose(actual, total, rtol=1e-5)
    np.testing.assert_array_equal(pooled.count, old.count)
    np.testing.assert_array_equal(
        converted["encoder"]["layers"]["attention"]["key"][0].v_row,
        state["encoder"]["layers"]["attention"]["key"][0].v_row,
    )


@pytest.mark.parametrize("D", [128, 160, 256, 400])  # below, between, at and above the columns
def test_mapped_moments_are_those_of_the_groups_whichever_side_is_larger(D):
    """From 16 to 8 heads of 16: optax turns a factored state around where D is the larger side."""

    def tree(x):
        return {"layers": {"key": x}}

    rng = np.random.default_rng(D)
    old, new = (jnp.asarray(rng.normal(size=(1, D, n, 16)), jnp.float32) for n in (16, 8))
    update = jax.jit(optimizers.adafactor().update)
    _, state = update(tree(old), optimizers.adafactor().init(tree(old)), tree(old))
    mapped = pool_moments(state, tree(old), tree(new))
    seen = mapped["layers"]["key"][0]
    squares = np.square(old[0]).reshape(D, 8, 2, 16)
    actual = {len(x): x for x in (seen.v_row[0], seen.v_col[0])} if D != 128 else {}
    by_row, by_column = actual.get(D, seen.v_row[0]), actual.get(128, seen.v_col[0])
    np.testing.assert_allclose(by_row, squares.sum((1, 2, 3)) / 128, rtol=1e-5)
    np.testing.assert_allclose(by_column, squares.sum(2).mean(0).ravel(), rtol=1e-5)
    update(tree(new), mapped, tree(new))


@pytest.mark.parametrize(
    "orders",
    [
        {
            "self_attention": [[*range(1, 16), 0]] * 2,
            "cross_attention": [[*range(15, -1, -1)], [*range(16)]],
        },
        {"encoder": [[*range(8, 16), *range(8)]] * 2},
    ],
)
def test_moments_move_with_their_heads(wide, params, trained, orders):
    """Updates of reordered heads are reordered updates, factored or not."""
    (grads, _), _, state = trained
    orders = {name: np.array(rows) for name, rows in orders.items()}

    def moved(tree):
        return grouping.permute_heads(tree, orders)

    update = jax.jit(optimizers.adafactor().update)
    expected, after = update(grads, state, params)
    actual, moved_after = update(
        moved(grads), optimizer_state.permute_heads(state, params, orders), moved(params)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, moved(expected))
    again = optimizer_state.permute_heads(after, params, orders)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moved_after, again)
    unmoved = jax.tree.map(lambda a, b: bool((a != b).any()), moved(expected), expected)
    assert any(jax.tree.leaves(unmoved))


def test_unknown_way_to_convert_a_state_is_refused(wide, params):
    state = optimizers.adafactor().init(params)
    with pytest.raises(UserError, match=r"^how='keep'; use map or reset"):
        convert_optimizer_state(state, params, conversion.convert(params, wide, 8), "keep")
