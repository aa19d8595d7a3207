"""From measured times to records with quartiles: times, rates, shares of ceilings, ratios.

Networks are timed in turns, and each number is an array over the repetitions. Arithmetic on the
arrays pairs what the same repetition measured, so that a machine which is slow for a minute is slow
on both sides of a share or a ratio. The measuring itself is `gqa/evaluation/timing.py`.
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
    """Return the median of each number over its repetitions, with the quartiles."""
    made = []
    for metric, values in numbers.items():
        # A number that is computed and not timed, such as a size, counts as one repetition.
        values = np.atleast_1d(values)
        low, median, high = map(float, np.percentile(values, [25, 50, 75]))
        more = {"low": low, "high": high, "n": len(values), "variant": variant}
        made.append(record(metric, median, UNITS.get(metric, ""), **more))
    return made


def generation(parts: Numbers, batch_size: int, decoded: int) -> Numbers:
    """Return the times of generation: of the prefill and of the `decoded` tokens after it."""
    # A step decodes one token of every row, so it gives `batch_size` tokens.
    token = parts["decode"] / decoded
    numbers = {
        "prefill_seconds": parts["prefill"],
        "token_seconds": token,
        "sample_seconds": (parts["prefill"] + parts["decode"]) / batch_size,
        "tokens_per_second": batch_size / token,
    }
    return numbers | ({"encoder_seconds": parts["encoder"]} if "encoder" in parts else {})


def traffic(step: kv_cache.Step, times: Numbers, parts: Numbers, machine: Numbers) -> Numbers:
    """Return the bytes a decoding step moves, and its shares of the machine's ceilings.

    The floor is the time of reading the cache, and of the products with the weights at the slower
    of reading them and computing them.
    """
    bandwidth = machine["read_bandwidth"]
    token, attention = times["token_seconds"], parts["attention"]
    cache = step.self_cache + step.cross_cache
    products = np.maximum(step.weights / bandwidth, step.flops / machine["matmul_rate"])
    floor = cache / bandwidth + products
    return {
        "step_weight_bytes": np.asarray(step.weights),
        "step_self_cache_bytes": np.asarray(step.self_cache),
        "step_cross_cache_bytes": np.asarray(step.cross_cache),
        "step_bandwidth": (step.weights + cache) / token,
        "step_bandwidth_share": (step.weights + cache) / token / bandwidth,
        "floor_seconds": floor,
        "floor_share": floor / token,
        # Attention is timed over the inputs alone, so it reads the cache of cross-attention.
        "attention_seconds": attention,
        "attention_bandwidth": step.cross_cache / attention,
        "attention_bandwidth_share": step.cross_cache / attention / bandwidth,
    }


def training(parts: Numbers, target_tokens: int, flops: float, machine: Numbers) -> Numbers:
    """Return a training step's time, tokens per second, and share of the matrix-product rate."""
    seconds = parts["step_seconds"]
    return {
        "step_seconds": seconds,
        "target_tokens_per_second": target_tokens / seconds,
        "mfu": flops / seconds / machine["matmul_rate"],
    }


def ratios(times: Numbers, other: Numbers, name: str) -> Numbers:
    """Return each of `times` divided by that of the network `other`, as e.g. `token_ratio_mha`."""
    quotients = {
        f"{metric.removesuffix('_seconds')}_ratio_{name}": times[metric] / other[metric]
        for metric in ("prefill_seconds", "token_seconds", "sample_seconds", "step_seconds")
        if metric in times and metric in other
    }
    if "encoder_seconds" in other:
        encoder_seconds = other["encoder_seconds"]
        quotients[f"prefill_ratio_{name}_encoder"] = times["prefill_seconds"] / encoder_seconds
    return quotients
