"""Time the networks' inference in turn: prefill, each token, and the KV cache they need."""

from pathlib import Path

import numpy as np

from experiments.stage import Job, Outcome, open_parent, record
from gqa import timing
from gqa.kv_cache import kv_cache_bytes
from gqa.model import count_params


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section benchmark. Every parent is timed, in turn, in one run.

    The first is the multi-head one; the others' timings say what it took beside them.
    """
    del folder, job
    networks = [open_parent(path) for path in parents]
    configs = {str(i): network.config for i, network in enumerate(networks)}
    shape = {key: settings[key] for key in ("batch_size", "inputs_length", "targets_length")}
    measured = timing.measure(configs, **shape, repetitions=settings["repetitions"])
    tokens = settings["targets_length"]
    records, parent = [], {}
    for i, network in enumerate(networks):
        cache = kv_cache_bytes(network.config, 1, settings["inputs_length"], tokens)
        timings = _timings(measured[str(i)], settings["batch_size"], tokens)
        entries = [
            record("num_params", count_params(network.config), "parameters"),
            record("kv_cache_bytes", cache, "bytes per sequence"),
            *(record(key, value, "") for key, value in shape.items()),
            *(entry | parent.get(entry["metric"], {}) for entry in timings),
        ]
        if i == 0:
            parent = {entry["metric"]: {"parent_value": entry["value"]} for entry in timings}
        records += [entry | {"variant": network.info["variant"]} for entry in entries]
        prefill, token, _ = (1e3 * entry["value"] for entry in timings)
        print(
            f"{name}: {network.config.num_kv_heads_decoder} KV heads: {token:.2f} ms a token, "
            f"prefill {prefill:.1f} ms, KV cache {cache / 2**20:.2f} MiB a sequence"
        )
    return Outcome(records)


def _timings(times: timing.Times, batch_size: int, tokens: int) -> list[dict]:
    """Medians with quartiles."""
    samples = {
        ("prefill_seconds", "s per batch"): times.prefill,
        ("token_seconds", "s per step of a batch"): times.decode / tokens,
        ("sample_seconds", "s per sample"): (times.prefill + times.decode) / batch_size,
    }
    records = []
    for (metric, unit), seconds in samples.items():
        low, median, high = map(float, np.percentile(seconds, [25, 50, 75]))
        records.append(record(metric, median, unit, low=low, high=high, n=len(seconds)))
    return records
