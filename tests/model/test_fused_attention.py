"""Fused kernels are the definition, in value and gradient, wherever a query is not padding.

Without an accelerator the TPU kernels are interpreted and cuDNN's arguments go to XLA.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from gqa.model import fused_attention as fused_kernels
from gqa.model.attention import Segments, grouped_query_attention, make_mask
from gqa.model.fused_attention import fused_attention, select

B, N, H = 2, 4, 16


@pytest.fixture(autouse=True)
def _without_accelerators(monkeypatch, request):
    """Interpret kernels, and let XLA compute cuDNN's calls, where the hardware is missing."""
    pallas_call = pallas.pallas_call

    def interpreted(*args, **kwargs):
        return pallas_call(*args, **(kwargs | {"interpret": True}))

    if fused_kernels.backend() != "tpu":
        monkeypatch.setattr(pallas, "pallas_call", interpreted)
    if fused_kernels.backend() != "cudnn":
        request.getfixturevalue("cudnn_by_xla")


def make_inputs(K, T, S, dtype, bias):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (1, N, T, S), (B, T, N, H)
    drawn = [jax.random.normal(*x) for x in zip(keys, shapes, strict=True)]
    q, k, v = (x.astype(dtype) for x in drawn[:3])
    return {"q": q, "k": k, "v": v} | ({"bias": drawn[3]} if bias else {}), drawn[4]


def make_segments(T, S, packed, self_attention=False):
    """Return rows of different lengths: two examples in each if packed; else the last is empty."""

    def ids(length, *rows):
        first, both = (np.array(ends)[:, None] for ends in zip(*rows, strict=True))
        at = np.arange(length)[None]
        return jnp.asarray(np.where(at < first, 1, np.where(at < both, 2, 0)), jnp.int32)

    if packed:
        query, key = ids(T, (40, T - 9), (T // 2, T)), ids(S, (90, S - 7), (S // 3, S))
    else:
        query, key = ids(T, (T - 9, 0), (0, 0)), ids(S, (S - 30, 0), (0, 0))
    return Segments(query, query if self_attention else key, packed)


def defined(q, k, v, bias=None, *, segments, causal, dropout):
    mask = make_mask(segments, causal, q.shape[1], k.shape[1])
    mask = jnp.zeros((1, 1, 1, 1)) if mask is None else mask
    return grouped_query_attention(q, k, v, mask if bias is None else bias + mask, dropout)


def value_and_gradients(attend, inputs, cotangent, segments):
    """Return the output at real queries, and its gradients; padding is multiplied by zero."""
    real = 1.0 if segments is None else (segments.query > 0)[..., None, None]

    def loss(inputs):
        out = attend(**inputs).astype(jnp.float32)
        return jnp.sum(out * real * cotangent), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    assert jnp.isfinite(out).all()
    return gradients | {"out": out * real}


CASES = {  # backend, kernel, K, T, S, bias, packed, causal, dropout
    "cross-attention on TPU": ("tpu", "splash", 2, 100, 200, False, False, False, False),
    "packed cross-attention on TPU": ("tpu", "splash", 1, 100, 200, False, True, False, False),
    "an encoder on TPU": ("tpu", "flash", 4, 200, 200, True, True, False, True),
    "a decoder on TPU": ("tpu", "flash", 2, 114, 114, True, None, True, False),
    "a packed decoder on TPU": ("tpu", "flash", 1, 114, 114, True, True, True, False),
    "cross-attention on GPU": ("cudnn", "cudnn", 2, 100, 201, False, False, False, False),
    "an encoder on GPU": ("cudnn", "cudnn", 4, 200, 200, True, False, False, True),
    "a decoder on GPU": ("cudnn", "cudnn", 2, 114, 114, True, None, True, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_the_definition(monkeypatch, case):
    backend, kernel, K, T, S, bias, packed, causal, drop = CASES[case]
    monkeypatch.setattr(fused_kernels, "BLOCKS", (128,))  # several, though the shapes are small
    monkeypatch.setattr(fused_kernels, "FLASH_LENGTH", 64)
    dtype = jnp.bfloat16 if backend == "cudnn" else jnp.float32
    inputs, cotangent = make_inputs(K, T, S, dtype, bias)
    segments = None if packed is None else make_segments(T, S, packed, self_attention=bias)
    dropout = jax.random.bernoulli(jax.random.key(1), 0.9, (B, N, 1, S)) / 0.9 if drop else None
    options = {"segments": segments, "causal": causal, "dropout": dropout}
    chosen = select(
        inputs["q"],
        inputs["k"],
        position_bias=bias,
        packed=bool(packed),
        dropout=drop,
        backend=backend,
    )
    assert chosen == (kernel, "")

    def fused(q, k, v, bias=None):
        return fused_attention(q, k, v, position_bias=bias, backend=backend, **options)

    fused_results = value_and_gradients(fused, inputs, cotangent, segments)
    expected = value_and_gradients(
        functools.partial(defined, **options), inputs, cotangent, segments
    )
    for name, array in expected.items():
        scale = jnp.abs(array).max().astype(jnp.float32)
        tolerance = float(scale) * (1e-2 if dtype == jnp.bfloat16 else 1e-5)
        np.testing.assert_allclose(
            fused_results[name].astype(jnp.float32),
            array.astype(jnp.float32),
            atol=tolerance,
            rtol=0,
            err_msg=name,
        )


def shapes(T=128, S=128, K=4, H=64, dtype=jnp.bfloat16):
    return tuple(jax.ShapeDtypeStruct((B, *s, H), dtype) for s in ((T, N), (S, K)))


PLAIN = {"position_bias": False, "packed": False, "dropout": False}
# The reason for no kernel: (backend, shape, options) that cuDNN or the TPU kernels cannot compute.
REFUSED = {
    "no fused attention": ("", {}, {}),
    "dropout differs": ("tpu", {"K": 2}, {"dropout": True}),
    "16 bits, not float32": ("cudnn", {"dtype": jnp.float32}, {}),
    "head_dim 256": ("cudnn", {"H": 256}, {}),
    "head_dim 20": ("cudnn", {"H": 20}, {}),
    "packed rows": ("cudnn", {}, {"packed": True}),
    "even lengths, not 113": ("cudnn", {"T": 113}, {"position_bias": True}),
    "would be padding": ("tpu", {"T": 32}, {}),
    "nothing below 1024": ("tpu", {"T": 2000, "S": 1000}, {"position_bias": True}),
    "head_dim 192": ("tpu", {"H": 192}, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_without_a_fitting_kernel_the_reason_is_given(reason):
    backend, shape, options = REFUSED[reason]
    q, k = shapes(**shape)
    kernel, why = select(q, k, **(PLAIN | options), backend=backend)
    assert kernel is None
    assert reason in why
    assert select(*shapes(), **PLAIN, backend=backend or "tpu").kernel is not None


def test_without_a_kernel_there_is_no_output():
    q, k = (jnp.zeros(x.shape) for x in shapes())
    nothing = {"position_bias": None, "segments": None, "causal": False}
    assert fused_attention(q, k, k, **nothing, backend="") is None


def test_this_machine_is_asked_for_its_backend(monkeypatch):
    def backend_on(platform, **attributes):
        device = SimpleNamespace(platform=platform, **attributes)
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "devices", lambda: [device])
        return fused_kernels.backend()

    assert backend_on("cpu") == ""
    assert backend_on("tpu") == "tpu"
    assert backend_on("gpu", compute_capability="9.0") == "cudnn"
    assert backend_on("gpu", compute_capability="7.5") == ""
    assert backend_on("gpu", compute_capability="gfx90a") == ""


SCRIPT = """
import sys
import jax
import numpy as np
from jax.experimental import pallas
from gqa.model import fused_attention
from gqa.runtime import sharding
from gqa.runtime.mesh import make_mesh
from tests.support.toy import replicated

pallas_call = pallas.pallas_call
pallas.pallas_call = lambda *args, **kwargs: pallas_call(*args, **(kwargs | {"interpret": True}))
fused_attention.FLASH_LENGTH = 64
arrays = dict(np.load(sys.argv[1]))
mesh = make_mesh()
bias = replicated(arrays.pop("bias"), mesh)
q, k, v, query, key = (sharding.place({"x": x}, mesh)["x"] for x in arrays.values())

def loss(q, k, v, bias):
    segments = fused_attention.Segments(query, key, packed=True)
    out = fused_attention.fused_attention(
        q, k, v, position_bias=bias, segments=segments, causal=True, backend="tpu"
    )
    return (out * (query > 0)[..., None, None]).sum()

plain = {"position_bias": True, "packed": True, "dropout": False, "backend": "tpu"}
assert "no mesh" in fused_attention.select(q, k, **plain).reason
with jax.set_mesh(mesh):
    assert "do not split" in fused_attention.select(q[:1], k[:1], **plain).reason
    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)
assert len(gradients[0].sharding.device_set) == jax.device_count() == 2
np.savez(sys.argv[2], *gradients)
"""


def test_devices_share_a_batch(tmp_path):
    """The gradient of the bias is a sum over all devices' rows."""
    inputs, _ = make_inputs(2, 100, 100, jnp.float32, bias=True)
    segments = make_segments(100, 100, packed=True, self_attention=True)
    arrays = inputs | {"query": segments.query, "key": segments.key}
    np.savez(tmp_path / "in.npz", **arrays)
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "float32",
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
    }
    command = [sys.executable, "-c", SCRIPT, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(command, env=environment, check=True)
    gradients = dict(zip(inputs, np.load(tmp_path / "out.npz").values(), strict=True))
    attend = functools.partial(defined, segments=segments, causal=True, dropout=None)
    expected = value_and_gradients(attend, inputs, jnp.ones_like(inputs["q"]), segments)
    for name, array in gradients.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-4, err_msg=name)
