"""Find the limits of this machine: cores, memory, FLOP/s and bytes/s.

Peak rates are measured on CPUs and looked up on accelerators. Data sheets of accelerators that this
machine does not have are in `gqa/aot/chips.py`.
"""

import functools
import os
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from gqa.runtime.errors import UserError

# Dense peaks of one JAX device in TFLOP/s, for bfloat16 and for float32 at XLA's default
# precision, which multiplies in bfloat16 on TPUs and in TF32 on NVIDIA GPUs. On TPU v2, v3 and 7x a
# device is one core of a chip. Sources: Google's TPU documentation and NVIDIA's data sheets, whose
# figures with sparsity are twice these.
PEAKS = {
    "TPU v2": (23, 23),
    "TPU v3": (61.5, 61.5),
    "TPU v4": (275, 275),
    "TPU v4 lite": (138, 138),
    "TPU v5 lite": (197, 197),
    "TPU v5e": (197, 197),
    "TPU v5": (459, 459),
    "TPU v5p": (459, 459),
    "TPU v6 lite": (918, 918),
    "TPU v6e": (918, 918),
    "TPU7x": (1153.5, 1153.5),
    "NVIDIA A10": (125, 62.5),
    "NVIDIA A100": (312, 156),
    "NVIDIA L4": (121, 60),
    "NVIDIA L40S": (362, 183),
    "NVIDIA H100": (989.5, 494.5),
    "NVIDIA H100 NVL": (835.5, 417.5),
    "NVIDIA H100 PCIe": (756.5, 378),
    "NVIDIA H200": (989.5, 494.5),
    "NVIDIA H200 NVL": (835.5, 417.5),
    "NVIDIA B200": (2250, 1125),
}

SECONDS = 0.15  # how long one product or read is repeated


def cores() -> list[int]:
    """Return the numbers of the cores this process may use; of all, if the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def check_memory(nbytes: int, what: str) -> None:
    """Raise a UserError if something has more bytes than this machine's memory.

    Accelerators have memory of their own, so that nothing is refused there.

    Args:
        what: name of the thing in the message.
    """
    total = psutil.virtual_memory().total
    if jax.default_backend() == "cpu" and nbytes > total:
        raise UserError(
            f"{what} takes {nbytes / 2**30:.1f} GiB, this machine has {total / 2**30:.1f} GiB; "
            "use a smaller one or another machine"
        )


@functools.cache
def peak_flops(dtype: str) -> float | None:
    """Return the peak FLOP/s of all devices of this run together, in products of `dtype`.

    On CPUs the peak is measured, once a process, and each process is taken to have a machine to
    itself.

    Args:
        dtype: float32 or bfloat16.

    Returns:
        The peak; None, with a line on stdout, for a kind of device that `PEAKS` does not have.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return matmul_rate(dtype) * jax.process_count()
    peak = _known(device.device_kind, jnp.dtype(dtype))
    if peak is None:
        print(
            f"no MFU: gqa/runtime/hardware.py has no {dtype} peak of {device.device_kind}",
            flush=True,
        )
        return None
    return peak * jax.device_count()


def _known(kind: str, dtype: jnp.dtype) -> float | None:
    """Return the peak FLOP/s of one device, from the longest name in `PEAKS` that begins `kind`."""
    # Whole words are compared, because "NVIDIA A10" also begins "NVIDIA A100". Of "NVIDIA H100" and
    # "NVIDIA H100 PCIe" the longer name is the more precise one.
    words, columns = re.split("[ -]", kind), {"bfloat16": 0, "float32": 1}
    names = [name for name in PEAKS if name.split() == words[: len(name.split())]]

    # A MIG device is a part of a GPU, under the name of the whole GPU.
    if not names or "MIG" in words or dtype.name not in columns:
        return None
    return PEAKS[max(names, key=len)][columns[dtype.name]] * 1e12


def matmul_rate(dtype: str) -> float:
    """Measure the FLOP/s of a large square product of `dtype` on one JAX device; the best run.

    On CPUs this is the rate of the whole machine, because host devices share all cores.
    """
    size = 1536 if jax.default_backend() == "cpu" else 8192
    x = jnp.asarray(np.random.default_rng(0).random((size, size), np.float32), dtype)
    # A product of n x n matrices has n^3 multiplications and as many additions.
    return 2 * size**3 / _best_seconds(lambda: _product(x, x))


def read_bandwidth() -> float:
    """Measure the bytes/s at which one JAX device reads a matrix of 512 MiB; the best run."""
    # A product with a vector reads each number of the matrix once, and computes next to nothing.
    matrix = jnp.ones((2048, 65536), jnp.float32)
    vector = jnp.ones(65536, jnp.float32)
    return matrix.nbytes / _best_seconds(lambda: _product(matrix, vector))


@jax.jit
def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return x @ y


def _best_seconds(run: Callable[[], jax.Array]) -> float:
    """Return the shortest time of at least 3 runs, after one to warm up."""
    # Other programs only make a run slower, so the shortest time is the nearest to the limit.
    jax.block_until_ready(run())
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
