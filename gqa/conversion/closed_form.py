"""Closed forms in which queries and outputs absorb what pooling does to keys and values.

T5 turns and scales nothing between the products with W_q and W_k, so q . k stays as it is when keys
are multiplied by any invertible matrix and queries by its inverse; so do values and outputs. A
method here gives two matrices [H, H] for each head h of a group, `down` and `up`. The group's head
and its partners (queries, or outputs transposed) become

    W = sum_h W_h down_h          P_h <- P_h up_h

so that head h is read as W up_h', its approximation. Everything is float64 on the host, a group at
a time: `heads` [G, D, H], `partners` [G, P, D, H], where P query heads share a head already.
"""

import numpy as np

from gqa.conversion.calibration import InputCovariance

METHODS = ("svd", "procrustes")
SPACES = ("weight", "activation", "logit")

FLOOR = 1e-9  # of the largest eigenvalue, for those of a matrix that is inverted
ROUNDS, TOLERANCE = 100, 1e-10  # of the generalised Procrustes iteration; relative gain of a round


def convert_layer(
    kernels: dict,
    num_groups: int,
    method: str,
    space: str,
    covariance: InputCovariance,
    shrinkage: float,
) -> tuple[dict, float]:
    """One layer's kernels, query [D, N, H], key, value [D, K, H], out [N, H, D], with fewer heads.

    Without covariances (`covariance.keys` is None), or with zeros, inputs count as white. Returns
    float32
    kernels and the largest condition number among the covariances of inputs and of heads' partners.
    """
    conditions = [] if covariance.keys is None else [condition(covariance.keys)]
    new, partners = {}, {}
    for name, groups in _groups(kernels, num_groups, covariance, shrinkage).items():
        pooled = [pool(heads, partner, method, space, *C) for heads, partner, *C in groups]
        new[name] = np.stack([head for head, _, _ in pooled], axis=1)
        partners[name] = np.concatenate([p.reshape(-1, *p.shape[2:]) for _, p, _ in pooled])
        conditions += [worst for _, _, worst in pooled]
    new["query"] = partners["key"].transpose(1, 0, 2)
    new["out"] = partners["value"].transpose(0, 2, 1)
    return {name: x.astype(np.float32) for name, x in new.items()}, max(conditions)


def discarded_energy(
    kernels: dict, num_groups: int, space: str, covariance: InputCovariance, shrinkage: float
) -> float:
    """The share of the energy of one layer's keys that svd cannot keep, plus that of its values."""
    total = 0.0
    for groups in _groups(kernels, num_groups, covariance, shrinkage).values():
        lost = whole = 0.0
        for heads, partner, C, C_partner in groups:
            root, _, _ = _roots_in(space, partner, C_partner)
            values = np.maximum(np.linalg.eigvalsh(_weighted(gram_matrix(heads, C), root)), 0)
            lost, whole = lost + values[: -heads.shape[-1]].sum(), whole + values.sum()
        total += lost / whole if whole > 0 else 0.0
    return float(total)


def _groups(
    kernels: dict, num_groups: int, covariance: InputCovariance, shrinkage: float
) -> dict[str, list]:
    """Of keys and of values: each group's heads, partners, and the covariances C and C_partner."""
    C, C_query = None, None
    if covariance.keys is not None:
        C, C_query = shrunk(covariance.keys, shrinkage), shrunk(covariance.queries, shrinkage)
    query, out = (np.asarray(kernels[name], np.float64) for name in ("query", "out"))
    partners = {"key": (query.transpose(1, 0, 2), C_query), "value": (out.transpose(0, 2, 1), None)}
    found = {}
    for name, (partner, C_partner) in partners.items():
        heads = np.asarray(kernels[name], np.float64).transpose(1, 0, 2)
        K, D, H = heads.shape
        groups = heads.reshape(num_groups, K // num_groups, D, H)
        split = partner.reshape(num_groups, K // num_groups, -1, D, H)
        found[name] = [(*group, C, C_partner) for group in zip(groups, split, strict=True)]
    return found


def pool(heads, partners, method: str, space: str, C, C_partner):
    """A group's head [D, H], its partners, and the condition number of what had to be inverted.

    C and C_partner [D, D] are the covariances of the inputs of both; None is the identity.
    """
    G = len(heads)
    gram = gram_matrix(heads, C)
    if method == "procrustes":
        up = procrustes(gram)
        return np.einsum("GDH,GHI->DI", heads, up) / G, partners @ up[:, None], 1.0
    root, inverse, worst = _roots_in(space, partners, C_partner)
    V = svd(gram, root)
    # Keys and queries could share out any invertible matrix. This one undoes the roots, over the
    # group's heads together, and keys keep the size of those they replace. Nothing depends on it
    # but training: Adafactor's steps are relative to the size of a parameter.
    balance, undo, _ = roots(np.einsum("GHI,GHJ->IJ", root @ V, root @ V)[None])
    new = np.einsum("GDH,GHI->DI", heads, root @ V @ undo)
    norm = np.linalg.norm(new)
    scale = np.linalg.norm(heads, axis=(1, 2)).mean() / norm if norm > 0 else 1.0
    return new * scale, partners @ (inverse @ V @ balance / scale)[:, None], worst


def _roots_in(space: str, partners: np.ndarray, C_partner: np.ndarray | None):
    """What weighs the columns of a group's heads: `roots` of what their partners give, or ones."""
    if space == "logit":
        return roots(partner_covariances(partners, C_partner))
    G, *_, H = partners.shape
    same = np.broadcast_to(np.eye(H), (G, H, H))
    return same, same, 1.0


def gram_matrix(heads: np.ndarray, C: np.ndarray | None) -> np.ndarray:
    """Inner products [G, H, G, H] of the columns of heads [G, D, H] in the metric C [D, D]."""
    G, D, H = heads.shape
    flat = heads.transpose(1, 0, 2).reshape(D, G * H)
    return (flat.T @ (flat if C is None else C @ flat)).reshape(G, H, G, H)


def partner_covariances(partners: np.ndarray, C: np.ndarray | None) -> np.ndarray:
    """Second moments [G, H, H] of what partners [G, P, D, H] give for inputs with covariances C."""
    right = partners if C is None else C @ partners
    return (partners.swapaxes(2, 3) @ right).sum(1)


def svd(gram: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Top H right singular vectors of the heads side by side, head h times root_h: [G, H, H].

    They are eigenvectors of the Gram matrix, so neither a root of the covariances is taken nor a
    matrix with a row a token. They are turned so that the first head's block is symmetric: nearest
    to leaving that head as it is.
    """
    G, H = gram.shape[:2]
    _, vectors = np.linalg.eigh(_weighted(gram, root))
    V = vectors[:, -H:].reshape(G, H, H)
    return V @ polar(V[0]).T


def _weighted(gram: np.ndarray, root: np.ndarray) -> np.ndarray:
    """The Gram matrix [G * H, G * H] of the heads, head h times root_h."""
    size = gram.shape[0] * gram.shape[1]
    return np.einsum("GIH,GIKJ,KJL->GHKL", root, gram, root).reshape(size, size)


def procrustes(gram: np.ndarray) -> np.ndarray:
    """Rotations [G, H, H] of the heads to their mean (generalised Procrustes), the first fixed.

    The start is the nearest to the singular vectors, which is exact for rotated copies.
    """
    G, H = gram.shape[:2]
    R = polar(svd(gram, np.broadcast_to(np.eye(H), (G, H, H))))
    before = -np.inf
    for _ in range(ROUNDS):
        towards = np.einsum("GHKJ,KJI->GHI", gram, R)
        fit = np.einsum("GHI,GHI->", R, towards)
        if fit - before <= TOLERANCE * abs(fit):
            break
        R, before = polar(towards), fit
    return R @ R[0].T


def polar(x: np.ndarray) -> np.ndarray:
    """The orthogonal matrices nearest to x [..., H, H]."""
    U, _, Vh = np.linalg.svd(x)
    return U @ Vh


def roots(covariances: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Symmetric roots of covariances [G, H, H], their inverses, and the largest condition number.

    Small eigenvalues are raised to FLOOR of the group's largest; if all are zero, to one.
    """
    values, vectors = np.linalg.eigh(covariances)
    worst = max(condition(m) for m in covariances)
    root = np.sqrt(np.maximum(values, FLOOR * values.max() if values.max() > 0 else 1.0))
    left, right = vectors, vectors.swapaxes(1, 2)
    return (left * root[:, None]) @ right, (left / root[:, None]) @ right, worst


def condition(covariances: np.ndarray) -> float:
    """Largest by smallest eigenvalue of [n, n]; infinite when the smallest is not positive."""
    values = np.linalg.eigvalsh(covariances)
    return float(values[-1] / values[0]) if values[0] > 0 else np.inf


def shrunk(covariances: np.ndarray, shrinkage: float) -> np.ndarray | None:
    """Moments [D, D] drawn to the multiple of the identity with their trace; None if all zero."""
    scale = np.trace(covariances) / len(covariances)
    if scale <= 0:
        return None
    return (1 - shrinkage) * covariances + shrinkage * scale * np.eye(len(covariances))
