"""Describe accelerators by their data sheets, and the slices of them that XLA can compile for.

Slices have Google Cloud's names. Cloud counts TensorCores for v4 and v5p, of which a chip has two,
and chips for v5e and v6e: v4-16 is 8 chips, v6e-8 is 8 chips. JAX shows the two cores of a v4 or
v5p chip as one device ("megacore"). h100-8 is 8 GPUs of one machine, which a switch joins.

How fast this machine is belongs in `gqa/runtime/hardware.py`; what a compiled program costs is
counted in `gqa/aot/costs.py`.
"""

import math
from typing import NamedTuple

from gqa.runtime import hardware
from gqa.runtime.errors import ConfigError


class Chip(NamedTuple):
    """One chip: JAX's name of it, bytes, bytes/s, and bytes/s of one link in one direction."""

    device_kind: str
    hbm: int
    bandwidth: float
    link: float
    source: str

    @property
    def peak(self) -> float:
        """FLOP/s of bfloat16 products, from the table that MFU is computed with."""
        bfloat16, _ = hardware.PEAKS[self.device_kind]
        return bfloat16 * 1e12


CLOUD = "cloud.google.com/tpu/docs"
# The sources give the rate of all links of a chip together. A link's rate is that rate over the
# number of links: 6 on v4 and v5p, 4 on v5e and v6e. For v5e, v5p and v6e the source counts both
# directions, so half of it is a link's rate in one direction.
CHIPS = {
    "v4": Chip(
        "TPU v4",
        32 * 2**30,
        1200e9,
        50e9,
        f"{CLOUD}/v4; links: Jouppi et al., 2023, arXiv:2304.01433",
    ),
    "v5e": Chip("TPU v5e", 16 * 2**30, 819e9, 50e9, f"{CLOUD}/v5e: 400 GB/s over 4 links"),
    "v5p": Chip("TPU v5p", 95 * 2**30, 2765e9, 50e9, f"{CLOUD}/v5p: 4800 Gbit/s over 6 links"),
    "v6e": Chip("TPU v6e", 32 * 2**30, 1638e9, 100e9, f"{CLOUD}/v6e: 800 GB/s over 4 links"),
    "h100": Chip(
        "NVIDIA H100",
        84_978_434_048,
        3352e9,
        450e9,
        "NVIDIA's data sheet of the H100 SXM: NVLink 900 GB/s in both directions",
    ),
}

# Chips along each axis of the slices that Cloud offers, by number of axes: v4 and v5p are joined
# in three dimensions, v5e and v6e in two.
SHAPES: dict[int, tuple[tuple[int, ...], ...]] = {
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    2: ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
}
CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}  # cores that Cloud counts, of one chip
GPUS = (1, 2, 4, 8)  # GPUs of a machine


class Target(NamedTuple):
    """A slice to compile for: its name, kind of chip, and chips along each axis of the torus."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The data sheet of one chip."""
        return CHIPS[self.kind]

    @property
    def platform(self) -> str:
        """JAX's name for the kind of device: "tpu" or "gpu"."""
        return "tpu" if self.kind in CORES else "gpu"

    @property
    def backend(self) -> str:
        """The kernels that fuse attention there, as `gqa.inference.step.Inference` names them."""
        return {"tpu": "tpu", "gpu": "cudnn"}[self.platform]

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def links(self) -> int:
        """Links of a chip that lead to others of the slice.

        An axis of 2 chips gives a chip one link, a longer axis two. A GPU counts as one link, its
        whole NVLink, because the switch sends all of NVLink's bandwidth to any other GPU.
        """
        if self.platform == "gpu":
            return 1
        return max(1, sum(min(size - 1, 2) for size in self.shape))


def targets() -> dict[str, Target]:
    """Return every slice by its name."""
    by_name: dict[str, Target] = {}
    for kind, cores in CORES.items():
        # Chips with two cores are those that are joined in three dimensions.
        for shape in SHAPES[1 + cores]:
            name = f"{kind}-{cores * math.prod(shape)}"
            by_name[name] = Target(name, kind, shape)
    return by_name | {f"h100-{n}": Target(f"h100-{n}", "h100", (n,)) for n in GPUS}


def find(name: str) -> Target:
    """Return the slice called `name`, such as "v4-16".

    Raises:
        ConfigError: naming the parameter `target`, if there is no such slice.
    """
    by_name = targets()
    if name not in by_name:
        raise ConfigError("target", name, f"use one of {', '.join(by_name)}")
    return by_name[name]
