"""Times that ceilings allow, of round numbers."""

import pytest

from experiments.aot import roofline
from experiments.aot.roofline import Time, Work
from gqa.aot.chips import CHIPS, Target


def test_memory_and_arithmetic_overlap_and_the_network_is_waited_for():
    assert Time(3.0, 2.0, 1.0).seconds == 4.0
    assert Time(2.0, 3.0, 1.0).seconds == 4.0
    assert Time(3.0, 2.0, 1.0).bound == "memory"
    assert Time(2.0, 3.0, 1.0).bound == "compute"
    assert Time(1.0, 2.0, 3.0).bound == "network"


def test_prefill_is_shared_by_its_rows_and_every_chip_counts():
    # 6 s for 3 rows, then 10 tokens of 0.5 s for 5 rows: 2 s + 1 s on each of 4 chips.
    assert roofline.sample_seconds(6.0, 3, 0.5, 10, 5, 4) == 12.0


def test_every_ceiling_is_scaled_by_the_efficiency():
    target = Target("a slice", "v6e", (2, 4))  # one link along the axis of 2, two along that of 4
    chip = CHIPS["v6e"]
    work = Work(chip.bandwidth, 2 * chip.peak, 3 * 4 * chip.link)
    assert roofline.time(work, target, 1.0) == pytest.approx((1.0, 2.0, 4.0))
    assert roofline.time(work, target, 0.5) == pytest.approx((2.0, 4.0, 8.0))
