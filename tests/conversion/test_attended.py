"""Test that what attention reads is measured where and as the network reads it."""

import jax.numpy as jnp
import numpy as np
import pytest

from gqa.conversion import calibration, needs_attended, pooling
from gqa.conversion.attended import AttendedCovariance, Reading, attended_covariance
from gqa.conversion.attention_kernels import kernels_of, with_kernels
from gqa.conversion.calibration import ATTENTIONS
from gqa.model.attention import Segments
from gqa.model.layers import Attention

ALL = tuple(ATTENTIONS)
N, K, D, H, T, S = 4, 2, 6, 3, 5, 7


def layer(rng):
    shapes = {"query": (D, N, H), "key": (D, K, H), "value": (D, K, H), "out": (N, H, D)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def readings(rng):
    """Two batches of which some queries and some tokens are padding; the second one is packed."""
    for packed in (False, True):
        x, y = (rng.normal(size=(2, n, D)).astype(np.float32) for n in (T, S))
        query = np.array([[1, 1, 1, 0, 0], [1, 1, 2, 2, 0]] if packed else np.ones((2, T)), int)
        key = np.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 2, 2, 2, 0, 0]], int)
        key = key if packed else np.minimum(key, 1)
        real = query > 0 if packed else np.arange(T) < np.array([[3], [5]])
        bias = rng.normal(size=(1, N, T, S)).astype(np.float32)
        yield Reading(x, y, real, bias, Segments(query, key, packed))


def by_loops(kernels, given, causal):
    """E[z z'] by head, and the mean spread of tokens around z, one query at a time."""
    values, keys, count = np.zeros((N, D, D)), np.zeros((D, D)), 0
    for x, y, real, bias, segments in given:
        for row, t in np.argwhere(real):
            count += 1
            for n in range(N):
                logits = (y[row] @ kernels["key"][:, n // 2]) @ (x[row, t] @ kernels["query"][:, n])
                logits = logits + bias[0, n, t]
                seen = segments.key[row] > 0
                if segments.packed:
                    seen = segments.key[row] == segments.query[row, t]
                if causal:
                    seen = seen & (np.arange(S) <= t)
                a = np.where(seen, np.exp(logits - logits[seen].max()), 0)
                a /= a.sum()
                z = a @ y[row]
                values[n] += np.outer(z, z)
                keys += ((y[row] - z).T * a) @ (y[row] - z) / N
    return values / count, keys / count


@pytest.mark.parametrize("causal", [False, True])
def test_they_are_averages_over_what_each_query_attends_to(causal):
    rng = np.random.default_rng(0)
    kernels, given = layer(rng), list(readings(rng))
    actual = attended_covariance(kernels, given, causal)
    for one, other in zip(actual, by_loops(kernels, given, causal), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_half_of_the_keys_metric_is_the_divergence_of_attention_weights():
    """KL(a, softmax(log a + d)) of small changes d = y v of the logits, one head."""
    rng = np.random.default_rng(1)
    kernels = {name: x[:, :1] for name, x in layer(rng).items() if name in ("query", "key")}
    reading = next(readings(rng))._replace(bias=None, segments=None)
    metric = attended_covariance(kernels, [reading], causal=False).keys
    change = 1e-3 * rng.normal(size=D)
    total = 0.0
    for row, t in np.argwhere(reading.real):
        x, y = np.float64(reading.x[row, t]), np.float64(reading.y[row])
        logits = (y @ kernels["key"][:, 0]) @ (x @ kernels["query"][:, 0])
        before, after = (z - np.log(np.exp(z).sum()) for z in (logits, logits + y @ change))
        total += np.exp(before) @ (before - after)
    expected = total / reading.real.sum()
    np.testing.assert_allclose(change @ metric @ change / 2, expected, rtol=1e-2)


def test_they_are_of_what_the_network_attends_to(tiny, random_params, batch, monkeypatch):
    """An attention of one head adds P W' z to the network: its covariance is that of z, mapped."""
    n, params = 2, random_params(tiny)
    for name in ALL:
        old = kernels_of(params, name)
        alone = jnp.zeros_like(old["out"]).at[:, n].set(old["out"][:, n])
        params = with_kernels(params, name, old | {"out": alone})

    # What the layers' own attentions add, in the order in which calibration runs the layers.
    run, added = calibration._run, []

    def recorded(module, config, layer, x, shared):
        _, captured = module(config, train=False).apply(
            {"params": layer},
            x,
            *shared,
            capture_intermediates=lambda module, _: isinstance(module, Attention),
            mutable=["intermediates"],
        )
        added.append(
            {name: calls["__call__"][0] for name, calls in captured["intermediates"].items()}
        )
        return run(module, config, layer, x, shared)

    monkeypatch.setattr(calibration, "_run", recorded)
    for covariance in calibration.input_covariances(params, tiny, [batch], ALL, attended=True):
        name, index = covariance[:2]
        real = (batch["inputs"] if name == "encoder" else batch["targets"]) > 0
        outputs = np.asarray(added[-1][ATTENTIONS[name][1]], np.float64)[real]

        value, out = (
            np.float64(kernels_of(params, name)[side][index]) for side in ("value", "out")
        )
        mapped = value[:, n] @ out[n]  # [D, D]
        expected = mapped.T @ covariance.attended.values[n] @ mapped
        actual = outputs.T @ outputs / len(outputs)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4, err_msg=name)
    assert len(added) == 4


def test_nothing_is_read_where_all_is_padding(tiny, random_params, batch):
    nothing = {name: np.zeros_like(rows) for name, rows in batch.items()}
    measure = calibration.input_covariances
    for covariance in measure(random_params(tiny), tiny, [nothing], attended=True):
        assert not covariance.attended.values.any()
        assert not covariance.attended.keys.any()


def test_the_energy_of_a_kv_head_is_that_of_what_its_queries_add_to_the_output():
    rng = np.random.default_rng(2)
    kernels, z = layer(rng), rng.normal(size=(40, N, D)) * rng.uniform(0.2, 3, (N, 1))
    attended = AttendedCovariance(np.einsum("tni,tnj->nij", z, z) / len(z), np.eye(D))
    added = [z[:, n] @ kernels["value"][:, n // 2] @ kernels["out"][n] for n in range(N)]
    each = np.array([np.square(x).sum(1).mean() for x in added])
    actual = pooling.output_energies(kernels, attended)
    np.testing.assert_allclose(actual, each.reshape(K, 2).sum(1), rtol=1e-5)


def test_prune_keeps_the_head_with_the_most_energy():
    rng = np.random.default_rng(3)
    keys, values = (rng.normal(size=(2, 3, 2, 4, 5)) for _ in range(2))
    energies = rng.random((2, 2, 4))
    new = pooling.prune(*(jnp.asarray(x) for x in (keys, values, energies)))
    for i, group in np.ndindex(2, 2):
        kept = energies[i, group].argmax()
        for one, other in zip(new, (keys, values), strict=True):
            np.testing.assert_allclose(one[i, :, group], other[i, :, group, kept], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (("mean", "attention"), False),
        (("svd", "logit"), False),
        (("svd", "attention"), True),
        (("prune", "weight"), True),
        # A budget is spread by the loss of "svd", whatever the method is.
        (("mean", "attention", True), True),
        (("mean", "logit", True), False),
    ],
)
def test_what_needs_what_attention_attends_to_says_so(arguments, needed):
    assert needs_attended(*arguments) == needed
