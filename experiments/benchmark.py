"""Time the networks' inference in turn: prefill, each token, and the KV cache they need."""

from pathlib import Path

import numpy as np

from experiments.stage import Job, Outcome, open_parent, record
from gqa import timing
from gqa.kv_cache import kv_cache_bytes
from gqa.model import count_params


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section benchmark. Every parent is timed, in turn, in one run."""
    del folder, job
    networks = [open_parent(path) for path in parents]
    configs = {str(i): network.config for i, network in enumerate(networks)}
    shape = {key: settings[key] for key in ("batch_size", "inputs_length", "targets_length")}
    times = timing.measure(configs, **shape, repetitions=settings["repetitions"])
    tokens = settings["targets_length"]
    records = []
    for i, network in enumerate(networks):
        measured = times[str(i)]
        cache = kv_cache_bytes(network.config, 1, settings["inputs_length"], tokens)
        sample = (measured.prefill + measured.decode) / settings["batch_size"]
        entries = [
            record("num_params", count_params(network.config), "parameters"),
            record("kv_cache_bytes", cache, "bytes per sequence"),
            _seconds("prefill_seconds", measured.prefill, "s per batch"),
            _seconds("token_seconds", measured.decode / tokens, "s per step of a batch"),
            _seconds("sample_seconds", sample, "s per sample"),
            *(record(key, value, "") for key, value in shape.items()),
        ]
        records += [entry | {"variant": network.info["variant"]} for entry in entries]
        print(
            f"{name}: {network.config.num_kv_heads_decoder} KV heads: "
            f"{1e3 * np.median(measured.decode) / tokens:.2f} ms a token, "
            f"prefill {1e3 * np.median(measured.prefill):.1f} ms, "
            f"KV cache {cache / 2**20:.2f} MiB a sequence"
        )
    return Outcome(records)


def _seconds(metric: str, seconds: np.ndarray, unit: str) -> dict:
    """The median, with the quartiles."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return record(metric, float(median), unit, low=float(low), high=float(high), n=len(seconds))
