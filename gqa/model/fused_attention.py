"""Fused attention on accelerators: the logits [B, N, T, S] never reach main memory.

The definition is `gqa.attention.attend`; the letters are those of that file. There are three
kernels, and none repeats K and V for the query heads that share them:

    cudnn    NVIDIA GPUs: `jax.nn.dot_product_attention(implementation="cudnn")`
    splash   TPUs, cross-attention: Pallas' Splash attention, which takes no bias
    flash    TPUs, self-attention: Pallas' flash attention, which takes T5's position bias

A caller asks for one and keeps the definition for where there is none:

    out = fused_attention(q, k, v, position_bias=..., segments=..., causal=...)
    if out is None:
        out = attend(...)  # with the same bias, and the segments and causality as one more

Pallas' kernels are not partitioned by XLA: on several TPUs they run under the mesh of
`jax.set_mesh`, each device on its rows of the batch and its heads.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from gqa.model.attention import MASKED, Segments

LANES = 128  # T and S of the TPU kernels are multiples of it
# Flash attention writes statistics of each row LANES wide, and a gradient of the bias for each
# example. Compiled for TPU v4, its gradient takes 1.5 times the memory of the definition's at 512
# positions, and less than the definition's from here on.
FLASH_LENGTH = 1024
BLOCKS = (512, 384, 256, 128)  # positions of a TPU block; larger ones read K and V less often


class Selection(NamedTuple):
    """A kernel, or None and why there is none."""

    kernel: str | None
    reason: str = ""


def platform() -> str:
    """What a program is compiled for: the devices of the mesh that is set, or this process's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def backend() -> str:
    """What fuses attention there: "cudnn" (Ampere and later), "tpu" or "" (nothing)."""
    if platform() == "tpu":
        return "tpu"
    if platform() == "gpu" != jax.default_backend():
        return "cudnn"  # compiled ahead of time: gqa/aot/chips.py has no GPU that is older
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0"; AMD's are names
    major = capability.partition(".")[0]
    return "cudnn" if major.isdigit() and int(major) >= 8 else ""


def select(
    q: Array,
    k: Array,
    *,
    position_bias: bool,
    packed: bool,
    dropout: bool,
    backend: str,
) -> Selection:
    """The kernel for q [B, T, N, H] and k [B, S, K, H] (arrays or their shapes and dtypes)."""
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    if backend not in ("cudnn", "tpu"):
        return Selection(None, "this backend has no fused attention")
    if q.dtype != k.dtype:
        return Selection(None, f"queries are {q.dtype}, keys {k.dtype}")
    if dropout and K < N:
        return Selection(None, "dropout differs among the query heads that share a KV head")
    if backend == "cudnn":
        return _select_cudnn(T, S, H, q.dtype, position_bias, packed)
    if min(T, S) < LANES // 2:
        return Selection(None, f"of a block of {LANES} positions more than half would be padding")
    if position_bias and min(T, S) < FLASH_LENGTH:
        return Selection(None, f"with a bias a kernel saves nothing below {FLASH_LENGTH} positions")
    if H > LANES and H % LANES:
        return Selection(None, f"head_dim {H} is over {LANES} and no multiple of it")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:
        return Selection(None, "there are several devices and no mesh is set")
    rows = 1 if mesh.empty else mesh.size // mesh.shape["model"]
    if B % rows:
        return Selection(None, f"{B} rows do not split over {rows} devices")
    if not mesh.empty and K % mesh.shape["model"]:
        return Selection(None, f"{K} KV heads do not split over {mesh.shape['model']} devices")
    return Selection("flash" if position_bias else "splash")


def _select_cudnn(
    T: int, S: int, H: int, dtype: jnp.dtype, position_bias: bool, packed: bool
) -> Selection:
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
    q: Array,
    k: Array,
    v: Array,
    *,
    position_bias: Array | None,
    segments: Segments | None,
    causal: bool,
    dropout: Array | None = None,
    backend: str,
) -> Array | None:
    """Attend from q [B, T, N, H] to k and v [B, S, K, H] as `attend` does: [B, T, N, H].

    None if `select` has no kernel for it.

    Args:
        position_bias: [1, N, T, S], added to the logits.
        segments: what may attend to what; None is everything.
        causal: positions may not attend to later ones.
        dropout: [B, N, 1, S], multiplies the weights; one draw per key, as in T5.
        backend: of `backend()`.
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
        # The same for all queries, it multiplies a value as well as the value's weights.
        v *= dropout[:, :, 0].swapaxes(1, 2)[..., None].astype(v.dtype)
    if kernel == "cudnn":
        return _cudnn(q, k, v, position_bias, segments, causal)
    if segments is None:
        segments = Segments(*(jnp.ones(x.shape[:2], jnp.int32) for x in (q, k)), packed=False)
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
    lengths = None
    if segments is not None:
        # One key at least, so that a row of padding has a softmax. Queries get no lengths: those
        # that are padding attend to real keys, and what they give is then finite in any case.
        lengths = jnp.maximum(jnp.sum(segments.key > 0, axis=1, dtype=jnp.int32), 1)
    if position_bias is not None:
        position_bias = position_bias.astype(q.dtype)  # others give NaN, jax-ml/jax#32242
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
    attend: Callable, arrays: tuple[Array, ...], position_bias: Array | None = None
) -> Array:
    """`attend` on each device's rows and heads, under the mesh that is set; ids have no heads."""
    shared = () if position_bias is None else (position_bias,)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(*arrays, *shared)
    rows = tuple(name for name in mesh.axis_names if name != "model")
    split = PartitionSpec(rows, None, "model")
    specs = tuple(split if x.ndim == 4 else PartitionSpec(rows) for x in arrays)
    specs += (PartitionSpec(None, "model"),) * len(shared)
    # A kernel does not say along which axes its results vary, so that is not checked.
    run = jax.shard_map(attend, in_specs=specs, out_specs=split, check_vma=False)
    return run(*arrays, *shared)


def _splash(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array, causal: bool) -> Array:
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
    """The G queries of a group are more rows of one KV head, each with its own bias."""
    (B, T, N, H), S, K = q.shape, k.shape[1], k.shape[2]
    G = N // K
    bias = position_bias[0].astype(jnp.float32)
    if causal:
        bias += jnp.where(jnp.tri(T, S, dtype=bool), 0.0, MASKED)[None]
    bias = jnp.pad(bias, ((0, 0), (0, -T % LANES), (0, -S % LANES)))
    bias = bias.astype(q.dtype)  # it is read as often as the logits would be
    q, k, v, query_ids, key_ids = map(_fill, (q, k, v, query_ids, key_ids))
    T, S = bias.shape[1:]
    rows, columns = _block(G * T), _block(S)
    names = ("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq")
    sizes = dict.fromkeys(names, rows)
    names = ("block_k", "block_k_major", "block_k_major_dkv", "block_k_dkv")
    sizes |= dict.fromkeys((*names, "block_k_major_dq", "block_k_dq"), columns)

    def one(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> Array:
        # The bias has no batch axis: the kernel reads the one there is for every example.
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
    """Positions (axis 1) up to whole lanes; the new ones are padding."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)) + ((0, 0),) * (x.ndim - 2))


def _block(length: int) -> int:
    return next(block for block in BLOCKS if length % block == 0)
