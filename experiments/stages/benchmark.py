"""Time the networks' inference in turn: prefill, each token, the KV cache, what a step reads."""

from pathlib import Path

from experiments.stages import timings
from experiments.stages.stage import Job, Outcome, open_parent, record
from gqa import kv_cache
from gqa.evaluation import timing
from gqa.inference.step import Inference
from gqa.model.config import Config
from gqa.model.transformer import count_params


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: the config's section benchmark, and networks: (variant, model.Config as a dict).

    Without the latter, the network is that of the parent's checkpoint. All are timed in turn, with
    random weights. The first is the multi-head reference: the others' timings say what it took
    beside them, and of what size it is.
    """
    del folder, job
    shape = {key: settings[key] for key in ("batch_size", "inputs_length", "targets_length")}
    networks = [
        (variant, Config(**config) if config else open_parent(parents[0]).config)
        for variant, config in settings["networks"]
    ]
    configs = {i: config for i, (_, config) in enumerate(networks)}
    measured = timing.measure(configs, **shape, repetitions=settings["repetitions"])
    records, reference = [], {}
    for i, (variant, config) in enumerate(networks):
        times = timings.generation(
            measured[i], shape["batch_size"], decoded=shape["targets_length"]
        )
        timed = timings.records(times, variant)
        if i == 0:
            reference = {entry["metric"]: entry["value"] for entry in timed}
        else:
            size = networks[0][0]["size"]
            timed = [
                entry | {"parent_value": reference[entry["metric"]], "parent_size": size}
                for entry in timed
            ]
        sizes = _sizes(config, **shape)
        records += [*(entry | {"variant": variant} for entry in sizes), *timed]
        print(f"{name}: {_line(config, [*sizes, *timed])}")
    return Outcome(records)


def _sizes(config: Config, batch_size: int, inputs_length: int, targets_length: int) -> list[dict]:
    """What can be said of a network and a shape without timing it."""
    net = Inference(config)
    cache = kv_cache.kv_cache_bytes(config, 1, inputs_length, targets_length, net.cache_dtype)
    step = kv_cache.step(net, batch_size, inputs_length, targets_length)
    return [
        record("num_params", count_params(config), "parameters"),
        record("kv_cache_bytes", cache, "bytes per sequence"),
        record("step_weight_bytes", step.weights, "bytes per step of a batch"),
        record("step_cache_bytes", step.cross_cache + step.self_cache, "bytes per step of a batch"),
        record("batch_size", batch_size, ""),
        record("inputs_length", inputs_length, ""),
        record("targets_length", targets_length, ""),
    ]


def _line(config: Config, entries: list[dict]) -> str:
    of = {entry["metric"]: entry["value"] for entry in entries}
    token, read = of["token_seconds"], of["step_weight_bytes"] + of["step_cache_bytes"]
    return (
        f"{_heads(config)} KV heads: {1e3 * token:.2f} ms a token "
        f"({read / 2**20:.1f} MiB at {read / token / 1e9:.1f} GB/s), "
        f"prefill {1e3 * of['prefill_seconds']:.1f} ms, "
        f"KV cache {of['kv_cache_bytes'] / 2**20:.2f} MiB a sequence"
    )


def _heads(config: Config) -> str:
    own = config.num_kv_heads_self_attention
    return "/".join(map(str, own)) if isinstance(own, tuple) else str(own)
