"""Grouped-query attention (Ainslie et al., 2023, section 2.2): N query heads share K KV heads.

Letters, here and in every einsum of the project:

    B batch      T query length   S key length   D model     F mlp      L layers   V vocabulary
    N query heads                 K KV heads     G = N / K   H head dim

K = N is multi-head attention and K = 1 is multi-query attention; the formula has no branch on it.
Query head n reads KV head n // G, so the heads of a group are neighbours. Keys are kept as
[B, K, H, S] and values as [B, K, S, H]: the products below then read both in memory order.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

# A finite "minus infinity": a row that is masked whole (padding) gives equal weights, not NaN.
MASKED = -1e10


@flax.struct.dataclass
class Segments:
    """Which example of its row each position belongs to: query [B, T] and key [B, S], int32.

    Queries attend to keys of their own number; 0 is padding, which is not attended to. `packed`
    says that a row may have several examples. If not, it is a run of ones and then zeros, and
    queries that are padding may attend to anything: nothing reads what comes out for them.
    """

    query: Array
    key: Array
    packed: bool = flax.struct.field(pytree_node=False)


def make_mask(segments: Segments | None, causal: bool, T: int, S: int) -> Array | None:
    """The bias that hides what T queries may not attend to, broadcastable to [B, 1, T, S]."""
    visible = jnp.tri(T, S, dtype=bool)[None, None] if causal else None
    if segments is not None:
        real = (segments.key > 0)[:, None, None, :]
        if segments.packed:
            real &= (segments.query[:, :, None] == segments.key[:, None, :])[:, None]
        visible = real if visible is None else visible & real
    return None if visible is None else as_bias(visible)


def as_bias(visible: Array) -> Array:
    """A boolean mask, True where attention may look, as a bias on the logits."""
    return jnp.where(visible, 0.0, MASKED)


def grouped_query_attention(
    q: Array, k: Array, v: Array, bias: Array | None = None, dropout: Array | None = None
) -> Array:
    """The definition: attend from q [B, T, N, H] to k and v [B, S, K, H]; returns [B, T, N, H].

    Logits are not divided by sqrt(H), as in T5 (the factor sits in the query initialiser).

    Args:
        bias: added to the logits; broadcastable to [B, N, T, S].
        dropout: multiplies the weights; broadcastable to [B, N, T, S].
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    _check_heads(N, K)
    # The G queries of a group are more rows of one product; K and V are never repeated.
    q = q.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += _split_heads(bias, K)
    weights = jax.nn.softmax(logits)
    if dropout is not None:
        weights *= _split_heads(dropout, K)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return out.reshape(B, T, N, H)


def _check_heads(N: int, K: int) -> None:
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} KV heads")


def _split_heads(x: Array, K: int) -> Array:
    """[B, N, T, S] -> [B, K, G, T, S], where a head axis of 1 stays broadcastable."""
    B, N, T, S = x.shape
    return x.reshape(B, K, N // K, T, S) if N > 1 else x[:, None]


def attend(
    q: Array,
    k: Array,
    v: Array,
    position_bias: Array | None = None,
    mask: Array | None = None,
    dropout: Array | None = None,
) -> Array:
    """`grouped_query_attention` as it is trained: k [B, K, H, S], v [B, K, S, H].

    The bias comes in two parts that stay small alone: position_bias [1, N, T, S], and mask,
    broadcastable to [B, 1, T, S], which like dropout [B, N, 1, S] gets no gradient.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    _check_heads(N, K)
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    if position_bias is not None:
        position_bias = position_bias.reshape(1, K, G * T, -1)
    if mask is not None and mask.shape[2] > 1:
        mask = jnp.tile(mask, (1, 1, G, 1))
    if dropout is not None:
        dropout = jnp.repeat(dropout.reshape(B, K, G, -1), T, axis=2)
    out = _attend(q, k, v, position_bias, mask, dropout)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _attend(q, k, v, position_bias, mask, dropout):
    """q [B, K, M, H], M = G * T rows a KV head; the others broadcastable to [B, K, M, S].

    Four axes, no more, and the backward pass by hand: on CPUs XLA writes out whatever it has to
    broadcast to five, and puts transposes of [.., M, S] arrays into the products of its own.
    """
    return _attend_forward(q, k, v, position_bias, mask, dropout)[0]


def _attend_forward(q, k, v, position_bias, mask, dropout):
    logits = _product(q, k, 3, 2)
    biases = [bias for bias in (position_bias, mask) if bias is not None]
    if biases:
        logits += sum(biases)  # their sum is the same in every layer, and taken once
    weights = jax.nn.softmax(logits)
    dropped = weights if dropout is None else weights * dropout
    out = _product(dropped.astype(v.dtype), v, 3, 2).astype(v.dtype)
    return out, (q, k, v, weights, dropout, out, position_bias is not None)


def _attend_backward(saved, dout):
    q, k, v, weights, dropout, out, has_bias = saved
    dropped = weights if dropout is None else weights * dropout
    dv = _product(_swapped(dout), dropped.astype(v.dtype), 3, 2).swapaxes(2, 3)
    dweights = _product(dout, v, 3, 3)
    if dropout is not None:
        dweights *= dropout
    # The softmax's inner product sum_s weights * dweights is also dout . out, a sum over H.
    inner = jnp.sum(dout * out, axis=-1, keepdims=True, dtype=jnp.float32)
    dlogits = weights * (dweights - inner)
    narrow = dlogits.astype(k.dtype)
    dq = _product(narrow, k, 3, 3).astype(q.dtype)
    dk = _product(_swapped(q), narrow, 3, 2).astype(k.dtype)
    dbias = None
    if has_bias:
        # As a product: XLA:CPU runs a sum over the leading axis at a fraction of the bandwidth.
        ones = jnp.ones(len(q))
        dbias = jax.lax.dot_general(ones, dlogits, (((0,), (0,)), ((), ())), "highest")[None]
    return dq, dk, dv.astype(v.dtype), dbias, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _product(x: Array, y: Array, i: int, j: int) -> Array:
    """Batched matrix product over axis i of x and j of y, summed in float32."""
    dimensions = (((i,), (j,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _swapped(x: Array) -> Array:
    """The last two axes in each other's place, in memory too; else the product would see to it."""
    return jax.lax.optimization_barrier(x.swapaxes(2, 3))


def attend_blocks(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """`attend` for the few rows of a decoding step, to keys and values in C blocks of positions.

    q [B, T, N, H], k [B * K, C, H, S / C] and v [B * K, C, S / C, H], both without C where it is 1;
    bias [B or 1, N, T, S] or [B, 1, 1, S]; returns [B, T, N, H]. Products take k and v in the very
    shape they are kept in: XLA:CPU would write a cache that it reads in two shapes twice.
    """
    B, T, N, H = q.shape
    K = len(v) // B
    # All query rows of a KV head are the rows M of one product.
    q = q.astype(k.dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    bias = _split_heads(bias, K)
    if k.ndim == 3:
        rows = q.reshape(B * K, -1, H)
        logits = jnp.einsum("bMH,bHS->bMS", rows, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits.reshape(*q.shape[:4], -1) + bias)
        out = jnp.einsum("bMS,bSH->bMH", weights.reshape(logits.shape).astype(v.dtype), v)
    else:
        out = _attend_each_block(q, k, v, bias)
    return out.astype(v.dtype).reshape(q.shape).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_each_block(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """q [B, K, G, T, H] to blocks, bias [B or 1, K or 1, G or 1, T, S]; float32 [B * K, M, H].

    Each block's part of the sum is a product of its own, and the softmax divides their total.
    """
    (B, K, G, T, H), C, block = q.shape, k.shape[1], k.shape[3]
    rows = jnp.broadcast_to(q.reshape(B * K, 1, G * T, H), (B * K, C, G * T, H))
    logits = jnp.einsum("bCMH,bCHS->bCMS", rows, k, preferred_element_type=jnp.float32)
    bias = bias.reshape(*bias.shape[:2], -1, C, block).swapaxes(2, 3)
    split = logits.reshape(B, K, C, G * T, block) + bias
    weights = jnp.exp(split - split.max((2, 4), keepdims=True))
    total = weights.sum((2, 4)).reshape(B * K, G * T, 1)
    weights = weights.reshape(logits.shape).astype(v.dtype)
    out = jnp.einsum("bCMS,bCSH->bCMH", weights, v, preferred_element_type=jnp.float32)
    return out.sum(1) / total


@jax.custom_vjp
def linear(x: Array, kernel: Array) -> Array:
    """x [..., D] times kernel [D, F].

    Its gradients are products of arrays as they lie in memory; left alone, XLA:CPU transposes the
    output's gradient while computing it, which takes longer than the product.
    """
    return x @ kernel


def _linear_backward(saved, dout):
    x, kernel = saved
    dout = jax.lax.optimization_barrier(dout)
    batch = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(dout, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    dkernel = jax.lax.dot_general(x, dout, ((batch, batch), ((), ())))
    return dx, dkernel


linear.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _linear_backward)
