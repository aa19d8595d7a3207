"""Test which kernel is chosen at the limits of each kernel."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gqa.model import fused_attention

PLAIN = {"position_bias": False, "packed": False, "dropout": False}


def chosen(backend, T=128, S=128, N=4, K=4, H=64, dtype=jnp.bfloat16, **options):
    q, k = (jax.ShapeDtypeStruct((2, *s, H), dtype) for s in ((T, N), (S, K)))
    return fused_attention.select(q, k, **(PLAIN | options), backend=backend).kernel


@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ({"H": 128}, "cudnn"),
        ({"H": 136}, None),
        ({"H": 8}, "cudnn"),
        ({"H": 12}, None),
        ({"T": 1, "S": 1}, "cudnn"),
        ({"T": 1}, "cudnn"),
        ({"dtype": jnp.float16}, "cudnn"),
        ({"dtype": jnp.float32}, None),
        ({"position_bias": True}, "cudnn"),
        ({"position_bias": True, "T": 127}, None),
        ({"position_bias": True, "S": 127}, None),
        ({"T": 127, "S": 127}, "cudnn"),
        ({"packed": True}, None),
        ({"dropout": True}, "cudnn"),
        ({"dropout": True, "K": 2}, None),
        ({"K": 1}, "cudnn"),
    ],
)
def test_limits_of_cudnn(size, kernel):
    assert chosen("cudnn", **size) == kernel


@pytest.mark.skipif(jax.device_count() > 1, reason="several devices need a mesh")
@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ({"T": 64, "S": 64}, "splash"),
        ({"T": 63}, None),
        ({"S": 63}, None),
        ({"T": 1024, "S": 1024, "position_bias": True}, "flash"),
        ({"T": 1023, "S": 1024, "position_bias": True}, None),
        ({"T": 1024, "S": 1023, "position_bias": True}, None),
        ({"H": 128}, "splash"),
        ({"H": 256}, "splash"),
        ({"H": 136}, None),
        ({"packed": True}, "splash"),
        ({"dtype": jnp.float32}, "splash"),
        ({"dropout": True, "K": 1}, None),
    ],
)
def test_limits_of_the_kernels_of_tpus(size, kernel):
    assert chosen("tpu", **size) == kernel


def test_queries_and_keys_of_two_types_have_no_kernel():
    q, k = (jax.ShapeDtypeStruct((2, 128, 4, 64), t) for t in (jnp.bfloat16, jnp.float16))
    assert fused_attention.select(q, k, **PLAIN, backend="cudnn").kernel is None


@pytest.mark.parametrize(
    ("capability", "backend"), [("8.0", "cudnn"), ("10.0", "cudnn"), ("7.5", ""), ("", "")]
)
def test_fused_attention_is_for_ampere_and_later(monkeypatch, capability, backend):
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert fused_attention.backend() == backend


@pytest.mark.parametrize(
    ("length", "block"), [(128, 128), (384, 384), (512, 512), (640, 128), (768, 384), (1024, 512)]
)
def test_a_block_is_the_largest_that_divides_a_length(length, block):
    assert fused_attention._block(length) == block


@pytest.mark.parametrize(("length", "filled"), [(1, 128), (127, 128), (128, 128), (129, 256)])
def test_positions_are_filled_up_to_whole_lanes(length, filled):
    x = fused_attention._fill(jnp.ones((2, length, 3)))
    assert x.shape == (2, filled, 3)
    assert x.sum() == 2 * length * 3
    assert x[:, :length].all()
