"""What turns measured -> numbers with quartiles: times, rates, shares of ceilings, ratios.

A turn's numbers are arrays over repetitions; arithmetic on them pairs what the same repetition
measured, so a machine that is slow for a minute is slow on both sides of a share or a ratio.
"""

import numpy as np

from experiments.stages.folder import record
from gqa import kv_cache

Numbers = dict[str, np.ndarray]

UNITS = {
    "prefill_seconds": "s per batch",
    "encoder_seconds": "s per batch",
    "token_seconds": "s per step of a batch",
    "sample_seconds": "s per sample",
    "attention_seconds": "s per step of a batch",
    "floor_seconds": "s per step of a batch",
    "step_seconds": "s per training step",
    "tokens_per_second": "tokens/s",
    "target_tokens_per_second": "tokens/s",
    "kv_cache_bytes": "bytes",
    "step_weight_bytes": "bytes",
    "step_self_cache_bytes": "bytes",
    "step_cross_cache_bytes": "bytes",
    "read_bandwidth": "bytes/s",
    "step_bandwidth": "bytes/s",
    "attention_bandwidth": "bytes/s",
    "matmul_rate": "FLOP/s",
}


def records(numbers: Numbers, variant: dict) -> list[dict]:
    """Each number's median over its repetitions, and its quartiles; ratios have no unit."""
    made = []
    for metric, values in numbers.items():
        values = np.atleast_1d(values)
        low, median, high = map(float, np.percentile(values, [25, 50, 75]))
        more = {"low": low, "high": high, "n": len(values), "variant": variant}
        made.append(record(metric, median, UNITS.get(metric, ""), **more))
    return made


def generation(parts: Numbers, batch_size: int, decoded: int) -> Numbers:
    """Times of the parts that a turn measured: prefill and the `decoded` tokens after it."""
    token = parts["decode"] / decoded
    numbers = {
        "prefill_seconds": parts["prefill"],
        "token_seconds": token,
        "sample_seconds": (parts["prefill"] + parts["decode"]) / batch_size,
        "tokens_per_second": batch_size / token,
    }
    return numbers | ({"encoder_seconds": parts["encoder"]} if "encoder" in parts else {})


def traffic(step: kv_cache.Step, times: Numbers, parts: Numbers, machine: Numbers) -> Numbers:
    """What a step moves, and what shares of the machine's ceilings that makes.

    The floor is the time of reading the cache, and of the products with the weights at the slower
    of reading them and computing them.
    """
    bandwidth = machine["read_bandwidth"]
    token, attention = times["token_seconds"], parts["attention"]
    cache = step.self_cache + step.cross_cache
    products = np.maximum(step.weights / bandwidth, step.flops / machine["matmul_rate"])
    floor = cache / bandwidth + products
    return {
        "step_weight_bytes": step.weights,
        "step_self_cache_bytes": step.self_cache,
        "step_cross_cache_bytes": step.cross_cache,
        "step_bandwidth": (step.weights + cache) / token,
        "step_bandwidth_share": (step.weights + cache) / token / bandwidth,
        "floor_seconds": floor,
        "floor_share": floor / token,
        "attention_seconds": attention,
        "attention_bandwidth": step.cross_cache / attention,
        "attention_bandwidth_share": step.cross_cache / attention / bandwidth,
    }


def training(parts: Numbers, target_tokens: int, flops: float, machine: Numbers) -> Numbers:
    """A step's time, the target tokens in it, and its model FLOPs against those of a product."""
    seconds = parts["step_seconds"]
    return {
        "step_seconds": seconds,
        "target_tokens_per_second": target_tokens / seconds,
        "mfu": flops / seconds / machine["matmul_rate"],
    }


def ratios(own: Numbers, other: Numbers, name: str) -> Numbers:
    """Every time over that of the other, as e.g. `token_ratio_mha`."""
    found = {
        f"{metric.removesuffix('_seconds')}_ratio_{name}": own[metric] / other[metric]
        for metric in ("prefill_seconds", "token_seconds", "sample_seconds", "step_seconds")
        if metric in own and metric in other
    }
    if "encoder_seconds" in other:
        found[f"prefill_ratio_{name}_encoder"] = own["prefill_seconds"] / other["encoder_seconds"]
    return found
