"""Estimate times from a slice's ceilings: the slower of memory and arithmetic, plus the network.

No constant is fitted. `efficiency` is the share of every ceiling that programs are assumed to
reach; the ceilings are in `gqa/aot/chips.py`.
"""

from typing import NamedTuple

from gqa.aot.chips import Target


class Work(NamedTuple):
    """What one device does: bytes of HBM moved, FLOPs of products, bytes sent to other devices."""

    nbytes: float
    flops: float
    sent: float


class Time(NamedTuple):
    """Seconds of a program's parts, and what bounds it."""

    memory: float
    compute: float
    network: float

    @property
    def seconds(self) -> float:
        """Memory and arithmetic overlap; the network is assumed to overlap with neither."""
        return max(self.memory, self.compute) + self.network

    @property
    def bound(self) -> str:
        """The longest part's name."""
        return max(self._fields, key=lambda name: getattr(self, name))


def time(work: Work, target: Target, efficiency: float) -> Time:
    """Return how long `work` takes one device of `target`."""
    chip = target.chip
    return Time(
        work.nbytes / (chip.bandwidth * efficiency),
        work.flops / (chip.peak * efficiency),
        work.sent / (chip.link * target.links * efficiency),
    )


def sample_seconds(
    prefill: float, rows: int, step: float, tokens: int, batch_size: int, chips: int
) -> float:
    """Return chip-seconds per sample, as the paper: prefill of `rows` at once, then every token."""
    return chips * (prefill / rows + tokens * step / batch_size)
