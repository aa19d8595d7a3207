"""What turns measured becomes rates, shares and ratios, of round numbers."""

import numpy as np
import pytest

from experiments.stages import timings
from gqa import kv_cache


def test_a_number_is_the_median_of_its_repetitions_with_quartiles():
    (found,) = timings.records({"token_seconds": np.array([9.0, 1.0, 2.0, 3.0, 4.0])}, {"seed": 0})
    assert (found["low"], found["value"], found["high"], found["n"]) == (2.0, 3.0, 9.0 - 5.0, 5)
    assert (found["metric"], found["unit"]) == ("token_seconds", "s per step of a batch")


def test_a_sample_takes_its_share_of_prefill_and_all_tokens():
    parts = {"prefill": np.array([2.0]), "decode": np.array([6.0]), "encoder": np.array([1.0])}
    assert timings.generation(parts, batch_size=4, decoded=3) == {
        "prefill_seconds": 2.0,
        "token_seconds": 2.0,
        "sample_seconds": 2.0,
        "tokens_per_second": 2.0,
        "encoder_seconds": 1.0,
    }


@pytest.mark.parametrize(("rate", "products"), [(10.0, 4.0), (1.0, 20.0)])
def test_the_floor_is_the_cache_and_the_slower_of_reading_and_computing(rate, products):
    """Weights of 40 bytes take 4 s to read; their 20 FLOPs 2 s or 20 s to compute."""
    step = kv_cache.Step(weights=40, cross_cache=10, self_cache=20.0, flops=20.0)
    times = {"token_seconds": np.array([50.0])}
    machine = {"read_bandwidth": np.array([10.0]), "matmul_rate": np.array([rate])}
    found = timings.traffic(step, times, {"attention": np.array([2.0])}, machine)
    assert found["floor_seconds"] == products + 3.0
    assert found["floor_share"] == pytest.approx((products + 3.0) / 50)
    assert found["step_bandwidth"] == pytest.approx(70 / 50)
    assert found["step_bandwidth_share"] == pytest.approx(7 / 50)
    assert found["attention_bandwidth"] == 5.0
    assert found["attention_bandwidth_share"] == 0.5


def test_training_is_compared_with_the_rate_of_products():
    found = timings.training({"step_seconds": 2.0}, 100, 60.0, {"matmul_rate": 40.0})
    assert found == {"step_seconds": 2.0, "target_tokens_per_second": 50.0, "mfu": 0.75}


def test_a_ratio_is_above_one_for_the_slower_network():
    own = {"token_seconds": 3.0, "prefill_seconds": 8.0, "tokens_per_second": 9.0}
    other = {"token_seconds": 2.0, "prefill_seconds": 4.0, "encoder_seconds": 2.0}
    assert timings.ratios(own, other, "mha") == {
        "token_ratio_mha": 1.5,
        "prefill_ratio_mha": 2.0,
        "prefill_ratio_mha_encoder": 4.0,
    }
