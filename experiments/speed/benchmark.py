"""Run the speed experiment: time generation and training beside other libraries.

All systems of a comparison take turns (`gqa.evaluation.timing.take_turns`), because a machine's
speed drifts from minute to minute; the machine's own ceilings, its fastest read and its fastest
matrix product, take turns too. Every result is a median over the turns, with quartiles.

This file chooses what is timed and turns the times into records. `peers.py` builds the other
libraries' networks, `report.py` writes the page, and experiments/stages/timings.py does arithmetic
on times.
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
from experiments.graph.stage import content_key
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
from gqa.training import optimizer, training_step

KINDS = ("inference", "training", "report")
LEARNING_RATE = 1e-3


class Entry(NamedTuple):
    """Who takes a turn: a system (a library or the machine itself), and the shape that it runs."""

    system: str
    num_kv_heads: int = 0
    batch_size: int = 0


def check(config: ConfigDict) -> None:
    """Raise a UserError, before any compute, if the config cannot be timed."""
    check_numbers(config)

    # `""` stands for no length at all, so that an empty setting is refused as well.
    for S in config.benchmark.inputs_lengths or ("",):
        if not isinstance(S, int) or S < 1:
            raise UserError(f"benchmark.inputs_lengths={S}; use lengths such as 1024,2048")

    # A peer's first token counts as prefill, so its time per token needs a second one.
    if config.benchmark.targets_length < 2:
        raise UserError("benchmark.targets_length=1; use 2 or more")

    # Building a network's config checks it.
    parent = _multi_head(config.model)
    for network in config.training.networks.values():
        _multi_head(network)
    for K in config.benchmark.kv_heads:
        check_kv_heads("benchmark.kv_heads", K, parent.num_heads)

    # Every network has to leave room for a batch of the longest inputs.
    for S in config.benchmark.inputs_lengths:
        for net in _nets(config).values():
            _batch_sizes(config, net, S)


def run(config: ConfigDict, workdir: Path, kind: str | None, options: pipeline.Options) -> None:
    """Time both parts, or the part `kind`; print the tables and write `speed.md` and its figure.

    With `kind` "report" nothing is timed: the last results in `workdir` are reported again.
    """
    if options != pipeline.Options():
        raise UserError("--executor, --jobs and --dry-run go with the stages of the main job")
    path, keys = workdir / RESULTS, stage_keys(config)
    if kind != "report":
        make_workdir(workdir)
        peer_names = _peers_to_time()
        for part, measure in (("inference", _inference), ("training", _training)):
            if kind in (None, part):
                measured = measure(config, peer_names)

                # All records of a part get one time, by which a report knows that they belong
                # together.
                common = {"run": config.name, "stage": part, "stage_key": keys[part], "task": None}
                common |= results.provenance()
                results.append(path, [common | record for record in measured])
    print(report.run(path, workdir, config.name, keys))


def stage_keys(config: ConfigDict) -> dict[str, str]:
    """Return the key of each part's records: a hash of the settings that it is timed with."""
    model, benchmark, training = (
        config[name].to_dict() for name in ("model", "benchmark", "training")
    )
    return {
        "inference": content_key(["inference", config.size, model, benchmark]),
        "training": content_key(["training", training]),
    }


def _peers_to_time() -> list[str]:
    """Return the names of the peers to time; print which peers are left out, and why."""
    if jax.default_backend() != "cpu":
        print("Other libraries are timed on CPUs only.", flush=True)
        return []
    for line in peers.missing():
        print(line, flush=True)
    return peers.installed()


def _multi_head(settings: ConfigDict) -> Config:
    """Return the network of a config's section, with as many KV heads as query heads."""
    heads = {f"num_kv_heads_{name}": settings.num_heads for name in ATTENTIONS}
    return network_config(settings, heads)


def _nets(config: ConfigDict) -> dict[int, Inference]:
    """Return the networks to time, by KV heads of the decoder; their encoder is multi-head."""
    parent, N = _multi_head(config.model), config.model.num_heads

    # By default, every number of KV heads that divides the query heads.
    kv_heads = config.benchmark.kv_heads or [K for K in range(N, 0, -1) if N % K == 0]
    fields = ("num_kv_heads_self_attention", "num_kv_heads_cross_attention")
    return {K: Inference(dataclasses.replace(parent, **dict.fromkeys(fields, K))) for K in kv_heads}


def _batch_sizes(config: ConfigDict, net: Inference, S: int) -> dict[str, int]:
    """Return the batch size that all networks have and, with `memory_gib`, the largest that fits.

    Raises:
        UserError: if not even one sequence of S input tokens fits beside the weights.
    """
    settings = config.benchmark
    if not settings.memory_gib:
        return {EQUAL: settings.batch_size}

    # The memory holds the weights and each sequence's KV cache.
    weights = kv_cache.nbytes(kv_cache.weight_shapes(net))
    lengths = (S, settings.targets_length)
    sequence = kv_cache.kv_cache_bytes(net.config, 1, *lengths, net.cache_dtype)
    sequences = int((settings.memory_gib * 2**30 - weights) // sequence)
    if sequences < 1:
        raise UserError(
            f"benchmark.memory_gib={settings.memory_gib:g} holds no sequence beside the weights; "
            f"use {(weights + sequence) / 2**30:.3g} or more, or 0"
        )
    return {EQUAL: settings.batch_size, LARGEST: min(sequences, settings.largest_batch_size)}


def _inference(config: ConfigDict, peer_names: list[str]) -> list[dict]:
    """Time generation for each length of the inputs; return the records."""
    params = init_params(_multi_head(config.model), 0)
    lengths = config.benchmark.inputs_lengths
    return [record for S in lengths for record in _generation(config, params, S, peer_names)]


def _generation(config: ConfigDict, params: dict, S: int, peer_names: list[str]) -> list[dict]:
    """Time every number of KV heads, and every peer, on inputs of S tokens; return the records."""
    parent, T = _multi_head(config.model), config.benchmark.targets_length
    nets = _nets(config)
    batches = {K: _batch_sizes(config, net, S) for K, net in nets.items()}

    # Smaller batches are the first rows of the largest, so that all systems see the same inputs.
    largest = max(size for sizes in batches.values() for size in sizes.values())
    inputs = timing.random_tokens(parent.vocab_size, largest, S)
    equal = inputs[: config.benchmark.batch_size]

    # Ours: converted networks. Every batch is prefilled as many rows at once as the equal batch.
    turns: dict[Entry, timing.Turn] = {Entry(MACHINE): partial(_ceilings, parent.dtype)}
    for K, net in nets.items():
        weights = net.prepare(convert(params, parent, K).params)

        # Both kinds of batches may have one size, which is then timed once.
        for size in set(batches[K].values()):
            turn = timing.generation(net, weights, inputs[:size], T, rows=len(equal))
            turns[Entry(OURS, K, size)] = turn

    # The peers run our multi-head parameters, and should choose the same tokens.
    token_agreement = {}
    for name in peer_names:
        peer = peers.build(name, params, parent, np.asarray(equal))
        entry = Entry(name, parent.num_heads, len(equal))
        turns[entry] = partial(_peer_turn, peer, T)
        token_agreement[entry] = _same_tokens(peer, params, parent, equal, T)

    print(f"input {S}: {len(turns)} take turns, {config.benchmark.repetitions} times", flush=True)
    measured = timing.take_turns(turns, config.benchmark.repetitions)
    numbers = _times(measured, T)
    for entry, share in token_agreement.items():
        numbers[entry]["same_tokens"] = np.asarray(share)
    return _generation_records(config, nets, batches, S, measured, numbers)


def _ceilings(dtype: str) -> dict[str, float]:
    """Measure the machine's fastest read in bytes/s and fastest matrix product in FLOP/s."""
    return {
        "read_bandwidth": hardware.read_bandwidth(),
        "matmul_rate": hardware.matmul_rate(dtype),
    }


def _peer_turn(peer: peers.Peer, length: int) -> dict[str, float]:
    """Time a peer's generation of `length` tokens; return the parts that `timing.generation` has.

    A library shows no time of its prefill, so the time to the first token stands for prefill.
    """
    first, _ = timing.timed(partial(peer.generate, 1))
    whole, _ = timing.timed(partial(peer.generate, length))
    parts = {"prefill": first, "decode": whole - first}
    if peer.encode is not None:
        parts["encoder"], _ = timing.timed(peer.encode)
    return parts


def _same_tokens(peer: peers.Peer, params: dict, parent: Config, inputs: Array, T: int) -> float:
    """Return the share of our multi-head network's tokens that the peer chooses too."""
    net = Inference(parent)

    # The peers do not stop at EOS, so ours must not either.
    ours = Generator(net, GREEDY, T, stop=False)(net.prepare(params), inputs)
    return float((ours == peer.generate(T)).mean())


def _times(measured: dict[Entry, Numbers], T: int) -> dict[Entry, Numbers]:
    """Return the times of every system but the machine."""
    # Ours decode T tokens after prefill; a peer's prefill includes the first token.
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
    """Return all records of one input length.

    Those of our networks include shares of the machine's ceilings, and ratios to MHA at either
    batch and to the peers at the equal batch.

    Args:
        config: of the experiment.
        nets: our networks, by KV heads.
        batches: the batch sizes of each network, by KV heads and kind of batch.
        S: tokens of an input.
        measured: what each turn measured.
        times: the times computed from `measured`.
    """
    T, N, machine = config.benchmark.targets_length, config.model.num_heads, Entry(MACHINE)
    variant = partial(_variant, config.size, N, S, T)
    records = timings.records(measured[machine], variant(machine, EQUAL))

    peer_entries = [entry for entry in times if entry.system != OURS]
    for entry in peer_entries:
        records += timings.records(times[entry], variant(entry, EQUAL))

    for K, net in nets.items():
        for batch, size in batches[K].items():
            entry = Entry(OURS, K, size)
            step = kv_cache.step(net, size, S, T)
            traffic = timings.traffic(step, times[entry], measured[entry], measured[machine])
            numbers = times[entry] | traffic
            cache = kv_cache.kv_cache_bytes(net.config, size, S, T, net.cache_dtype)
            numbers["kv_cache_bytes"] = np.asarray(cache)

            # The peers run the equal batch alone; the multi-head network runs both.
            compared = {peer.system: times[peer] for peer in peer_entries if batch == EQUAL}
            if N in nets:
                compared["mha"] = times[Entry(OURS, N, batches[N][batch])]
            for name, other_times in compared.items():
                numbers |= timings.ratios(times[entry], other_times, name)
            records += timings.records(numbers, variant(entry, batch))
    return records


def _variant(size: str, N: int, S: int, T: int, entry: Entry, batch: str) -> dict:
    """Return the fields of a record that identify the system and the shape that it ran."""
    heads = {"num_kv_heads": entry.num_kv_heads, "num_kv_heads_cross_attention": entry.num_kv_heads}
    network = {"size": size, "num_heads": N, **heads, "num_kv_heads_encoder": N}
    shape = {"batch_size": entry.batch_size, "inputs_length": S, "targets_length": T}

    # Fields that tell trained networks apart in every record; these networks are not trained.
    conversion = {"method": "none", "alpha": 0.0, "seed": 0}
    return network | conversion | shape | {"system": entry.system, "batch": batch}


def _training(config: ConfigDict, peer_names: list[str]) -> list[dict]:
    """Time training steps of each network, ours and Hugging Face's; return the records."""
    settings, records = config.training, []
    B, S, T = settings.batch_size, settings.inputs_length, settings.targets_length
    for size, network in settings.networks.items():
        net = _multi_head(network)
        params = init_params(net, 0)

        # All train on the same batches, which are new at every step.
        batches = [
            {
                "inputs": timing.random_tokens(net.vocab_size, B, S, seed=2 * i),
                "targets": timing.random_tokens(net.vocab_size, B, T, seed=2 * i + 1),
            }
            for i in range(settings.steps)
        ]

        N, machine = net.num_heads, Entry(MACHINE)
        ours, hugging_face = Entry(OURS, N, B), Entry(peers.HUGGING_FACE, N, B)
        turns: dict[Entry, timing.Turn] = {
            machine: partial(_ceilings, net.dtype),
            ours: _train_turn(net, batches),
        }
        if peers.HUGGING_FACE in peer_names:
            step = peers.hugging_face_training(params, net, LEARNING_RATE)
            turns[hugging_face] = partial(_peer_train_turn, step, jax.device_get(batches))

        print(f"{size}: {len(turns)} take turns, {settings.repetitions} times", flush=True)
        measured = timing.take_turns(turns, settings.repetitions)

        variant = partial(_variant, size, N, S, T, batch=EQUAL)
        records += timings.records(measured[machine], variant(machine))

        # The machine's ceilings are a turn too, but no system that trains.
        step_flops = flops.train_flops(net, B, S, T)
        for entry in turns.keys() - {machine}:
            numbers = timings.training(measured[entry], B * T, step_flops, measured[machine])
            if entry == ours and hugging_face in turns:
                numbers |= timings.ratios(numbers, measured[hugging_face], peers.HUGGING_FACE)
            records += timings.records(numbers, variant(entry))
    return records


def _train_turn(config: Config, batches: list[dict]) -> timing.Turn:
    """Return a turn that runs our training step on each batch and measures seconds per step."""
    loss = training_step.make_loss(config, z_loss=0.0)
    step = training_step.make_step(loss, optimizer.constant(LEARNING_RATE), seed=0)
    state = training_step.init(config, 0)

    # The state goes on from turn to turn, since a step's speed does not depend on it.
    def steps() -> Array:
        nonlocal state
        for batch in batches:
            state, metrics = step(state, batch)
        return metrics["loss"]

    return lambda: {"step_seconds": timing.timed(steps)[0] / len(batches)}


def _peer_train_turn(step: peers.TrainStep, batches: list[dict]) -> dict[str, float]:
    """Run a peer's training step on each batch; return seconds per step."""
    seconds, _ = timing.timed(lambda: [step(b["inputs"], b["targets"]) for b in batches])
    return {"step_seconds": seconds / len(batches)}
