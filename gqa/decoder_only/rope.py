"""Closed forms for attention with rotary position embeddings (RoPE), from the weights alone.

RoPE rotates each pair of a key's coordinates (i, i + R/2) by an angle that grows with the position;
R of H coordinates are rotated in all. A constant rotation of a pair commutes with RoPE, so keys and
their queries may be rotated pair by pair. Coordinates beyond R may be rotated together, and values
with outputs may be changed by any invertible matrix, as in T5 (docs/conversion.md, eq. 2).

All is computed in float64 on the host, one group at a time: `heads` [G, D, H] become one head.
convert.py reads and writes the tensors.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gqa.conversion import closed_form


class Rotation(NamedTuple):
    """A rotation of each head that commutes with RoPE.

    Attributes:
        phases: [G, R/2], a complex number of absolute value 1 for each pair of coordinates.
        rest: [G, H - R, H - R], a rotation of the coordinates that RoPE leaves alone.
    """

    phases: np.ndarray
    rest: np.ndarray


def rotate(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """Rotate each of the G heads x [G, ..., H] by its own rotation."""
    half = rotation.phases.shape[1]
    phases = rotation.phases.reshape(len(x), *(1,) * (x.ndim - 2), half)

    # A rotation of the pair (i, i + R/2) is the product of one complex number with another.
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * phases
    shape = (len(x), math.prod(x.shape[1:-1]), x.shape[-1] - 2 * half)
    rest = x[..., 2 * half :].reshape(shape) @ rotation.rest
    return np.concatenate([pairs.real, pairs.imag, rest.reshape(*x.shape[:-1], shape[-1])], -1)


def align(heads: np.ndarray, rotary: int) -> Rotation:
    """Return rotations that bring heads [G, D, H] close to their mean; the first head stays.

    No pair of coordinates ends farther from the mean than without a rotation. For two heads the
    result is optimal.
    """
    half = rotary // 2

    # The coordinates that RoPE leaves alone: any rotation is allowed.
    rest = heads[..., rotary:]
    # Where RoPE rotates all coordinates, there is no rest, and its rotations are empty.
    rotations = np.zeros((len(heads), 0, 0))
    if rest.shape[-1]:
        rotations = closed_form.procrustes(closed_form.gram_matrix(rest, None))

    # Each pair as a complex number: find the phases that maximise the norm of the heads' sum. The
    # iteration finds a local optimum, so it starts from no rotation and from the best eigenvector.
    pairs = heads[..., :half] + 1j * heads[..., half:rotary]
    gram = np.einsum("GDp,KDp->pGK", pairs.conj(), pairs, optimize=True)
    starts = [np.ones(gram.shape[:2], complex), _phases(np.linalg.eigh(gram)[1][..., -1])]
    ends = [_iterated(gram, start) for start in starts]
    fits = [_fit(gram, phases) for phases in ends]
    best = np.where((fits[0] >= fits[1])[:, None], *ends)

    # Only differences of phases count, so turn all of a pair back by the phase of the first head.
    return Rotation((best / best[:, :1]).T, rotations)


def _iterated(gram: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """Align each head with the sum of all heads until no phase moves; no step lowers the fit."""
    for _ in range(closed_form.ROUNDS):
        last, phases = phases, _phases(np.einsum("pGK,pK->pG", gram, phases))
        if np.abs(phases - last).max(initial=0.0) <= closed_form.TOLERANCE:
            break
    return phases


def _fit(gram: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """Return the squared norm of the sum of the rotated heads, for each pair."""
    return np.einsum("pG,pGK,pK->p", phases.conj(), gram, phases, optimize=True).real


def _phases(x: np.ndarray) -> np.ndarray:
    """Return complex numbers scaled to the absolute value 1; zero becomes 1."""
    size = np.abs(x)
    return np.where(size > 0, x / np.where(size > 0, size, 1.0), 1.0)


def keys(
    heads: Float[np.ndarray, "G D H"], queries: Float[np.ndarray, "G P D H"], rotary: int
) -> tuple[Float[np.ndarray, "D H"], Float[np.ndarray, "G P D H"], float]:
    """Pool the key heads of a group by the mean of rotated heads; queries rotate with their key.

    Args:
        heads: the key kernels of the group.
        queries: the kernels of the P query heads that read each key head.
        rotary: R, the number of coordinates that RoPE rotates.

    Returns:
        The group's key head, its queries, and the squared error of the kernels.
    """
    rotation = align(heads, rotary)
    rotated = rotate(heads, rotation)
    head = rotated.mean(0)
    return head, rotate(queries, rotation), np.square(rotated - head).sum()


def values(
    heads: Float[np.ndarray, "G D H"], outputs: Float[np.ndarray, "G P D H"]
) -> tuple[Float[np.ndarray, "D H"], Float[np.ndarray, "G P D H"], float]:
    """Pool the value heads of a group by singular values (docs/conversion.md, eq. 8).

    Args:
        heads: the value kernels of the group.
        outputs: the transposed output kernels of the P query heads that read each value head.

    Returns:
        The group's value head, its outputs, and the squared error of the kernels.
    """
    G, P, _, H = outputs.shape
    # Identity rows among the outputs become `up`, which maps the group's head back to each head.
    eye = np.broadcast_to(np.eye(H), (G, P, H, H))
    head, new_outputs, _ = closed_form.pool(
        heads, np.concatenate([outputs, eye], 2), "svd", "weight", None, None
    )
    outputs, up = new_outputs[:, :, :-H], new_outputs[:, 0, -H:]
    return head, outputs, np.square(heads - head @ up.swapaxes(1, 2)).sum()
