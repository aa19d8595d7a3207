"""Time the networks' inference in turn: prefill, each token, the KV cache, what a step reads."""

from pathlib import Path

from experiments.stages import timings
from experiments.stages.folder import Outcome, StageFolder, record
from experiments.stages.inputs import Job, open_parent
from experiments.stages.settings import BenchmarkSettings
from experiments.stages.typed_json import to_json
from gqa import kv_cache
from gqa.evaluation import timing
from gqa.inference.step import Inference
from gqa.model.config import Config
from gqa.model.transformer import count_params


def run(
    label: str, settings: BenchmarkSettings, folder: StageFolder, parents: list[Path], job: Job
) -> Outcome:
    """Time `settings.networks` in turns, with random weights.

    The first network is the multi-head reference. Each record of another network carries the time
    and the size of the reference beside its own time, because a machine may be faster or slower by
    the time that another stage measures the reference again.
    """
    del folder  # timings leave nothing but records
    trace_folder = job.events if job.setup.profile_benchmark else None
    shape = {
        "batch_size": settings.batch_size,
        "inputs_length": settings.inputs_length,
        "targets_length": settings.targets_length,
    }

    # A budget of KV heads per layer is spread by the conversion, so only the parent's checkpoint
    # knows the numbers. Every other network is in the settings, and needs no checkpoint.
    networks = [
        (to_json(network.variant), network.model or open_parent(parents[0]).config)
        for network in settings.networks
    ]

    configs = {i: config for i, (_, config) in enumerate(networks)}
    measured = timing.measure(
        configs, **shape, repetitions=settings.repetitions, trace_folder=trace_folder
    )

    records: list[dict] = []
    reference: dict[str, float] = {}
    for i, (variant, config) in enumerate(networks):
        times = timings.generation(
            measured[i], settings.batch_size, decoded=settings.targets_length
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
        print(f"{label}: {_line(config, [*sizes, *timed])}")
    return Outcome(records)


def _sizes(config: Config, batch_size: int, inputs_length: int, targets_length: int) -> list[dict]:
    """Return the numbers of a network and a shape that need no timing."""
    net = Inference(config)
    # The cache grows with the batch, so its size is given for one sequence (a batch of 1). The
    # weights are read once a step, however many sequences share it.
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
    values = {entry["metric"]: entry["value"] for entry in entries}
    token = values["token_seconds"]
    # A decoding step reads all weights and the whole cache, so bytes / seconds is the bandwidth
    # that it reaches. The machine's own bandwidth is the limit.
    read = values["step_weight_bytes"] + values["step_cache_bytes"]
    return (
        f"{_heads(config)} KV heads: {1e3 * token:.2f} ms a token "
        f"({read / 2**20:.1f} MiB at {read / token / 1e9:.1f} GB/s), "
        f"prefill {1e3 * values['prefill_seconds']:.1f} ms, "
        f"KV cache {values['kv_cache_bytes'] / 2**20:.2f} MiB a sequence"
    )


def _heads(config: Config) -> str:
    # With a budget per layer there is a number for each layer: 8/4/1.
    heads = config.num_kv_heads_self_attention
    return "/".join(map(str, heads)) if isinstance(heads, tuple) else str(heads)
