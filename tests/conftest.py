"""Settings and the small network that the tests share."""

import ctypes
import functools
import gc
import importlib.metadata
import os
from pathlib import Path

# Compiling the tests' small programs takes longer than running them. So LLVM skips its passes, no
# program is cut into parts that are compiled in parallel, and XLA writes code by its older way,
# which newer versions no longer have. A training step then compiles in a quarter of the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else "",
    ]
)

import jax
import jaxtyping
import numpy as np
import pytest

# Check the annotated shapes and types of these modules on every call, which under `jax.jit` means
# once per trace. The hook acts on imports, so it is installed before the modules are imported.
SHAPE_CHECKED = [
    "gqa.model.attention",
    "gqa.model.cpu_attention",
    "gqa.model.fused_attention",
    "gqa.model.layers",
    "gqa.model.linear",
    "gqa.inference",
    "gqa.training.loss",
    "gqa.kv_cache",
    "gqa.conversion.attended",
    "gqa.conversion.calibration",
    "gqa.conversion.closed_form",
]
jaxtyping.install_import_hook(SHAPE_CHECKED, "beartype.beartype")

from gqa.model.config import Config  # noqa: E402
from gqa.model.transformer import Transformer  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# By default accelerators round float32 products to fewer bits; the tests compare to 1e-5.
jax.config.update("jax_default_matmul_precision", "float32")


def pytest_configure(config):
    """Cache compiled programs on disk, because many tests run the same small networks."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")  # jax does not write atomically
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir(f"compiled-{worker}")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items):
    """Mark the tests that tests/slow.txt lists, which `make test` leaves out, and run them first.

    A process takes whole files. If the long ones came last, all but one process would wait.
    """
    lines = (Path(__file__).parent / "slow.txt").read_text().splitlines()
    slow = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        test = item.nodeid.split("[")[0]
        if {test, test.split("::")[0]} & slow:
            item.add_marker(pytest.mark.slow)

    long_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long_files)


# Resident memory of a process of the tests, in bytes, beyond which it lets go of its programs.
MUCH_MEMORY = 3 * 2**29


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Behind a file of tests, let go of compiled programs if the process has become large.

    JAX keeps every program. Those of one file take up to 450 MB, and no other file runs them. glibc
    gives the memory back to the system only when it is asked to.
    """
    yield
    statm = Path("/proc/self/statm")  # of Linux alone, as is `malloc_trim`
    if not statm.exists():
        return
    resident_pages = int(statm.read_text().split()[1])
    if resident_pages * os.sysconf("SC_PAGE_SIZE") > MUCH_MEMORY:
        jax.clear_caches()
        gc.collect()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """Let XLA compute calls meant for cuDNN; a list with the implementation of each call."""
    xla, implementations = jax.nn.dot_product_attention, []

    def by_xla(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        implementations.append(implementation)
        return xla(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return implementations


@pytest.fixture
def tiny() -> Config:
    """A T5 1.1 config with 4 heads; tests derive other configs with `dataclasses.replace`."""
    return Config(
        vocab_size=32,
        d_model=16,
        d_ff=24,
        num_heads=4,
        head_dim=8,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_kv_heads_encoder=4,
        num_kv_heads_self_attention=4,
        num_kv_heads_cross_attention=4,
    )


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    """Tokens of two padded examples: inputs of 9 and 6 tokens, targets of 7 and 4 tokens."""
    rng = np.random.default_rng(0)
    tokens = {
        "inputs": rng.integers(1, 32, (2, 10), dtype=np.int32),
        "targets": rng.integers(1, 32, (2, 7), dtype=np.int32),
    }
    tokens["inputs"][0, 9:] = tokens["inputs"][1, 6:] = tokens["targets"][1, 4:] = 0
    return tokens


@pytest.fixture(scope="session")
def random_params():
    """A function from a config to random parameters, drawn in NumPy to spare a compilation."""

    @functools.cache
    def draw(config: Config) -> dict:
        rng = np.random.default_rng(0)
        tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
        batch = {"inputs": tokens, "targets": tokens}
        shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), batch)["params"]
        return jax.tree.map(
            lambda leaf: jax.numpy.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes
        )

    return draw
