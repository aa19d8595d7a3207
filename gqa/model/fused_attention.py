"""Fused attention on accelerators: the logits [B, N, T, S] never reach main memory.

Each kernel equals `grouped_query_attention` of `attention.py`, in value and gradient, wherever a
query is not padding (tests/model/test_fused_attention.py::test_a_kernel_is_the_definition). There
are three kernels, and none repeats K and V for the query heads that share them:

    cudnn    NVIDIA GPUs: `jax.nn.dot_product_attention(implementation="cudnn")`
    splash   TPUs, cross-attention: Pallas' Splash attention, which takes no bias
    flash    TPUs, self-attention: Pallas' flash attention, which takes T5's position bias

A caller asks for a kernel and computes attention in another way if none fits:

    out = fused_attention(q, k, v, position_bias=..., segments=..., causal=...)
    if out is None:
        out = attention_with_custom_gradient(...)  # of `cpu_attention.py`

XLA cannot partition Pallas' kernels. On several TPUs they run under the mesh of `jax.set_mesh`, and
each device computes its rows of the batch and its heads.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from gqa.model.attention import MASKED, AnyArray, Segments

# `select` reads shapes and dtypes alone, so it takes arrays and their shapes.
ArrayOrShape = Array | jax.ShapeDtypeStruct

LANES = 128  # T and S of the TPU kernels are multiples of this number

# The shortest T and S at which flash attention saves memory. It writes LANES copies of each row's
# softmax statistics, and a gradient of the bias for each example: compiled for TPU v4, its gradient
# takes 1.5 times the memory of the definition's at 512 positions, and less from 1024 on.
FLASH_LENGTH = 1024
BLOCKS = (512, 384, 256, 128)  # positions of a TPU block; larger blocks read K and V less often


class Selection(NamedTuple):
    """The kernel that fits, or None and the reason why none does."""

    kernel: str | None
    reason: str = ""


def platform() -> str:
    """Return the platform that programs are compiled for.

    It is that of the mesh that `jax.set_mesh` has set, or else that of this process's devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def backend() -> str:
    """Return which kernels `platform()` has: "cudnn" (Ampere and later), "tpu" or "" (none)."""
    if platform() == "tpu":
        return "tpu"
    if platform() == "gpu" != jax.default_backend():
        # Compiled ahead of time for a GPU of gqa/aot/chips.py, all of which are Ampere or later.
        return "cudnn"
    # NVIDIA's capabilities are numbers like "9.0"; AMD's are names.
    capability = getattr(jax.devices()[0], "compute_capability", "")
    major = capability.partition(".")[0]
    return "cudnn" if major.isdigit() and int(major) >= 8 else ""


def select(
    q: Float[ArrayOrShape, "B T N H"],
    k: Float[ArrayOrShape, "B S K H"],
    *,
    position_bias: bool,
    packed: bool,
    dropout: bool,
    backend: str,
) -> Selection:
    """Choose the kernel for q [B, T, N, H] and k [B, S, K, H].

    q and k may also be shapes with dtypes. `position_bias`, `packed` and `dropout` say whether the
    attention has a position bias, rows of several examples, and dropout.
    """
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    if backend not in ("cudnn", "tpu"):
        return Selection(None, "this backend has no fused attention")
    if q.dtype != k.dtype:
        return Selection(None, f"queries are {q.dtype}, keys {k.dtype}")
    if dropout and K < N:
        return Selection(None, "dropout differs among the query heads that share a KV head")
    if backend == "cudnn":
        return _select_cudnn(T, S, H, q.dtype, position_bias, packed)

    # The rest is about Pallas' kernels on TPUs: first shapes, then how a mesh splits them.
    if min(T, S) < LANES // 2:
        return Selection(None, f"more than half of a block of {LANES} positions would be padding")
    if position_bias and min(T, S) < FLASH_LENGTH:
        return Selection(None, f"with a bias a kernel saves nothing below {FLASH_LENGTH} positions")
    if H > LANES and H % LANES:
        return Selection(None, f"head_dim {H} is over {LANES} and no multiple of it")

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:
        return Selection(None, "there are several devices, and jax.set_mesh has set no mesh")
    rows = 1 if mesh.empty else mesh.size // mesh.shape["model"]
    if B % rows:
        return Selection(None, f"{B} rows do not split over {rows} devices")
    if not mesh.empty and K % mesh.shape["model"]:
        return Selection(None, f"{K} KV heads do not split over {mesh.shape['model']} devices")
    return Selection("flash" if position_bias else "splash")


def _select_cudnn(
    T: int, S: int, H: int, dtype: jnp.dtype, position_bias: bool, packed: bool
) -> Selection:
    """Return whether cuDNN takes T queries and S keys with heads of size H, and why not."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return Selection(None, f"cuDNN's attention is for 16 bits, not {dtype}")
    if H > 128 or H % 8:
        return Selection(None, f"head_dim {H} is not a multiple of 8 up to 128")
    if packed:
        # A mask per row would have to be a bias, whose gradient cuDNN would compute and write:
        # for a bias with a batch axis it came out as zeros (jax-ml/jax#30593).
        return Selection(None, "packed rows need a mask that cuDNN only takes as a bias")
    if position_bias and (T % 2 or S % 2):
        return Selection(None, f"with a bias cuDNN needs even lengths, not {T} and {S}")
    return Selection("cudnn")


def fused_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    position_bias: Float[Array, "1 N T S"] | None,
    segments: Segments | None,
    causal: bool,
    dropout: Float[Array, "B N 1 S"] | None = None,
    backend: str,
) -> Float[Array, "B T N H"] | None:
    """Attend as `grouped_query_attention` does, with the kernel that `select` chooses.

    Args:
        position_bias: added to the logits.
        segments: limits each query to its own example; None limits nothing.
        causal: limits each query to its own position and those before.
        dropout: multiplies the weights; one draw for each key, as in T5.
        backend: as `backend()` returns it.

    Returns:
        The output, or None if no kernel fits.
    """
    kernel, _ = select(
        q,
        k,
        position_bias=position_bias is not None,
        packed=segments is not None and segments.packed,
        dropout=dropout is not None,
        backend=backend,
    )
    if kernel is None:
        return None

    if dropout is not None:
        # All queries share the draw of a key. So instead of the weights of a key, of which the
        # kernel keeps no array, its value can be multiplied.
        v *= dropout[:, :, 0].swapaxes(1, 2)[..., None].astype(v.dtype)
    if kernel == "cudnn":
        return _cudnn(q, k, v, position_bias, segments, causal)

    # Pallas' kernels hide keys of other segments. They pad T and S with segment 0, so real
    # positions need a segment number also where the caller has none.
    if segments is None:
        query_ids, key_ids = (jnp.ones(x.shape[:2], jnp.int32) for x in (q, k))
        segments = Segments(query_ids, key_ids, packed=False)
    ids = segments.query, segments.key
    if kernel == "splash":
        return _per_device(functools.partial(_splash, causal=causal), (q, k, v, *ids))
    return _per_device(functools.partial(_flash, causal=causal), (q, k, v, *ids), position_bias)


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    position_bias: Array | None,
    segments: Segments | None,
    causal: bool,
) -> Array:
    """Attend with cuDNN: q [B, T, N, H] to k and v [B, S, K, H]; returns [B, T, N, H]."""
    lengths = None
    if segments is not None:
        # At least one key, so that the softmax of an example of padding alone is defined. Queries
        # get no lengths: a query that is padding attends to real keys, so its output is finite.
        lengths = jnp.maximum(jnp.sum(segments.key > 0, axis=1, dtype=jnp.int32), 1)
    if position_bias is not None:
        position_bias = position_bias.astype(q.dtype)  # another dtype gives NaN, jax-ml/jax#32242
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        position_bias,
        scale=1.0,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def _per_device(
    attend: Callable, arrays: tuple[AnyArray, ...], position_bias: Array | None = None
) -> Array:
    """Run `attend` on each device's rows and heads, under the mesh that `jax.set_mesh` has set.

    Arrays of four axes are split by rows and by heads, others (segment numbers) by rows.
    """
    shared = () if position_bias is None else (position_bias,)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(*arrays, *shared)

    # Rows are split over every axis but "model", heads over "model". A device that holds query
    # heads of a group also holds the KV head of the group, because `select` asked for that.
    rows = tuple(name for name in mesh.axis_names if name != "model")
    split = PartitionSpec(rows, None, "model")
    specs = tuple(split if x.ndim == 4 else PartitionSpec(rows) for x in arrays)
    specs += (PartitionSpec(None, "model"),) * len(shared)

    # Pallas' kernels do not declare along which axes of the mesh their results vary, so shard_map
    # cannot check this.
    run = jax.shard_map(attend, in_specs=specs, out_specs=split, check_vma=False)
    return run(*arrays, *shared)


def _splash(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array, causal: bool) -> Array:
    """Run Splash attention, which reads a group's KV head for each of its query heads itself.

    q is [B, T, N, H], k and v are [B, S, K, H], and ids are [B, T] and [B, S].
    """
    T = q.shape[1]
    q, k, v, query_ids, key_ids = map(_fill, (q, k, v, query_ids, key_ids))
    shape = q.shape[1], k.shape[1]
    rows, columns = map(_block, shape)
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=splash.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        head_shards=1,
        q_seq_shards=1,
    )

    # The kernel takes one example, with the head axis first: [N, T, H] and [K, S, H].
    ids = splash.SegmentIds(query_ids, key_ids)
    out = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v)), ids)
    return out.swapaxes(1, 2)[:, :T]


def _flash(
    q: Array,
    k: Array,
    v: Array,
    query_ids: Array,
    key_ids: Array,
    position_bias: Array,
    causal: bool,
) -> Array:
    """Run flash attention; the G query heads of a group are G * T rows of their KV head.

    The kernel knows only as many query heads as KV heads. With the heads of a group as rows of one
    head it serves grouped attention, and each KV head is read once for the group. Shapes are those
    of `_splash`, and the bias is [1, N, T, S].
    """
    (B, T, N, H), S, K = q.shape, k.shape[1], k.shape[2]
    G = N // K

    # The kernel's own causal mask would take the G * T rows for G * T positions, so the mask is
    # part of the bias.
    bias = position_bias[0].astype(jnp.float32)
    if causal:
        bias += jnp.where(jnp.tri(T, S, dtype=bool), 0.0, MASKED)[None]
    bias = jnp.pad(bias, ((0, 0), (0, -T % LANES), (0, -S % LANES)))
    # The kernel reads the bias as often as it would read the logits, so its bytes count.
    bias = bias.astype(q.dtype)

    # From here on T and S are whole numbers of lanes.
    q, k, v, query_ids, key_ids = map(_fill, (q, k, v, query_ids, key_ids))
    T, S = bias.shape[1:]
    rows, columns = _block(G * T), _block(S)
    names = ("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq")
    sizes = dict.fromkeys(names, rows)
    names = ("block_k", "block_k_major", "block_k_major_dkv", "block_k_dkv")
    sizes |= dict.fromkeys((*names, "block_k_major_dq", "block_k_dq"), columns)

    def one(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> Array:
        # vmap gives the bias no batch axis, so the kernel reads the same bias for all examples.
        ids = flash.SegmentIds(jnp.tile(query_ids, G)[None], key_ids[None])
        return flash.flash_attention(
            q[None],
            k[None],
            v[None],
            bias.reshape(1, K, G * T, S),
            ids,
            block_sizes=flash.BlockSizes(block_b=1, **sizes),
        )[0]

    q = q.transpose(0, 2, 1, 3).reshape(B, K, G * T, H)
    out = jax.vmap(one)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), query_ids, key_ids)
    return out.reshape(B, N, T, H).swapaxes(1, 2)[:, : position_bias.shape[2]]


def _fill(x: Array) -> Array:
    """Pad positions (axis 1) with zeros up to a multiple of `LANES`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)) + ((0, 0),) * (x.ndim - 2))


def _block(length: int) -> int:
    """Return the largest block that divides `length`."""
    return next(block for block in BLOCKS if length % block == 0)
