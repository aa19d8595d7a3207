"""The definition of grouped-query attention (Ainslie et al., 2023, section 2.2).

N query heads share K key/value heads. Letters, here and in every einsum of the project:

    B batch      T query length   S key length   D model     F mlp      L layers   V vocabulary
    N query heads                 K KV heads     G = N / K   H head dim

K = N is multi-head attention and K = 1 is multi-query attention; the formula has no branch on K.
The heads of a group are neighbours: query head n reads KV head n // G. For example, N = 16 and
K = 4: query heads 0-3 read KV head 0, query heads 4-7 read KV head 1.

This file holds the formula and the masks, and nothing for a particular backend. Two neighbours
compute the same formula faster: `cpu_attention.py` and `fused_attention.py`.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Segment numbers and masks may be NumPy arrays where they are not traced.
AnyArray = Array | np.ndarray

# A finite "minus infinity". A row whose keys are all masked (padding) then has equal weights; with
# -inf its softmax would be NaN.
MASKED = -1e10


@flax.struct.dataclass
class Segments:
    """Number the example that each position belongs to: query [B, T] and key [B, S], int32.

    A query attends to the keys that carry its own number. 0 is padding, which nobody attends to.

    `packed` says that a row may hold several examples. If it is False, a row of numbers is ones
    followed by zeros, and a query that is padding may attend to any key, because nothing reads its
    output.
    """

    query: AnyArray
    key: AnyArray
    packed: bool = flax.struct.field(pytree_node=False)


def make_mask(
    segments: Segments | None, causal: bool, T: int, S: int
) -> Float[Array, "#B 1 #T S"] | None:
    """Return the bias that hides from T queries the keys they may not attend to.

    Args:
        segments: limits each query to its own example; None limits nothing.
        causal: limits each query to its own position and those before.

    Returns:
        0 where a query may look and `MASKED` elsewhere; None if every query may look everywhere.
    """
    # Causal: query t sees keys 0 .. t, the lower triangle.
    visible: AnyArray | None = jnp.tri(T, S, dtype=bool)[None, None] if causal else None
    if segments is not None:
        # Keys that are padding are hidden from every query. Where rows are packed, keys of other
        # examples are hidden, too.
        real = (segments.key > 0)[:, None, None, :]
        if segments.packed:
            real &= (segments.query[:, :, None] == segments.key[:, None, :])[:, None]
        visible = real if visible is None else visible & real
    return None if visible is None else as_bias(visible)


def as_bias(visible: Bool[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Turn a mask that is True where attention may look into a bias on the logits."""
    return jnp.where(visible, 0.0, MASKED)


def grouped_query_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    bias: Float[Array, "#B #N #T #S"] | None = None,
    dropout: Float[Array, "#B #N #T #S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend from N query heads to K key/value heads. This function is the definition.

    Logits are not divided by sqrt(H): T5 puts this factor into the query initialiser.

    Args:
        bias: added to the logits.
        dropout: multiplies the attention weights.

    Raises:
        ValueError: if K does not divide N.
    """
    weights = attention_weights(q, k, bias)
    if dropout is not None:
        weights *= split_heads(dropout, k.shape[2])

    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return out.reshape(*q.shape[:3], v.shape[3])


def attention_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    bias: Float[Array, "#B #N #T #S"] | None = None,
) -> Float[Array, "B K G T S"]:
    """Return how much each query head attends to each key, in float32; the sum over S is 1.

    Arguments and errors are those of `grouped_query_attention`.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    check_heads(N, K)

    # The G query heads of a group become an axis of their own. Query head n is head n % G of group
    # n // G, because a reshape cuts the head axis into neighbours. The products below then read KV
    # head n // G for all G query heads of its group, so K and V are never repeated.
    q = q.reshape(B, T, K, N // K, H)

    # Sum in float32 also for bfloat16 inputs, because the softmax is sensitive to small
    # differences.
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += split_heads(bias, K)

    return jax.nn.softmax(logits)  # over S, the last axis


def check_heads(N: int, K: int) -> None:
    """Raise a ValueError unless N query heads can share K KV heads evenly."""
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} KV heads; K must divide N")


def split_heads(x: Float[Array, "B N T S"], K: int) -> Float[Array, "B _ _ T S"]:
    """Reshape [B, N, T, S] to [B, K, G, T, S], the axes of the logits.

    A bias that is equal for all heads has a head axis of 1. It becomes [B, 1, 1, T, S], which is
    broadcast.
    """
    B, N, T, S = x.shape
    return x.reshape(B, K, N // K, T, S) if N > 1 else x[:, None]
