"""Accelerators as their makers describe them, and slices of them as XLA's compilers know them.

Names of slices are those of Google Cloud, which counts TensorCores for v4 and v5p and chips for
v5e and v6e: v4-16 is 8 chips, v6e-8 is 8 chips. The two cores of a v4 or v5p chip are one device
("megacore"), as they are to JAX on such a machine. h100-8 is 8 GPUs of one machine, each joined to
all others by its switch.
"""

import math
from typing import NamedTuple

from gqa.runtime.errors import UserError


class Chip(NamedTuple):
    """One chip: bytes, bytes/s, bfloat16 FLOP/s, and bytes/s of one link in one direction."""

    hbm: int
    bandwidth: float
    peak: float
    link: float
    source: str


CLOUD = "cloud.google.com/tpu/docs"
# A link's rate is that of all links of a chip, which the sources give, over their number: 6 on v4
# and v5p, 4 on v5e and v6e; for v5e, v5p and v6e the source counts both directions.
CHIPS = {
    "v4": Chip(
        32 * 2**30,
        1200e9,
        275e12,
        50e9,
        f"{CLOUD}/v4; links: Jouppi et al., 2023, arXiv:2304.01433",
    ),
    "v5e": Chip(16 * 2**30, 819e9, 197e12, 50e9, f"{CLOUD}/v5e: 400 GB/s over 4 links"),
    "v5p": Chip(95 * 2**30, 2765e9, 459e12, 50e9, f"{CLOUD}/v5p: 4800 Gbit/s over 6 links"),
    "v6e": Chip(32 * 2**30, 1638e9, 918e12, 100e9, f"{CLOUD}/v6e: 800 GB/s over 4 links"),
    "h100": Chip(
        84_978_434_048,
        3352e9,
        989.5e12,
        450e9,
        "NVIDIA's data sheet of the H100 SXM: NVLink 900 GB/s in both directions",
    ),
}
# Shapes of slices by chips: 3-D for v4 and v5p, 2-D for v5e and v6e.
SHAPES = {
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    2: ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
}
CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
GPUS = (1, 2, 4, 8)  # of a machine


class Target(NamedTuple):
    """A slice to compile for: its name, kind of chip, and chips along each axis of the torus."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What one chip can do."""
        return CHIPS[self.kind]

    @property
    def platform(self) -> str:
        """Of its devices, as JAX names it."""
        return "tpu" if self.kind in CORES else "gpu"

    @property
    def backend(self) -> str:
        """What fuses attention there, of `gqa.kernels`."""
        return {"tpu": "tpu", "gpu": "cudnn"}[self.platform]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def links(self) -> int:
        """Links of a chip that lead to others of the slice; an axis of 2 has one, a longer two."""
        if self.platform == "gpu":
            return 1  # all of NVLink, to whichever other
        return max(1, sum(min(size - 1, 2) for size in self.shape))


def targets() -> dict[str, Target]:
    """Every slice there is a name for."""
    named: dict[str, Target] = {}
    for kind, cores in CORES.items():
        for shape in SHAPES[1 + cores]:
            name = f"{kind}-{cores * math.prod(shape)}"
            named[name] = Target(name, kind, shape)
    return named | {f"h100-{n}": Target(f"h100-{n}", "h100", (n,)) for n in GPUS}


def find(name: str, key: str) -> Target:
    """The slice of a name; `key` is what a mistake is reported under."""
    known = targets()
    if name not in known:
        raise UserError(f"{key}={name!r}; use one of {', '.join(known)}")
    return known[name]
