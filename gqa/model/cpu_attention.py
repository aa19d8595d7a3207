"""Attention in the memory layouts that XLA:CPU computes fastest.

Both functions equal `grouped_query_attention` of `attention.py`, and the letters are the same:

    attention_with_custom_gradient  training: the backward pass is written by hand
                                    tests/model/test_cpu_attention.py
                                    ::test_custom_gradient_has_the_values_and_gradients_of_the_definition
    blocked_attention               decoding: keys and values lie in blocks of positions
                                    tests/model/test_cpu_attention.py
                                    ::test_blocks_have_the_values_of_the_definition

Keys are [B, K, H, S] and values [B, K, S, H], so that the products read both in memory order.
Training uses the first function also on GPUs and TPUs wherever `fused_attention.py` has no kernel.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gqa.model.attention import check_heads, split_heads


def attention_with_custom_gradient(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    position_bias: Float[Array, "1 N T S"] | None = None,
    mask: Float[Array, "#B 1 #T S"] | None = None,
    dropout: Float[Array, "B N 1 S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend as `grouped_query_attention` does, with a gradient that is written by hand.

    The bias comes in two parts, each smaller than their sum [B, N, T, S].

    Args:
        position_bias: added to the logits; gets a gradient.
        mask: added to the logits; gets no gradient.
        dropout: multiplies the attention weights; gets no gradient.

    Raises:
        ValueError: if K does not divide N.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    check_heads(N, K)
    G = N // K

    # The G query heads of a group become G * T rows of one matrix product with their KV head. Bias,
    # mask and dropout get the same rows: head by head, and within a head query by query.
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    if position_bias is not None:
        position_bias = position_bias.reshape(1, K, G * T, -1)
    if mask is not None and mask.shape[2] > 1:
        mask = jnp.tile(mask, (1, 1, G, 1))
    if dropout is not None:
        dropout = jnp.repeat(dropout.reshape(B, K, G, -1), T, axis=2)

    out = _attend_rows(q, k, v, position_bias, mask, dropout)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _attend_rows(
    q: Array,
    k: Array,
    v: Array,
    position_bias: Array | None,
    mask: Array | None,
    dropout: Array | None,
) -> Array:
    """Attend from q [B, K, M, H], with M = G * T rows for each KV head; returns [B, K, M, H].

    The last three arguments are broadcastable to [B, K, M, S]. No array has more than four axes,
    because XLA:CPU materialises whatever it has to broadcast to five. The backward pass is written
    by hand, because the automatic one fuses transposes of [.., M, S] arrays into its products.
    """
    return _attend_rows_forward(q, k, v, position_bias, mask, dropout)[0]


def _attend_rows_forward(
    q: Array,
    k: Array,
    v: Array,
    position_bias: Array | None,
    mask: Array | None,
    dropout: Array | None,
) -> tuple[Array, tuple]:
    """Return the output, and what the backward pass reads."""
    logits = _product(q, k, 3, 2)
    biases = [bias for bias in (position_bias, mask) if bias is not None]
    if biases:
        # All layers add the same sum of biases, so XLA computes this sum once.
        logits += sum(biases)

    weights = jax.nn.softmax(logits)
    dropped = weights if dropout is None else weights * dropout
    out = _product(dropped.astype(v.dtype), v, 3, 2).astype(v.dtype)
    return out, (q, k, v, weights, dropout, out, position_bias is not None)


def _attend_rows_backward(saved: tuple, dout: Array) -> tuple[Array | None, ...]:
    """Return the gradients of all six arguments from the gradient of the output [B, K, M, H].

    Mask and dropout are constants and get None. `d` before a name stands for the loss's gradient.
    """
    q, k, v, weights, dropout, out, has_bias = saved
    dropped = weights if dropout is None else weights * dropout

    # dv = dropped' dout, computed as (dout' dropped)'. So the transposed arrays are the small ones,
    # [.., M, H] and [.., S, H], and not the weights [.., M, S].
    dv = _product(_transposed(dout), dropped.astype(v.dtype), 3, 2).swapaxes(2, 3)

    dweights = _product(dout, v, 3, 3)
    if dropout is not None:
        dweights *= dropout

    # The softmax's gradient needs sum_s weights * dweights. It equals dout . out, a shorter sum.
    inner = jnp.sum(dout * out, axis=-1, keepdims=True, dtype=jnp.float32)
    dlogits = weights * (dweights - inner)

    # logits = q k. The two products take the gradient in the dtype of their other operand.
    narrow = dlogits.astype(k.dtype)
    dq = _product(narrow, k, 3, 3).astype(q.dtype)
    dk = _product(_transposed(q), narrow, 3, 2).astype(k.dtype)

    dbias = None
    if has_bias:
        # Sum over the batch as a product with ones: XLA:CPU runs a sum over the leading axis at a
        # fraction of the memory bandwidth.
        ones = jnp.ones(len(q))
        dbias = jax.lax.dot_general(ones, dlogits, (((0,), (0,)), ((), ())), "highest")[None]
    return dq, dk, dv.astype(v.dtype), dbias, None, None


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)


def _product(x: Array, y: Array, i: int, j: int) -> Array:
    """Multiply over axis i of x and axis j of y; axes 0 and 1 are a batch. Sums in float32."""
    dimensions = (((i,), (j,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _transposed(x: Array) -> Array:
    """Swap the last two axes and materialise the result.

    Otherwise XLA fuses the transpose into the product, which is slower than both.
    """
    return jax.lax.optimization_barrier(x.swapaxes(2, 3))


def blocked_attention(
    q: Float[Array, "B T N H"], k: Array, v: Array, bias: Float[Array, "#B #N #T S"]
) -> Float[Array, "B T N H"]:
    """Attend from the few query rows of a decoding step to keys and values in C blocks.

    The products take k and v in the very shape in which the cache keeps them. If a program read a
    cache in two shapes, XLA:CPU would write the cache twice.

    Args:
        k: [B * K, C, H, S / C], or [B * K, H, S] where C is 1.
        v: [B * K, C, S / C, H], or [B * K, S, H] where C is 1.
        bias: added to the logits.
    """
    B, T, N, H = q.shape
    K = len(v) // B

    # All query rows of a KV head are the rows M of one product.
    q = q.astype(k.dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    bias = split_heads(bias, K)
    if k.ndim == 3:
        rows = q.reshape(B * K, -1, H)
        logits = jnp.einsum("bMH,bHS->bMS", rows, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits.reshape(*q.shape[:4], -1) + bias)
        out = jnp.einsum("bMS,bSH->bMH", weights.reshape(logits.shape).astype(v.dtype), v)
    else:
        out = _attend_each_block(q, k, v, bias)
    return out.astype(v.dtype).reshape(q.shape).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_each_block(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """Attend from q [B, K, G, T, H] to several blocks; returns float32 [B * K, M, H].

    bias is [B or 1, K or 1, G or 1, T, S]. Each block contributes a product of its own, and the
    softmax divides the sum of these by the total of the weights of all blocks.
    """
    (B, K, G, T, H), C, block = q.shape, k.shape[1], k.shape[3]
    rows = jnp.broadcast_to(q.reshape(B * K, 1, G * T, H), (B * K, C, G * T, H))
    logits = jnp.einsum("bCMH,bCHS->bCMS", rows, k, preferred_element_type=jnp.float32)

    # Cut the key axis of the bias into blocks as well: [B or 1, K or 1, C, G * T or 1, block].
    bias = bias.reshape(*bias.shape[:2], -1, C, block).swapaxes(2, 3)
    split = logits.reshape(B, K, C, G * T, block) + bias

    # A softmax over axes 2 and 4 together, which are all keys. The division by the total comes
    # last, on [M, H] numbers of the output instead of [C, M, block] weights.
    weights = jnp.exp(split - split.max((2, 4), keepdims=True))
    total = weights.sum((2, 4)).reshape(B * K, G * T, 1)

    weights = weights.reshape(logits.shape).astype(v.dtype)
    out = jnp.einsum("bCMS,bCSH->bCMH", weights, v, preferred_element_type=jnp.float32)
    return out.sum(1) / total
