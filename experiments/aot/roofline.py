"""Estimate times from a slice's ceilings: the slower of memory and arithmetic, plus the network.

No constant is fitted. The only assumption is `efficiency`, the share of every ceiling that programs
reach. The ceilings are in `gqa/aot/chips.py`; `gqa/aot/costs.py` counts the work.
"""

from typing import NamedTuple

from gqa.aot.chips import Target


class Work(NamedTuple):
    """The work of one device: bytes of HBM accessed, model FLOPs, bytes sent to other devices."""

    nbytes: float
    flops: float
    sent: float


class Time(NamedTuple):
    """Seconds that one run of a program needs for memory, for arithmetic and for the network."""

    memory: float
    compute: float
    network: float

    @property
    def seconds(self) -> float:
        """Seconds in all: memory and arithmetic overlap, the network overlaps with neither."""
        return max(self.memory, self.compute) + self.network

    @property
    def bound(self) -> str:
        """The name of the longest part, which bounds the program."""
        return max(self._fields, key=lambda name: getattr(self, name))


def time(work: Work, target: Target, efficiency: float) -> Time:
    """Return how long `work` takes one device at a share `efficiency` of its ceilings."""
    chip = target.chip
    return Time(
        work.nbytes / (chip.bandwidth * efficiency),
        work.flops / (chip.peak * efficiency),
        work.sent / (chip.link * target.links * efficiency),
    )


def sample_seconds(
    prefill: float, rows: int, step: float, tokens: int, batch_size: int, chips: int
) -> float:
    """Return chip-seconds per sample, the unit of the paper's times.

    Args:
        prefill: seconds of the prefill of `rows` inputs at once.
        rows: inputs of a prefill.
        step: seconds of one token of all `batch_size` sequences.
        tokens: tokens of a sample.
        batch_size: sequences that are decoded together.
        chips: chips of the slice, all of which are busy.
    """
    return chips * (prefill / rows + tokens * step / batch_size)
