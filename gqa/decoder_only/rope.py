"""Closed forms for attention with rotary position embeddings (RoPE), from the weights alone.

RoPE turns each pair of a key's numbers (i, i + R/2) by an angle that grows with the position, R of
H numbers in all. A constant turn of the pair commutes with that, so keys and their queries may be
turned pair by pair; numbers beyond R, and values with outputs, may be changed by any matrix.
Everything is float64 on the host: `heads` [G, D, H] are those that become one.
"""

import math
from typing import NamedTuple

import numpy as np

from gqa.conversion import closed_form


class Turn(NamedTuple):
    """What keys are multiplied by: unit complex numbers [G, R/2], and rotations [G, H-R, H-R]."""

    phases: np.ndarray
    rest: np.ndarray


def turn(x: np.ndarray, by: Turn) -> np.ndarray:
    """x [G, ..., H], each of the G by its own."""
    half = by.phases.shape[1]
    phases = by.phases.reshape(len(x), *(1,) * (x.ndim - 2), half)
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * phases
    shape = (len(x), math.prod(x.shape[1:-1]), x.shape[-1] - 2 * half)
    rest = x[..., 2 * half :].reshape(shape) @ by.rest
    return np.concatenate([pairs.real, pairs.imag, rest.reshape(*x.shape[:-1], shape[-1])], -1)


def align(heads: np.ndarray, rotary: int) -> Turn:
    """Turns of heads [G, D, H] to each other, the first one's being none.

    The mean of the turned heads is nearest to them: no pair's is farther than that of the heads as
    they are, and for two heads none is nearer.
    """
    half = rotary // 2
    rest = heads[..., rotary:]
    rotations = np.zeros((len(heads), 0, 0))
    if rest.shape[-1]:
        rotations = closed_form.procrustes(closed_form.gram_matrix(rest, None))
    pairs = heads[..., :half] + 1j * heads[..., half:rotary]
    gram = np.einsum("GDp,KDp->pGK", pairs.conj(), pairs, optimize=True)
    starts = [np.ones(gram.shape[:2], complex), _phases(np.linalg.eigh(gram)[1][..., -1])]
    ends = [_iterated(gram, start) for start in starts]
    fits = [_fit(gram, phases) for phases in ends]
    best = np.where((fits[0] >= fits[1])[:, None], *ends)
    return Turn((best / best[:, :1]).T, rotations)


def _iterated(gram: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """Each head in turn with the sum of all, which never lowers the fit of a Gram matrix."""
    for _ in range(closed_form.ROUNDS):
        before, phases = phases, _phases(np.einsum("pGK,pK->pG", gram, phases))
        if np.abs(phases - before).max(initial=0.0) <= closed_form.TOLERANCE:
            break
    return phases


def _fit(gram: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """Squared norm of the sum of the turned heads, of each pair."""
    return np.einsum("pG,pGK,pK->p", phases.conj(), gram, phases, optimize=True).real


def _phases(x: np.ndarray) -> np.ndarray:
    size = np.abs(x)
    return np.where(size > 0, x / np.where(size > 0, size, 1.0), 1.0)


def keys(heads: np.ndarray, queries: np.ndarray, rotary: int):
    """The key head of a group, its queries, and the squared weight error.

    Args:
        heads: [G, D, H].
        queries: [G, P, D, H], those of P query heads that share each.
    """
    by = align(heads, rotary)
    turned = turn(heads, by)
    head = turned.mean(0)
    return head, turn(queries, by), np.square(turned - head).sum()


def values(heads: np.ndarray, outputs: np.ndarray):
    """The value head of a group by singular values, its outputs, and the squared weight error.

    Args:
        heads: [G, D, H].
        outputs: [G, P, D, H], rows transposed of P query heads that share each.
    """
    G, P, _, H = outputs.shape
    eye = np.broadcast_to(np.eye(H), (G, P, H, H))  # becomes the way back to the heads
    head, changed, _ = closed_form.pool(
        heads, np.concatenate([outputs, eye], 2), "svd", "weight", None, None
    )
    outputs, back = changed[:, :, :-H], changed[:, 0, -H:]
    return head, outputs, np.square(heads - head @ back.swapaxes(1, 2)).sum()
