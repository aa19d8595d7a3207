"""Conversion of attention with RoPE: what turns leave alone, and that no other turn does better."""

import itertools

import numpy as np
import pytest

from gqa.decoder_only import rope

RNG = np.random.default_rng


def rotary_embedding(x, positions, rotary):
    """RoPE of vectors [..., T, H] at positions [T], by rotation matrices of pairs (i, i + R/2)."""
    out = np.array(x)
    for i in range(rotary // 2):
        angle = positions * 100.0 ** (-2 * i / rotary)
        one, other = x[..., i], x[..., i + rotary // 2]
        out[..., i] = np.cos(angle) * one - np.sin(angle) * other
        out[..., i + rotary // 2] = np.sin(angle) * one + np.cos(angle) * other
    return out


def random_turn(rng, G, H, rotary):
    """A turn of pairs by random angles, and of the rest by random rotations."""
    angles = rng.uniform(-3, 3, (G, rotary // 2))
    rest = np.linalg.qr(rng.normal(size=(G, H - rotary, H - rotary)))[0]
    return rope.Rotation(np.exp(1j * angles), rest)


@pytest.mark.parametrize("rotary", [8, 4])
def test_keys_and_queries_turned_alike_keep_their_logits_under_rope(rotary):
    rng, positions = RNG(0), np.arange(5)
    G, H = 2, 8
    by = random_turn(rng, G, H, rotary)
    keys, queries = rng.normal(size=(2, G, 5, H))

    def logits(queries, keys):
        q, k = (rotary_embedding(x, positions, rotary) for x in (queries, keys))
        return np.einsum("GQH,GKH->GQK", q, k)

    turned = logits(rope.rotate(queries, by), rope.rotate(keys, by))
    np.testing.assert_allclose(turned, logits(queries, keys), atol=1e-9)
    assert np.abs(rope.rotate(keys, by) - keys).max() > 0.1


def test_a_turn_is_by_head_whatever_axes_are_between():
    rng = RNG(1)
    by = random_turn(rng, 3, 6, 4)
    x = rng.normal(size=(3, 2, 5, 6))
    found = rope.rotate(x, by)
    assert found.shape == x.shape
    for g, i in itertools.product(range(3), range(2)):
        one = rope.rotate(x[g : g + 1, i], rope.Rotation(by.phases[g : g + 1], by.rest[g : g + 1]))
        np.testing.assert_allclose(found[g, i], one[0], atol=1e-12)
    # Numbers 0 and 2, and 1 and 3, are pairs: real and imaginary part of one number.
    expected = (x[2, 1, 4, 1] + 1j * x[2, 1, 4, 3]) * by.phases[2, 1]
    np.testing.assert_allclose(found[2, 1, 4, [1, 3]], [expected.real, expected.imag])


def distance(heads, by):
    """Squared distance of turned heads from their mean, for each pair of numbers [R/2]."""
    turned = rope.rotate(heads, by)
    square = np.square(turned - turned.mean(0)).sum((0, 1))
    half = by.phases.shape[1]
    return square[:half] + square[half : 2 * half]


def test_no_other_turn_of_two_heads_is_nearer():
    rng = RNG(2)
    heads = rng.normal(size=(2, 7, 6))
    rotation = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    heads[1, :, 4:] = heads[0, :, 4:] @ rotation + 0.1 * heads[1, :, 4:]
    by = rope.align(heads, 4)
    np.testing.assert_allclose(by.phases[0], 1, atol=1e-12)
    np.testing.assert_allclose(by.rest[0], np.eye(2), atol=1e-12)
    # The nearest rotation of the rest: U V' of the singular vectors of the cross product.
    U, _, Vh = np.linalg.svd(heads[1, :, 4:].T @ heads[0, :, 4:])
    np.testing.assert_allclose(by.rest[1], U @ Vh, atol=1e-6)
    found = distance(heads, by)
    for angle in np.linspace(0, 2 * np.pi, 200):
        phases = np.stack([np.ones(2), np.full(2, np.exp(1j * angle))])
        assert (found <= distance(heads, by._replace(phases=phases)) + 1e-9).all()


@pytest.mark.parametrize("seed", range(5))
def test_turns_of_several_heads_are_never_farther_than_none(seed):
    """Nor is another angle of one head nearer, the others left as they are."""
    heads = RNG(seed).normal(size=(5, 2, 40))
    by = rope.align(heads, 40)
    found = distance(heads, by)
    none = rope.Rotation(np.ones_like(by.phases), by.rest)
    assert (found <= distance(heads, none) + 1e-9).all()
    for head, angle in itertools.product(range(5), np.linspace(0, 2 * np.pi, 30)):
        phases = by.phases.copy()
        phases[head] *= np.exp(1j * angle)
        assert (found <= distance(heads, by._replace(phases=phases)) + 1e-6).all()


def test_opposite_heads_are_found():
    """Their sum is nothing, so that from no turn there is no direction to go on in."""
    head = RNG(3).normal(size=(7, 4))
    by = rope.align(np.stack([head, -head]), 4)
    np.testing.assert_allclose(by.phases, [[1, 1], [-1, -1]], atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_turned_copies_of_a_head_become_it(seed):
    """Their queries are turned back, so that the logits stay those of each head."""
    rng, G, P, H, rotary = RNG(seed), 3, 2, 6, 4
    first = rng.normal(size=(7, H))
    by = random_turn(rng, G, H, rotary)
    heads = rope.rotate(np.stack([first] * G), by)
    queries = rng.normal(size=(G, P, 7, H))
    head, new, error = rope.keys(heads, queries, rotary)
    np.testing.assert_allclose(error, 0, atol=1e-12)
    np.testing.assert_allclose(head, heads[0], atol=1e-6)
    products = np.einsum("GPDH,GEH->GPDE", queries, heads)
    np.testing.assert_allclose(np.einsum("GPDH,EH->GPDE", new, head), products, atol=1e-5)


def test_keys_are_the_mean_of_the_turned_heads_and_tell_their_distance():
    rng = RNG(4)
    heads, queries = rng.normal(size=(2, 7, 6)), rng.normal(size=(2, 1, 7, 6))
    by = rope.align(heads, 4)
    head, new, error = rope.keys(heads, queries, 4)
    turned = rope.rotate(heads, by)
    np.testing.assert_allclose(head, (turned[0] + turned[1]) / 2)
    np.testing.assert_allclose(error, np.square(turned[0] - turned[1]).sum() / 2)
    np.testing.assert_allclose(new, rope.rotate(queries, by))


def test_values_miss_what_the_singular_values_beyond_h_hold():
    rng, G, P, D, H = RNG(5), 3, 2, 9, 4
    heads, outputs = rng.normal(size=(G, D, H)), rng.normal(size=(G, P, D, H))
    head, new, error = rope.values(heads, outputs)
    best = np.square(np.linalg.svd(np.concatenate(heads, 1))[1][H:]).sum()
    np.testing.assert_allclose(error, best)
    assert new.shape == outputs.shape
    missed = 0.0
    for g, p in itertools.product(range(G), range(P)):
        up = np.linalg.pinv(outputs[g, p]) @ new[g, p]
        missed += np.square(heads[g] - head @ up.T).sum() / P
    np.testing.assert_allclose(missed, best)


def test_the_rest_of_a_head_is_rotated_as_said():
    rng = RNG(6)
    by = random_turn(rng, 2, 6, 4)
    x = rng.normal(size=(2, 7, 6))
    for g in range(2):
        np.testing.assert_allclose(rope.rotate(x, by)[g, :, 4:], x[g, :, 4:] @ by.rest[g])


def test_turns_are_the_better_of_two_climbs():
    """From no turn and from the principal direction; of many pairs each wins some."""
    n = 800
    heads = RNG(0).normal(size=(6, 5, 2 * n))
    found = distance(heads, rope.align(heads, 2 * n))
    pairs = heads[..., :n] + 1j * heads[..., n:]
    # Of each pair, heads side by side [D, G]: the combination of them that is largest.
    principal = np.linalg.svd(pairs.transpose(2, 1, 0))[2][:, 0].conj().T
    reached = []
    for start in (np.ones((6, n)), principal):
        phases = start / np.abs(start)
        for _ in range(100):
            total = (pairs * phases[:, None]).sum(0)  # [D, n]
            towards = (pairs.conj() * total).sum(1)
            phases = towards / np.abs(towards)
        turned = pairs * phases[:, None]
        reached.append(np.square(np.abs(turned - turned.mean(0))).sum((0, 1)))
    np.testing.assert_allclose(found, np.minimum(*reached), rtol=1e-6)
    assert (reached[0] < 0.999 * reached[1]).any()
    assert (reached[1] < 0.999 * reached[0]).any()
