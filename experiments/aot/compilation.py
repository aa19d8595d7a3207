"""Compile a network's programs for a slice that this machine lacks, without weights or devices.

XLA's own compilers run on any machine: libtpu contains the compiler for TPUs, JAX's CUDA plugin the
compiler for GPUs. The result is the program that would run there, with its memory, layouts and
communication. `experiments/aot/analysis.py` chooses what is compiled and counts what it costs.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa.aot import chips
from gqa.aot.chips import Target
from gqa.data import text_lines
from gqa.inference.step import Inference, Memory
from gqa.kv_cache import weight_shapes
from gqa.model.config import Config
from gqa.runtime import atomic_files, regular_files, sharding
from gqa.runtime.errors import UserError
from gqa.runtime.mesh import Layout, make_mesh
from gqa.training import optimizer, training_step

# Without these variables libtpu looks for the TPU machine that it runs on.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise only one process at a time may load libtpu
}

# By platform: the package with the compiler, and the arguments of pip that install it.
COMPILERS = {
    "tpu": ("libtpu", "-r requirements-aot.txt"),
    "gpu": ("jax_cuda12_plugin", f'"jax[cuda12]=={jax.__version__}"'),
}

# The properties that XLA asks a GPU for, as an H100 answers. A GPU that is not there cannot answer.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  device_memory_size: 84978434048 memory_bandwidth: 3352320000000
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
"""
TOO_LARGE = "RESOURCE_EXHAUSTED"  # how XLA's error begins if a program does not fit in memory


class Compiled(NamedTuple):
    """A program for one device: bytes of memory by use, its text, and seconds of compilation.

    If the program does not fit in memory, only `failure` (XLA's reason) and `seconds` are set.
    """

    arguments: int = 0
    temporary: int = 0
    outputs: int = 0
    aliased: int = 0
    code: int = 0
    seconds: float = 0.0
    failure: str = ""
    text: str = ""

    @property
    def peak(self) -> int:
        """Bytes in use at once; a result that reuses an argument's memory needs none of its own."""
        return self.arguments + self.temporary + self.outputs - self.aliased + self.code


def start(targets: Iterable[Target]) -> None:
    """Prepare JAX to compile for `targets`, before anything else asks JAX for its devices.

    Raises:
        UserError: if a compiler is missing, with the command that installs it.
    """
    for target in targets:
        package, install = COMPILERS[target.platform]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--stage=aot needs XLA's compiler for {target.name}; pip install {install}, best "
                "into an environment of its own"
            )

    for name, value in ALONE.items():
        os.environ.setdefault(name, value)

    # The compilers need no device, so JAX should not look for one.
    jax.config.update("jax_platforms", "cpu")


def devices(target: Target) -> list[Any]:
    """Return descriptions of a slice's devices, one per chip, for JAX to compile for."""
    if target.platform == "gpu":
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.kind,
            topology=f"1x1x{target.chips}",
            target_config=H100,
        ).devices

    # The two cores of a chip count as one device where JAX shows them so ("megacore").
    shape = "x".join(map(str, target.shape))
    megacore = chips.CORES[target.kind] == 2
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{target.kind}:{shape}",
        chip_config_name="megacore" if megacore else "default",
        chips_per_host_bounds=(2, 2, 1),
    )
    return topology.devices


class Compiler:
    """Compile for one slice and layout, and keep compiled programs in `folder` for later calls."""

    def __init__(self, target: Target, layout: Layout, folder: Path):
        self.target, self.layout, self.folder = target, layout, folder
        self.mesh: Mesh = make_mesh(layout, devices=devices(target))

    def step(self, net: Inference, batch_size: int, S: int, T: int) -> Compiled:
        """Compile one step of generation: one token of each of `batch_size` sequences.

        The inputs have S tokens; the self-attention cache holds T and is updated in place. The
        weights that only prefill reads are arguments too, because they stay in memory.
        """
        caches = sharding.cache_sharding(net.config, self.mesh, net.layout, net.fused)
        rows = sharding.batch_sharding(self.mesh)
        weights = self._weights(net)

        # Shapes of the caches, which prefill and init_cache would return, with their shardings.
        inputs = jax.ShapeDtypeStruct((batch_size, S), jnp.int32)
        memory = jax.eval_shape(net.prefill, weights, inputs)
        cache = jax.eval_shape(lambda: net.init_cache(batch_size, 1, T))
        cache = _with_shardings(cache, caches.self_attention)
        mask = memory.mask.update(sharding=caches.mask)
        memory = Memory(_with_shardings(memory.kv, caches.cross_attention), mask)

        # The tokens and their position. The caches that go out lie as those that came in, and are
        # donated, so that XLA updates them in place.
        tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32, sharding=rows)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        index = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        out = (None, jax.tree.map(lambda x: x.sharding, cache))
        step = jax.jit(net.step, donate_argnums=3, keep_unused=True, out_shardings=out)
        return self._compile(step, weights, tokens, index, cache, memory)

    def prefill(self, net: Inference, batch_size: int, S: int) -> Compiled:
        """Compile prefill: the encoder and every layer's cross-attention keys and values."""
        caches = sharding.cache_sharding(net.config, self.mesh, net.layout, net.fused)
        rows = sharding.batch_sharding(self.mesh)
        inputs = jax.ShapeDtypeStruct((batch_size, S), jnp.int32, sharding=rows)
        placements: Any = Memory(caches.cross_attention, caches.mask)  # type: ignore[arg-type]  # of shardings
        prefill = jax.jit(net.prefill, out_shardings=placements)
        return self._compile(prefill, self._weights(net), inputs)

    def train(
        self, config: Config, batch_size: int, S: int, T: int, num_microbatches: int
    ) -> Compiled:
        """Compile one step of pretraining, which updates the state in place."""
        state = training_step.abstract(config, self.mesh, self.layout)
        rows = sharding.batch_sharding(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=rows)
            for name, length in (("inputs", S), ("targets", T))
        }

        # The weight of z_loss and the warm-up are the defaults of pretraining. They are constants
        # of the program, so other positive numbers would cost as much.
        step = training_step.make_step(
            training_step.make_loss(config, z_loss=1e-4),
            optimizer.rsqrt(10_000),
            0,
            num_microbatches,
            placed=training_step.shardings(state),
        )
        return self._compile(step, state, batch)

    def _weights(self, net: Inference) -> dict:
        weights = weight_shapes(net)
        shardings = sharding.param_shardings(weights, self.mesh, net.layout)
        return jax.tree.map(lambda x, at: x.update(sharding=at), weights, shardings)

    def _compile(self, function: Any, *arguments: Any) -> Compiled:
        """Compile a jitted function for arguments given as shapes, or read an earlier result."""
        with jax.set_mesh(self.mesh):
            lowered = function.lower(*arguments)

            # Compiling takes minutes, so its result is kept under a hash of all that it depends on.
            versions = f"{jax.__version__} {self.target} {self.mesh.shape}"
            key = hashlib.sha256(f"{versions} {lowered.as_text()}".encode()).hexdigest()[:20]
            numbers, text = self.folder / f"{key}.json", self.folder / f"{key}.hlo.gz"
            earlier = kept(numbers, text)
            if earlier is not None:
                return earlier
            compiled = _compile(lowered)

        self.folder.mkdir(parents=True, exist_ok=True)
        keep(compiled, numbers, text)
        return compiled


def keep(compiled: Compiled, numbers: Path, text: Path) -> None:
    """Write a program: its text to a compressed file, and all else as JSON."""
    atomic_files.write(text, gzip.compress(compiled.text.encode(), mtime=0))
    fields = {name: value for name, value in compiled._asdict().items() if name != "text"}
    atomic_files.write(numbers, json.dumps(fields))


def kept(numbers: Path, text: Path) -> Compiled | None:
    """Read a program that `keep` wrote; None if there is none, or its files are damaged."""
    if not numbers.exists() or not text.exists():
        return None
    try:
        fields = regular_files.read_json(numbers)
        program = b"".join(text_lines.chunks(str(text))).decode()
    except (UserError, UnicodeDecodeError):
        return None

    # Each default has the type of its field.
    types = {name: type(value) for name, value in Compiled()._asdict().items() if name != "text"}
    if {name: type(value) for name, value in fields.items()} != types:
        return None
    return Compiled(**fields, text=program)


def _with_shardings(layers: list[Any], shardings: list[Any]) -> list[Any]:
    """Return the shapes of all layers' keys and values, each with its layer's sharding."""
    return [
        tuple(x.update(sharding=at) for x in kv) for kv, at in zip(layers, shardings, strict=True)
    ]


def _compile(lowered: jax.stages.Lowered) -> Compiled:
    """Run XLA's compiler; a program that does not fit in memory is a result, not an error."""
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if TOO_LARGE not in str(error):
            raise
        # The TPU compiler's error says "Used 40G of 30G hbm" among other lines.
        used = re.search(r"Used \S+ of \S+ \w+", str(error))
        seconds = time.perf_counter() - begin
        return Compiled(seconds=seconds, failure=used[0] if used else str(error).splitlines()[0])

    memory: Any = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        time.perf_counter() - begin,
        text=compiled.as_text() or "",
    )
