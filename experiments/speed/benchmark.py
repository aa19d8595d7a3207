"""Time generation and training beside the machine's ceilings and beside other libraries.

Everything that is compared takes turns (`gqa.evaluation.timing.take_turns`), because a machine's
speed drifts. Every result is a median with quartiles over the turns.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments import pipeline
from experiments.graph.validate import check_numbers
from experiments.run.worker import RESULTS
from experiments.speed import peers, report
from experiments.speed.report import EQUAL, LARGEST, MACHINE, OURS
from experiments.stages import timings
from experiments.stages.network import network_config
from experiments.stages.timings import Numbers
from experiments.workdir import make_workdir
from gqa import kv_cache
from gqa.conversion import ATTENTIONS, convert
from gqa.evaluation import results, timing
from gqa.inference.decoding import GREEDY
from gqa.inference.generator import Generator
from gqa.inference.step import Inference
from gqa.model import flops
from gqa.model.config import Config, check_kv_heads
from gqa.model.transformer import init_params
from gqa.runtime import hardware
from gqa.runtime.errors import UserError
from gqa.training import loop, optimizer

KINDS = ("inference", "training", "report")
LEARNING_RATE = 1e-3


class Entry(NamedTuple):
    """One participant of the turns: a library or the machine, and the shape it runs."""

    system: str
    num_kv_heads: int = 0
    batch_size: int = 0


def check(config: ConfigDict) -> None:
    """Refuse, in one line and before any compute, what could not run."""
    check_numbers(config)
    for S in config.benchmark.inputs_lengths or ("",):
        if not isinstance(S, int) or S < 1:
            raise UserError(f"benchmark.inputs_lengths={S}; use lengths such as 1024,2048")
    if config.benchmark.targets_length < 2:
        raise UserError("benchmark.targets_length=1; use 2 or more")
    parent = _multi_head(config.model)
    for network in config.training.networks.values():
        _multi_head(network)
    for K in config.benchmark.kv_heads:
        check_kv_heads("benchmark.kv_heads", K, parent.num_heads)
    for S in config.benchmark.inputs_lengths:
        for net in _nets(config).values():
            _batch_sizes(config, net, S)


def run(config: ConfigDict, workdir: Path, kind: str | None, options: pipeline.Options) -> None:
    """Measure everything, or one part of it; print it and leave `speed.md` and its figure."""
    if options != pipeline.Options():
        raise UserError("--executor, --jobs and --dry-run go with the stages of the main job")
    path = workdir / RESULTS
    if kind != "report":
        make_workdir(workdir)
        others = _others()
        for part, measure in (("inference", _inference), ("training", _training)):
            if kind in (None, part):
                made = measure(config, others)
                common = {"run": config.name, "stage": part, "stage_key": None, "task": None}
                common |= results.provenance()
                results.append(path, [common | r for r in made])
    print(report.run(path, workdir, config.name))


def _others() -> list[str]:
    """Return the peers to time; print which are left out, and why."""
    if jax.default_backend() != "cpu":
        print("Other libraries are timed on CPUs only.", flush=True)
        return []
    for line in peers.missing():
        print(line, flush=True)
    return peers.installed()


def _multi_head(settings: ConfigDict) -> Config:
    heads = {f"num_kv_heads_{name}": settings.num_heads for name in ATTENTIONS}
    return network_config(settings, heads)


def _nets(config: ConfigDict) -> dict[int, Inference]:
    """Return the networks to time, by their KV heads in decoder self- and cross-attention."""
    parent, N = _multi_head(config.model), config.model.num_heads
    wanted = config.benchmark.kv_heads or [K for K in range(N, 0, -1) if N % K == 0]
    heads = ("num_kv_heads_self_attention", "num_kv_heads_cross_attention")
    return {K: Inference(dataclasses.replace(parent, **dict.fromkeys(heads, K))) for K in wanted}


def _batch_sizes(config: ConfigDict, net: Inference, S: int) -> dict[str, int]:
    """Return the batch size that all have and, if asked for, the largest that fits in memory."""
    settings = config.benchmark
    if not settings.memory_gib:
        return {EQUAL: settings.batch_size}
    weights = kv_cache.nbytes(kv_cache.weight_shapes(net))
    lengths = (S, settings.targets_length)
    sequence = kv_cache.kv_cache_bytes(net.config, 1, *lengths, net.cache_dtype)
    fit = int((settings.memory_gib * 2**30 - weights) // sequence)
    if fit < 1:
        raise UserError(
            f"benchmark.memory_gib={settings.memory_gib:g} holds no sequence beside the weights; "
            f"use {(weights + sequence) / 2**30:.3g} or more, or 0"
        )
    return {EQUAL: settings.batch_size, LARGEST: min(fit, settings.largest_batch_size)}


def _inference(config: ConfigDict, others: list[str]) -> list[dict]:
    params = init_params(_multi_head(config.model), 0)
    lengths = config.benchmark.inputs_lengths
    return [r for S in lengths for r in _generation(config, params, S, others)]


def _generation(config: ConfigDict, params: dict, S: int, others: list[str]) -> list[dict]:
    """Time every number of KV heads, and every peer, on inputs of S tokens."""
    parent, T = _multi_head(config.model), config.benchmark.targets_length
    nets = _nets(config)
    batches = {K: _batch_sizes(config, net, S) for K, net in nets.items()}
    most = max(size for sizes in batches.values() for size in sizes.values())
    inputs = timing.random_tokens(parent.vocab_size, most, S)
    equal = inputs[: config.benchmark.batch_size]

    turns = {Entry(MACHINE): partial(_ceilings, parent.dtype)}
    for K, net in nets.items():
        weights = net.prepare(convert(params, parent, K).params)
        for size in set(batches[K].values()):
            turn = timing.generation(net, weights, inputs[:size], T, rows=len(equal))
            turns[Entry(OURS, K, size)] = turn
    same = {}
    for name in others:
        peer = peers.build(name, params, parent, np.asarray(equal))
        entry = Entry(name, parent.num_heads, len(equal))
        turns[entry] = partial(_peer_turn, peer, T)
        same[entry] = _same_tokens(peer, params, parent, equal, T)
    print(f"input {S}: {len(turns)} take turns, {config.benchmark.repetitions} times", flush=True)
    measured = timing.take_turns(turns, config.benchmark.repetitions)
    numbers = _times(measured, T)
    for entry in same:
        numbers[entry]["same_tokens"] = same[entry]
    return _generation_records(config, nets, batches, S, measured, numbers)


def _ceilings(dtype: str) -> dict[str, float]:
    return {
        "read_bandwidth": hardware.read_bandwidth(),
        "matmul_rate": hardware.matmul_rate(dtype),
    }


def _peer_turn(peer: peers.Peer, length: int) -> dict[str, float]:
    """Return the parts that `timing.generation` returns; here the first token counts as prefill."""
    first, _ = timing.timed(partial(peer.generate, 1))
    whole, _ = timing.timed(partial(peer.generate, length))
    parts = {"prefill": first, "decode": whole - first}
    if peer.encode is not None:
        parts["encoder"], _ = timing.timed(peer.encode)
    return parts


def _same_tokens(peer: peers.Peer, params: dict, parent: Config, inputs: Array, T: int) -> float:
    """Return the share of our multi-head network's tokens that the peer chooses as well."""
    net = Inference(parent)
    ours = Generator(net, GREEDY, T, stop=False)(net.prepare(params), inputs)
    return float((ours == peer.generate(T)).mean())


def _times(measured: dict[Entry, Numbers], T: int) -> dict[Entry, Numbers]:
    return {
        entry: timings.generation(
            parts, entry.batch_size, decoded=T if entry.system == OURS else T - 1
        )
        for entry, parts in measured.items()
        if entry.system != MACHINE
    }


def _generation_records(
    config: ConfigDict,
    nets: dict[int, Inference],
    batches: dict[int, dict[str, int]],
    S: int,
    measured: dict[Entry, Numbers],
    times: dict[Entry, Numbers],
) -> list[dict]:
    """Return all records; ours include ratios to the machine's ceilings, MHA and the peers."""
    T, N, machine = config.benchmark.targets_length, config.model.num_heads, Entry(MACHINE)
    about = partial(_variant, config.size, N, S, T)
    records = timings.records(measured[machine], about(machine, EQUAL))
    others = [entry for entry in times if entry.system != OURS]
    for entry in others:
        records += timings.records(times[entry], about(entry, EQUAL))
    for K, net in nets.items():
        for batch, size in batches[K].items():
            entry = Entry(OURS, K, size)
            own, step = times[entry], kv_cache.step(net, size, S, T)
            numbers = own | timings.traffic(step, own, measured[entry], measured[machine])
            cache = kv_cache.kv_cache_bytes(net.config, size, S, T, net.cache_dtype)
            numbers["kv_cache_bytes"] = cache
            compared = {other.system: times[other] for other in others if batch == EQUAL}
            if N in nets:
                compared["mha"] = times[Entry(OURS, N, batches[N][batch])]
            for name, other in compared.items():
                numbers |= timings.ratios(own, other, name)
            records += timings.records(numbers, about(entry, batch))
    return records


def _variant(size: str, N: int, S: int, T: int, entry: Entry, batch: str) -> dict:
    """Return what a record says about the system it measured, and at which shape."""
    heads = {"num_kv_heads": entry.num_kv_heads, "num_kv_heads_cross_attention": entry.num_kv_heads}
    network = {"size": size, "num_heads": N, **heads, "num_kv_heads_encoder": N}
    shape = {"batch_size": entry.batch_size, "inputs_length": S, "targets_length": T}
    made = {"method": "none", "alpha": 0.0, "seed": 0}
    return network | made | shape | {"system": entry.system, "batch": batch}


def _training(config: ConfigDict, others: list[str]) -> list[dict]:
    """Time training steps of each network, ours and Hugging Face's, on the same batches."""
    settings, records = config.training, []
    B, S, T = settings.batch_size, settings.inputs_length, settings.targets_length
    for size, network in settings.networks.items():
        net = _multi_head(network)
        params = init_params(net, 0)
        batches = [
            {
                "inputs": timing.random_tokens(net.vocab_size, B, S, seed=2 * i),
                "targets": timing.random_tokens(net.vocab_size, B, T, seed=2 * i + 1),
            }
            for i in range(settings.steps)
        ]
        N, machine = net.num_heads, Entry(MACHINE)
        ours, other = Entry(OURS, N, B), Entry(peers.HUGGING_FACE, N, B)
        turns = {machine: partial(_ceilings, net.dtype), ours: _train_turn(net, batches)}
        if peers.HUGGING_FACE in others:
            step = peers.hugging_face_training(params, net, LEARNING_RATE)
            turns[other] = partial(_peer_train_turn, step, jax.device_get(batches))
        print(f"{size}: {len(turns)} take turns, {settings.repetitions} times", flush=True)
        measured = timing.take_turns(turns, settings.repetitions)
        about = partial(_variant, size, N, S, T, batch=EQUAL)
        records += timings.records(measured[machine], about(machine))
        work = flops.train_flops(net, B, S, T)
        for entry in turns.keys() - {machine}:
            numbers = timings.training(measured[entry], B * T, work, measured[machine])
            if entry == ours and other in turns:
                numbers |= timings.ratios(numbers, measured[other], other.system)
            records += timings.records(numbers, about(entry))
    return records


def _train_turn(config: Config, batches: list[dict]) -> timing.Turn:
    """Return a turn that runs our step on each batch and gives seconds per step."""
    loss = loop.make_loss(config, z_loss=0.0)
    step = loop.make_step(loss, optimizer.constant(LEARNING_RATE), seed=0)
    state = loop.init(config, 0)

    def steps() -> Array:
        nonlocal state
        for batch in batches:
            state, metrics = step(state, batch)
        return metrics["loss"]

    return lambda: {"step_seconds": timing.timed(steps)[0] / len(batches)}


def _peer_train_turn(step, batches: list[dict]) -> dict[str, float]:
    seconds, _ = timing.timed(lambda: [step(**batch) for batch in batches])
    return {"step_seconds": seconds / len(batches)}
