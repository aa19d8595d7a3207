"""Compile a network's programs for a slice of accelerators that this machine lacks, and count them.

Generation is compiled for each number of KV heads at two batches: the largest that fits, up to
`aot.largest_batch_size` a chip, and the largest that all of them hold. Training is compiled for
each slice of `aot.training_targets` until one holds it.
"""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.aot import compilation, report, roofline
from experiments.aot.compilation import Compiled, Compiler
from experiments.aot.report import EQUAL, LARGEST
from experiments.aot.roofline import Work
from experiments.graph.validate import check_numbers
from experiments.run.worker import RESULTS
from experiments.stages.folder import record
from experiments.stages.network import network_config
from experiments.workdir import make_workdir
from gqa import kv_cache
from gqa.aot import chips, hlo
from gqa.aot.chips import Target
from gqa.conversion import ATTENTIONS
from gqa.evaluation import results
from gqa.inference.step import Inference
from gqa.model import flops
from gqa.model.config import Config, check_kv_heads
from gqa.runtime import sharding
from gqa.runtime.errors import UserError
from gqa.runtime.sharding import Layout

KINDS = (None, "aot", "report")
KEPT_BACK = 0.04  # of HBM, which the runtime and the compiler's own reserve take


class Point(NamedTuple):
    """One network's step and prefill, at one batch."""

    net: Inference
    batch_size: int
    step: Compiled
    prefill: Compiled


def _targets(config: ConfigDict) -> list[Target]:
    """Return the slice that generates, followed by those that are tried for training."""
    training = [chips.find(name, "aot.training_targets") for name in config.aot.training_targets]
    return [chips.find(config.aot.target, "aot.target"), *training]


def check(config: ConfigDict) -> None:
    """Refuse, in one line and before any compute, what could not be compiled."""
    check_numbers(config)
    target = _targets(config)[0]
    for K in _kv_heads(config):
        check_kv_heads("aot.kv_heads", K, config.model.num_heads)
        sharding.check(_network(config, K), Layout(model=target.chips), target.chips, target.chips)
    if not 0 < config.aot.efficiency <= 1:
        raise UserError(f"aot.efficiency={config.aot.efficiency}; use more than 0 and at most 1")


def run(config: ConfigDict, workdir: Path, kind: str | None) -> None:
    """Compile everything, print the tables and leave `report.md` and its figure."""
    if kind not in KINDS:
        raise UserError(f"--stage={kind}; use aot or report")
    check(config)
    if kind != "report":
        target, *training = targets = _targets(config)
        compilation.start(targets)
        make_workdir(workdir)
        variants = _generation(config, target, workdir) + _training(config, training, workdir)
        common = {"run": config.name, "stage": "aot", "stage_key": None, "task": None}
        common |= results.provenance()
        results.append(workdir / RESULTS, [common | r for r in variants])
    print(report.run(workdir / RESULTS, workdir, config.name))


def _kv_heads(config: ConfigDict) -> tuple[int, ...]:
    return tuple(config.aot.kv_heads) or (config.convert.num_kv_heads_self_attention,)


def _network(config: ConfigDict, K: int) -> Config:
    """Multi-head but for K KV heads in decoder self- and cross-attention."""
    heads = dict.fromkeys((f"num_kv_heads_{name}" for name in ATTENTIONS), config.model.num_heads)
    grouped = dict.fromkeys(("num_kv_heads_self_attention", "num_kv_heads_cross_attention"), K)
    return network_config(config.model, heads | grouped)


def _generation(config: ConfigDict, target: Target, workdir: Path) -> list[dict]:
    compiler = Compiler(target, Layout(model=target.chips), workdir / "aot")
    S, T = config.benchmark.inputs_length, config.benchmark.targets_length
    points = {}
    for K in _kv_heads(config):
        net = _inference(config, compiler, K)
        points[K] = _largest(config, compiler, net, S, T)
        _say(config, points[K])
    common = min(point.batch_size for point in points.values())
    made = [r for p in points.values() for r in _records(config, target, p, LARGEST)]
    for point in points.values():
        if point.batch_size != common:
            step = compiler.step(point.net, common, S, T)
            point = point._replace(batch_size=common, step=step)
            _say(config, point)
        made += _records(config, target, point, EQUAL)
    return made


def _inference(config: ConfigDict, compiler: Compiler, K: int) -> Inference:
    network = _network(config, K)
    S, T = config.benchmark.inputs_length, config.benchmark.targets_length
    rows = compiler.target.chips
    layout = sharding.choose(network, compiler.layout, compiler.mesh, rows, S, T)
    return Inference(network, backend=compiler.target.backend, layout=layout)


def _largest(config: ConfigDict, compiler: Compiler, net: Inference, S: int, T: int) -> Point:
    """The largest batch that fits, in whole rows a chip, found by compiling, by halves."""
    chips_, most = compiler.target.chips, config.aot.largest_batch_size
    prefill = compiler.prefill(net, config.aot.prefill_batch_size, S)
    if prefill.failure:
        raise UserError(f"aot.prefill_batch_size: {prefill.failure}; use a smaller one")
    fits, low, high = {}, 0, most + 1
    rows = most
    while high - low > 1:
        fits[rows] = compiler.step(net, rows * chips_, S, T)
        if _fits(compiler.target, fits[rows]):
            low = rows
        else:
            high = rows
        rows = (low + high + 1) // 2 if high - low > 2 else low + 1
    if low == 0:
        held = fits[1].failure or f"{fits[1].peak / 2**30:.1f} GiB a chip"
        raise UserError(f"aot.target={compiler.target.name}: {held}; use a larger one")
    return Point(net, low * chips_, fits[low], prefill)


def _fits(target: Target, compiled: Compiled) -> bool:
    return not compiled.failure and compiled.peak <= target.chip.hbm * (1 - KEPT_BACK)


def _say(config: ConfigDict, point: Point) -> None:
    K, gib = point.net.config.num_kv_heads_self_attention, point.step.peak / 2**30
    print(
        f"{config.aot.target}: {K} KV heads, batch {point.batch_size}: {gib:.1f} GiB a chip, "
        f"compiled in {point.step.seconds:.0f} s",
        flush=True,
    )


def _records(config: ConfigDict, target: Target, point: Point, batch: str) -> list[dict]:
    """Return the records of a point: memory, bytes, communication, and the times they take."""
    S, T = config.benchmark.inputs_length, config.benchmark.targets_length
    R = config.aot.prefill_batch_size
    net, B, n = point.net, point.batch_size, target.chips
    whole, encoder = (flops.forward_flops(net.config, B, S, length) for length in (T, 0))
    program = hlo.parse(point.step.text)
    step = _analysed(point.step, program, "step", (whole - encoder) / T / n, config, target)
    work, encoded = flops.forward_flops(net.config, R, S, 0) / n, hlo.parse(point.prefill.text)
    prefill = _analysed(point.prefill, encoded, "prefill", work, config, target)
    moved = kv_cache.step(net, B, S, T)
    numbers = step | prefill
    numbers["step_must_bytes"] = (moved.weights + moved.cross_cache + moved.self_cache) / n
    # The smaller of a layer's caches: keys or values of self-attention.
    least = min(moved.cross_cache, moved.self_cache) // (2 * net.config.num_decoder_layers * n)
    numbers["step_moves"] = len(hlo.moves(program, int(least)))
    numbers["step_cache_reads"] = hlo.reads(program, ("cache[", "memory.kv["))
    numbers["sample_seconds"] = roofline.sample_seconds(
        numbers["prefill_seconds"], R, numbers["step_seconds"], T, B, n
    )
    K = net.config.num_kv_heads_self_attention
    about = {"num_kv_heads": K, "batch": batch, "batch_size": B, "layout": net.layout.kv_heads}
    return _variant_records(config, target.name, about, numbers)


def _analysed(
    compiled: Compiled,
    program: hlo.Program,
    name: str,
    work: float,
    config: ConfigDict,
    target: Target,
) -> dict[str, float]:
    """Return the numbers of one program on one device, which does `work` FLOPs."""
    found = hlo.collectives(program)
    nbytes, sent = hlo.traffic(program), sum(c.sent for c in found.values())
    time = roofline.time(Work(nbytes, work, sent), target, config.aot.efficiency)
    numbers = {
        "seconds": time.seconds,
        **{f"{part}_seconds": getattr(time, part) for part in time._fields},
        "argument_bytes": compiled.arguments,
        "temporary_bytes": compiled.temporary,
        "aliased_bytes": compiled.aliased,
        "peak_bytes": compiled.peak,
        "accessed_bytes": nbytes,
        "flops": work,
        "sent_bytes": sent,
        "compile_seconds": compiled.seconds,
        **{f"{kind}_count": c.count for kind, c in found.items()},
        **{f"{kind}_bytes": c.nbytes for kind, c in found.items()},
    }
    return {f"{name}_{number}": float(value) for number, value in numbers.items()}


def _variant_records(config: ConfigDict, target: str, about: dict, numbers: dict) -> list[dict]:
    variant = {"size": config.size, "num_heads": config.model.num_heads, "target": target}
    variant |= {"efficiency": config.aot.efficiency} | about
    units = {"seconds": "s", "bytes": "bytes", "flops": "FLOPs"}
    return [
        record(name, value, units.get(name.rpartition("_")[2], ""), variant=variant)
        for name, value in numbers.items()
    ]


def _training(config: ConfigDict, targets: list[Target], workdir: Path) -> list[dict]:
    """The multi-head network's pretraining step, on the first slice that holds it."""
    settings = config.pretrain
    B, S, T = settings.batch_size, settings.inputs_length, settings.targets_length
    network = _network(config, config.model.num_heads)
    for target in targets:
        layout = Layout(model=config.aot.training_model, fsdp=True)
        compiler = Compiler(target, layout, workdir / "aot")
        step = compiler.train(network, B, S, T, settings.num_microbatches)
        fits = _fits(target, step)
        held = f"{step.peak / 2**30:.1f} GiB a chip" if not step.failure else step.failure
        print(f"{target.name}: training, batch {B}: {held}, in {step.seconds:.0f} s", flush=True)
        if fits:
            work = flops.train_flops(network, B, S, T) / target.chips
            program = hlo.parse(step.text)
            numbers = _analysed(step, program, "train", work, config, target)
            about = {"num_kv_heads": network.num_heads, "batch": "training", "batch_size": B}
            about |= {"model": config.aot.training_model, "remat": network.remat}
            about |= {"num_microbatches": settings.num_microbatches}
            return _variant_records(config, target.name, about, numbers)
    return []
