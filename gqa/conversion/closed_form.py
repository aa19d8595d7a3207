"""Closed forms: queries and outputs absorb the change of basis that pools keys and values.

The derivation, with numbered equations, is in docs/conversion.md. In short: T5 has no operation
between a projection and the dot product, so a group's keys may be multiplied by any invertible
matrix if its queries are multiplied by the inverse transpose (eq. 2); likewise values and outputs.
For each head h of a group a method chooses two matrices [H, H], `down` and `up`. The group's head W
and the partners P_h (query kernels, or output kernels transposed) become

    W = sum_h W_h down_h          P_h <- P_h up_h          (eq. 3)

so that head h reads W up_h', the approximation of its own W_h. Everything is computed in float64 on
the host, one group at a time: `heads` [G, D, H] and `partners` [G, P, D, H], where P is the number
of query heads that read each head before the conversion (1 for a multi-head parent).

This file knows one layer. calibration.py and attended.py measure covariances, assemble.py visits
the layers.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gqa.conversion.calibration import InputCovariance

METHODS = ("svd", "procrustes")
SPACES = ("weight", "activation", "logit", "attention")

# Eigenvalues of a matrix that is inverted are raised to this share of the largest.
FLOOR = 1e-9

# Share of the plain covariance in the keys' metric of the space "attention" (eq. 15). Without it
# the keys of tokens that no query attends to would be arbitrary.
PLAIN_SHARE = 0.01

# The Procrustes iteration ends after so many rounds, or when a round gains relatively less.
ROUNDS, TOLERANCE = 100, 1e-10


class Group(NamedTuple):
    """The keys, or the values, that become one head.

    Attributes:
        heads, partners: see the top of this file.
        C, C_partner: covariances of their inputs; None is the identity.
        attended: [G * P, D, D], the covariance of what each query head reads of the values'
            inputs; None outside the space "attention", and for keys.
    """

    heads: Float[np.ndarray, "G D H"]
    partners: Float[np.ndarray, "G P E H"]
    C: Float[np.ndarray, "D D"] | None
    C_partner: Float[np.ndarray, "E E"] | None
    attended: Float[np.ndarray, "N D D"] | None


def convert_layer(
    kernels: dict,
    num_groups: int,
    method: str,
    space: str,
    covariance: InputCovariance,
    shrinkage: float,
) -> tuple[dict, float]:
    """Convert one layer's attention to `num_groups` KV heads.

    Args:
        kernels: query [D, N, H], key and value [D, K, H], out [N, H, D].
        method: one of METHODS.
        space: one of SPACES, what the approximation keeps best.
        covariance: of the layer's inputs. If its `keys` are None or zero, C is the identity.
        shrinkage: of the covariances toward the identity (eq. 10).

    Returns:
        The new kernels in float32, and the largest condition number among the covariances of the
        inputs and of the heads' partners.
    """
    # Keys with their queries, and values with their outputs, are two instances of one problem.
    conditions = [] if covariance.keys is None else [condition(covariance.keys)]
    new, partners = {}, {}
    for name, groups in _split_groups(kernels, num_groups, space, covariance, shrinkage).items():
        pooled = [pool(*group[:2], method, space, group.C, group.C_partner) for group in groups]
        if method == "svd":
            pooled = [
                (head, refitted(group, head, partner, shrinkage), worst)
                for group, (head, partner, worst) in zip(groups, pooled, strict=True)
            ]
        new[name] = np.stack([head for head, _, _ in pooled], axis=1)
        partners[name] = np.concatenate([p.reshape(-1, *p.shape[2:]) for _, p, _ in pooled])
        conditions += [worst for _, _, worst in pooled]

    # Partners are [N, D, H]. A query kernel is [D, N, H]; an output kernel is the transpose of its
    # partner, [N, H, D].
    new["query"] = partners["key"].transpose(1, 0, 2)
    new["out"] = partners["value"].transpose(0, 2, 1)
    return {name: x.astype(np.float32) for name, x in new.items()}, max(conditions)


def discarded_energy(
    kernels: dict, num_groups: int, space: str, covariance: InputCovariance, shrinkage: float
) -> float:
    """Return the share of a layer's energy that `num_groups` heads cannot keep (eq. 11).

    It is the share of the keys plus that of the values, from 0 to 2.
    """
    total = 0.0
    for groups in _split_groups(kernels, num_groups, space, covariance, shrinkage).values():
        lost = whole = 0.0
        for heads, partner, C, C_partner, _ in groups:
            # One head of size H keeps the top H eigenvalues. They ascend, so the last H are kept.
            root, _, _ = _head_weights(space, partner, C_partner)
            values = np.maximum(np.linalg.eigvalsh(_weighted_gram(gram_matrix(heads, C), root)), 0)
            lost, whole = lost + values[: -heads.shape[-1]].sum(), whole + values.sum()
        total += lost / whole if whole > 0 else 0.0
    return float(total)


def _split_groups(
    kernels: dict, num_groups: int, space: str, covariance: InputCovariance, shrinkage: float
) -> dict[str, list[Group]]:
    """Return the groups of "key" and of "value".

    Keys have the queries as partners, which read an input of their own. Values have the transposed
    output kernel, which reads nothing, so that their C_partner is the identity.
    """
    C, C_query = None, None
    if covariance.keys is not None:
        assert covariance.queries is not None  # a layer is measured whole or not at all
        C, C_query = shrunk(covariance.keys, shrinkage), shrunk(covariance.queries, shrinkage)
    query, out = (np.asarray(kernels[name], np.float64) for name in ("query", "out"))
    partners = {"key": (query.transpose(1, 0, 2), C_query), "value": (out.transpose(0, 2, 1), None)}

    # In the space "attention" keys and values weigh their inputs by metrics of their own.
    C_of: dict[str, list] = {name: [C] * num_groups for name in partners}
    attended: list = [None] * num_groups
    if space == "attention":
        assert covariance.attended is not None  # `check_covariance` has seen to it
        attended = np.split(covariance.attended.values, num_groups)
        C_of["key"] = [shrunk(softmax_metric(covariance), shrinkage)] * num_groups
        C_of["value"] = [shrunk(values.mean(0), shrinkage) for values in attended]

    # Heads [K, D, H] are cut into groups of neighbours, and so are the query heads that read them:
    # partner [N, D, H] becomes [groups, G, P, D, H].
    groups_of = {}
    for name, (partner, C_partner) in partners.items():
        heads = np.asarray(kernels[name], np.float64).transpose(1, 0, 2)
        K, D, H = heads.shape
        groups = heads.reshape(num_groups, K // num_groups, D, H)
        split = partner.reshape(num_groups, K // num_groups, -1, D, H)
        read = attended if name == "value" else [None] * num_groups
        groups_of[name] = [
            Group(members, readers, C_group, C_partner, C_read)
            for members, readers, C_group, C_read in zip(
                groups, split, C_of[name], read, strict=True
            )
        ]
    return groups_of


def softmax_metric(covariance: InputCovariance) -> Float[np.ndarray, "D D"]:
    """Return the metric of the keys' inputs in the space "attention" (eq. 15)."""
    assert covariance.attended is not None
    assert covariance.keys is not None
    fisher, plain = covariance.attended.keys, covariance.keys
    plain_trace = np.trace(plain)
    if plain_trace <= 0:
        return fisher
    return fisher + PLAIN_SHARE * np.trace(fisher) / plain_trace * plain


def refitted(
    group: Group, head: Float[np.ndarray, "D H"], partners: np.ndarray, shrinkage: float
) -> Float[np.ndarray, "G P E H"]:
    """Return new partners that read `head` best, each in the covariance of what it attends to.

    One `head` serves query heads that attend to different tokens, so it was made for their mean
    covariance. Given the head, the best `up` of each query head has a closed form (eq. 16). Outside
    the space "attention", `partners`, those that `pool` made with the head, are returned.
    """
    if group.attended is None:
        return partners
    G, P, *_ = partners.shape
    best = partners.copy()
    for (g, p), C in zip(np.ndindex(G, P), group.attended, strict=True):
        metric = shrunk(C, shrinkage)
        if metric is None:
            continue  # nothing was read, so that no head reads better than another
        _, inverse, _ = roots((head.T @ metric @ head)[None])
        up = group.heads[g].T @ metric @ head @ inverse[0] @ inverse[0]
        best[g, p] = group.partners[g, p] @ up
    return best


def pool(
    heads: Float[np.ndarray, "G D H"],
    partners: Float[np.ndarray, "G P E H"],
    method: str,
    space: str,
    C: Float[np.ndarray, "D D"] | None,
    C_partner: Float[np.ndarray, "E E"] | None,
) -> tuple[Float[np.ndarray, "D H"], Float[np.ndarray, "G P E H"], float]:
    """Make one head of a group.

    Args:
        C, C_partner: covariances of the inputs of heads and of partners; None is the identity.

    Returns:
        The group's head, its partners, and the condition number of the matrices that had to be
        inverted.
    """
    G = len(heads)
    gram = gram_matrix(heads, C)
    if method == "procrustes":
        # Rotate every head, then average; each partner turns with its head (eq. 9).
        up = procrustes(gram)
        return np.einsum("GDH,GHI->DI", heads, up) / G, partners @ up[:, None], 1.0

    # The best rank-H approximation of the weighted heads (eq. 6).
    root, inverse, worst = _head_weights(space, partners, C_partner)
    V = svd(gram, root)

    # Keys and queries can still share out any invertible matrix (eq. 8). `balance` takes the
    # weights back out of the keys, and `scale` gives them the mean norm of the heads they replace.
    # The network does not depend on the choice, but training does: Adafactor's steps are relative
    # to the size of a parameter.
    balance, undo, _ = roots(np.einsum("GHI,GHJ->IJ", root @ V, root @ V)[None])
    new = np.einsum("GDH,GHI->DI", heads, root @ V @ undo)
    norm = np.linalg.norm(new)
    scale = np.linalg.norm(heads, axis=(1, 2)).mean() / norm if norm > 0 else 1.0
    return new * scale, partners @ (inverse @ V @ balance / scale)[:, None], worst


def _head_weights(
    space: str, partners: np.ndarray, C_partner: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return R_h of eq. 5, the root of M_h, for each head [G, H, H]; see `roots`.

    In the spaces "logit" and "attention" M_h is the covariance of what the partners compute,
    otherwise the identity.
    """
    if space in ("logit", "attention"):
        return roots(partner_covariances(partners, C_partner))
    G, *_, H = partners.shape
    identity = np.broadcast_to(np.eye(H), (G, H, H))
    return identity, identity, 1.0


def gram_matrix(
    heads: Float[np.ndarray, "G D H"], C: Float[np.ndarray, "D D"] | None
) -> Float[np.ndarray, "G H G H"]:
    """Return the inner products of the columns of all heads in the metric C (eq. 7 without R)."""
    G, D, H = heads.shape

    # The heads side by side, [D, G * H], so that one product gives all pairs of columns.
    flat = heads.transpose(1, 0, 2).reshape(D, G * H)
    return (flat.T @ (flat if C is None else C @ flat)).reshape(G, H, G, H)


def partner_covariances(
    partners: Float[np.ndarray, "G P D H"], C: Float[np.ndarray, "D D"] | None
) -> Float[np.ndarray, "G H H"]:
    """Return M_h = sum over P of P_h' C P_h, the covariance of what a head's partners compute."""
    right = partners if C is None else C @ partners
    return (partners.swapaxes(2, 3) @ right).sum(1)


def svd(
    gram: Float[np.ndarray, "G H G H"], root: Float[np.ndarray, "G H H"]
) -> Float[np.ndarray, "G H H"]:
    """Return the top H right singular vectors of the weighted heads side by side (eqs. 5 and 6).

    They are eigenvectors of the Gram matrix (eq. 7), so neither the root of C nor a matrix with a
    row per token is formed. The rotation that is left free makes the first head's block symmetric
    and positive semidefinite, which is nearest to leaving that head as it is.
    """
    G, H = gram.shape[:2]
    _, vectors = np.linalg.eigh(_weighted_gram(gram, root))
    V = vectors[:, -H:].reshape(G, H, H)  # eigenvalues ascend, so the last H are the top H
    return V @ polar(V[0]).T


def _weighted_gram(gram: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Return the Gram matrix [G * H, G * H] of the heads times their roots R_h (eq. 7)."""
    size = gram.shape[0] * gram.shape[1]
    return np.einsum("GIH,GIKJ,KJL->GHKL", root, gram, root).reshape(size, size)


def procrustes(gram: Float[np.ndarray, "G H G H"]) -> Float[np.ndarray, "G H H"]:
    """Return the rotations of the heads to their mean (generalised Procrustes, eq. 9).

    The first head keeps its basis. For two heads, and for heads that are rotated copies of each
    other, the result is optimal. For more heads no closed form is known: the result is the better
    of the local optima that the iteration reaches from two starts.
    """
    G, H = gram.shape[:2]

    # The rotations nearest to the singular vectors are exact for rotated copies. Those that bring
    # all heads nearest to one of them are exact for two heads; of these G, the best is a start.
    to_singular_vectors = polar(svd(gram, np.broadcast_to(np.eye(H), (G, H, H))))
    to_one_head = max((polar(gram[:, :, head]) for head in range(G)), key=partial(_fit, gram))

    R, other = (_rotated_to_mean(gram, start) for start in (to_singular_vectors, to_one_head))
    if _fit(gram, other) > _fit(gram, R) * (1 + TOLERANCE):
        R = other
    return R @ R[0].T


def _fit(gram: np.ndarray, R: np.ndarray) -> float:
    """Return the squared norm of the sum of the rotated heads."""
    return float(np.einsum("GHI,GHI->", R, np.einsum("GHKJ,KJI->GHI", gram, R)))


def _rotated_to_mean(gram: np.ndarray, R: np.ndarray) -> np.ndarray:
    """Return the rotations [G, H, H] after rotating heads nearest to their sum, from a start R.

    It ends when the sum no longer grows.
    """
    last_fit = -np.inf
    for _ in range(ROUNDS):
        sum_of_heads = np.einsum("GHKJ,KJI->GHI", gram, R)
        fit = np.einsum("GHI,GHI->", R, sum_of_heads)
        if fit - last_fit <= TOLERANCE * abs(fit):
            break
        R, last_fit = polar(sum_of_heads), fit
    return R


def polar(x: np.ndarray) -> np.ndarray:
    """Return the orthogonal matrices nearest to x [..., H, H]."""
    U, _, Vh = np.linalg.svd(x)
    return U @ Vh


def roots(covariances: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return symmetric roots of covariances [G, H, H], their inverses, and the worst condition.

    Eigenvalues below FLOOR of the group's largest are raised to it, so that the inverse exists. If
    all are zero, because no partner reads anything, they are raised to 1.
    """
    values, vectors = np.linalg.eigh(covariances)
    worst = max(condition(m) for m in covariances)

    root = np.sqrt(np.maximum(values, FLOOR * values.max() if values.max() > 0 else 1.0))

    # vectors diag(root) vectors', for each head: scaling the columns saves the diagonal matrix.
    left, right = vectors, vectors.swapaxes(1, 2)
    return (left * root[:, None]) @ right, (left / root[:, None]) @ right, worst


def condition(covariance: Float[np.ndarray, "n n"]) -> float:
    """Return the largest eigenvalue divided by the smallest; infinite if that is not positive."""
    values = np.linalg.eigvalsh(covariance)
    return float(values[-1] / values[0]) if values[0] > 0 else np.inf


def shrunk(
    covariance: Float[np.ndarray, "D D"], shrinkage: float
) -> Float[np.ndarray, "D D"] | None:
    """Shrink a covariance toward the multiple of the identity with its trace (eq. 10).

    Returns None for a covariance of zeros, which says nothing about the inputs.
    """
    scale = np.trace(covariance) / len(covariance)
    if scale <= 0:
        return None
    return (1 - shrinkage) * covariance + shrinkage * scale * np.eye(len(covariance))
