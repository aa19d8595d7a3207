"""Run the ahead-of-time experiment: compile programs for absent accelerators, count their costs.

Generation is compiled for each number of KV heads at two batches: the largest that fits, up to
`aot.largest_batch_size` sequences a chip, and the largest that fits for every number of KV heads.
Training is compiled for each slice of `aot.training_targets` until its state fits.

This file chooses the programs and turns their costs into records. `compilation.py` compiles,
`roofline.py` turns costs into times, and `report.py` writes the page.
"""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.aot import compilation, report, roofline
from experiments.aot.compilation import Compiled, Compiler
from experiments.aot.report import EQUAL, LARGEST
from experiments.aot.roofline import Work
from experiments.graph.stage import content_key
from experiments.graph.validate import check_numbers
from experiments.run.worker import RESULTS
from experiments.stages import text
from experiments.stages.folder import record
from experiments.stages.network import network_config
from experiments.workdir import make_workdir
from gqa import kv_cache
from gqa.aot import chips, costs, hlo
from gqa.aot.chips import Target
from gqa.conversion import ATTENTIONS
from gqa.evaluation import results
from gqa.inference.step import Inference
from gqa.model import flops
from gqa.model.config import Config, check_kv_heads
from gqa.runtime.errors import ConfigError, UserError, renamed_fields
from gqa.runtime.mesh import Layout, check_layout, resolve_layout

KINDS = (None, "aot", "report")
KEPT_BACK = 0.04  # share of HBM that the runtime and the compiler's own reserve take


class Point(NamedTuple):
    """One network with its compiled step, at one batch size, and its compiled prefill."""

    net: Inference
    batch_size: int
    step: Compiled
    prefill: Compiled


def _targets(config: ConfigDict) -> list[Target]:
    """Return the slice that generates, followed by the slices that are tried for training."""
    training = [_target(name, "aot.training_targets") for name in config.aot.training_targets]
    return [_target(config.aot.target, "aot.target"), *training]


def _target(name: str, key: str) -> Target:
    """Return the slice `name`; an error names the config's `key` that holds the name."""
    try:
        return chips.find(name)
    except ConfigError as error:
        raise error.renamed(key) from None


def check(config: ConfigDict) -> None:
    """Raise a UserError, before anything is compiled, if the config cannot be compiled."""
    check_numbers(config)
    target = _targets(config)[0]
    for K in _kv_heads(config):
        check_kv_heads("aot.kv_heads", K, config.model.num_heads)
        network = _network(config, K)

        # The layout is not in the config but follows from the slice, so the error names the slice.
        with renamed_fields(f"aot.target={config.aot.target}: "):
            check_layout(network, Layout(model=target.chips), target.chips, target.chips)
    if not 0 < config.aot.efficiency <= 1:
        raise UserError(f"aot.efficiency={config.aot.efficiency}; use more than 0 and at most 1")


def run(config: ConfigDict, workdir: Path, kind: str | None) -> None:
    """Compile everything, print the tables and leave `report.md` and its figure."""
    if kind not in KINDS:
        raise UserError(f"--stage={kind}; use aot or report")
    check(config)

    key = stage_key(config)
    if kind != "report":
        # JAX has to be prepared before anything else asks for its devices.
        target, *training = targets = _targets(config)
        compilation.start(targets)
        make_workdir(workdir)

        variants = _generation(config, target, workdir) + _training(config, training, workdir)

        # All records get one time, by which a report knows that they belong together.
        common = {"run": config.name, "stage": "aot", "stage_key": key, "task": None}
        common |= results.provenance()
        results.append(workdir / RESULTS, [common | variant for variant in variants])
    print(report.run(workdir / RESULTS, workdir, config.name, key))


def stage_key(config: ConfigDict) -> str:
    """Return the key of a compilation's records: a hash of the settings that it is made with."""
    sections = ("model", "convert", "pretrain", "benchmark", "aot")
    return content_key(["aot", config.size, *(config[name].to_dict() for name in sections)])


def _kv_heads(config: ConfigDict) -> tuple[int, ...]:
    """Return the numbers of KV heads to compile for; by default the number that convert makes."""
    return tuple(config.aot.kv_heads) or (config.convert.num_kv_heads_self_attention,)


def _network(config: ConfigDict, K: int) -> Config:
    """Return a network with K KV heads in the decoder's attentions; its encoder is multi-head."""
    heads = dict.fromkeys((f"num_kv_heads_{name}" for name in ATTENTIONS), config.model.num_heads)
    grouped = dict.fromkeys(("num_kv_heads_self_attention", "num_kv_heads_cross_attention"), K)
    return network_config(text.model_section(config), heads | grouped)


def _generation(config: ConfigDict, target: Target, workdir: Path) -> list[dict]:
    """Compile generation for each number of KV heads; return the records of both batches."""
    compiler = Compiler(target, Layout(model=target.chips), workdir / "aot")
    S, T = config.benchmark.inputs_length, config.benchmark.targets_length

    # Each network at the largest batch that fits.
    points = []
    for K in _kv_heads(config):
        net = _inference(config, compiler, K)
        point = _largest(config, compiler, net, S, T)
        _print_point(config, point)
        points.append(point)
    records = [r for point in points for r in _records(config, target, point, LARGEST)]

    # All networks at one batch, so that their times differ by the number of KV heads alone.
    common = min(point.batch_size for point in points)
    for point in points:
        if point.batch_size != common:
            step = compiler.step(point.net, common, S, T)
            point = point._replace(batch_size=common, step=step)
            _print_point(config, point)
        records += _records(config, target, point, EQUAL)
    return records


def _inference(config: ConfigDict, compiler: Compiler, K: int) -> Inference:
    """Return the network with K KV heads, in the layout that generation would choose there."""
    network = _network(config, K)
    S, T = config.benchmark.inputs_length, config.benchmark.targets_length
    rows = compiler.target.chips
    layout = resolve_layout(network, compiler.layout, compiler.mesh, rows, S, T)
    return Inference(network, backend=compiler.target.backend, layout=layout)


def _largest(config: ConfigDict, compiler: Compiler, net: Inference, S: int, T: int) -> Point:
    """Return the largest batch that fits, a multiple of the chips, found by bisection."""
    num_chips, most = compiler.target.chips, config.aot.largest_batch_size
    prefill = compiler.prefill(net, config.aot.prefill_batch_size, S)
    if prefill.failure:
        raise UserError(f"aot.prefill_batch_size: {prefill.failure}; use a smaller one")

    # `low` rows a chip fit and `high` do not. The most that may be used is tried first, because it
    # often fits and every compilation takes minutes. With at most 32 rows: 32, then 16, then 8 or
    # 24, and so on.
    steps: dict[int, Compiled] = {}
    low, high = 0, most + 1
    rows = most
    while high - low > 1:
        steps[rows] = compiler.step(net, rows * num_chips, S, T)
        if _fits(compiler.target, steps[rows]):
            low = rows
        else:
            high = rows
        rows = (low + high + 1) // 2

    if low == 0:
        used = steps[1].failure or f"{steps[1].peak / 2**30:.1f} GiB a chip"
        raise UserError(
            f"aot.target={compiler.target.name} cannot hold one sequence a chip: {used}; use a "
            "larger slice"
        )
    return Point(net, low * num_chips, steps[low], prefill)


def _fits(target: Target, compiled: Compiled) -> bool:
    """Return whether a program leaves the runtime enough of a chip's memory."""
    return not compiled.failure and compiled.peak <= target.chip.hbm * (1 - KEPT_BACK)


def _print_point(config: ConfigDict, point: Point) -> None:
    K, gib = point.net.config.num_kv_heads_self_attention, point.step.peak / 2**30
    print(
        f"{config.aot.target}: {K} KV heads, batch {point.batch_size}: {gib:.1f} GiB a chip, "
        f"compiled in {point.step.seconds:.0f} s",
        flush=True,
    )


def _records(config: ConfigDict, target: Target, point: Point, batch: str) -> list[dict]:
    """Return a point's records: memory, bytes, communication, and the times that they take."""
    S, T = config.benchmark.inputs_length, config.benchmark.targets_length
    net, B, n = point.net, point.batch_size, target.chips

    # One token: a T-th of the decoder's share of a forward pass over T targets, on each of n chips.
    forward, encoder = (flops.forward_flops(net.config, B, S, length) for length in (T, 0))
    step_program = hlo.parse(point.step.text)
    step_flops = (forward - encoder) / T / n
    numbers = _program_numbers(point.step, step_program, "step", step_flops, config, target)

    # Prefill, of R inputs at once.
    R = config.aot.prefill_batch_size
    prefill_program = hlo.parse(point.prefill.text)
    prefill_flops = flops.forward_flops(net.config, R, S, 0) / n
    numbers |= _program_numbers(
        point.prefill, prefill_program, "prefill", prefill_flops, config, target
    )

    # How the step treats the caches, beside the bytes that any program would have to read. Only
    # copies as large as keys or values of the smaller of a layer's caches count as moves.
    needed = kv_cache.step(net, B, S, T)
    numbers["step_must_bytes"] = (needed.weights + needed.cross_cache + needed.self_cache) / n
    smaller_cache = min(needed.cross_cache, needed.self_cache)
    one_array = smaller_cache // (2 * net.config.num_decoder_layers * n)
    numbers["step_moves"] = len(costs.moves(step_program, int(one_array)))

    # In the compiled program the caches have the names of the parameters of `Inference.step`.
    numbers["step_cache_reads"] = costs.reads(step_program, ("cache[", "memory.kv["))

    numbers["sample_seconds"] = roofline.sample_seconds(
        numbers["prefill_seconds"], R, numbers["step_seconds"], T, B, n
    )
    K = net.config.num_kv_heads_self_attention
    shape = {"num_kv_heads": K, "batch": batch, "batch_size": B, "layout": net.layout.kv_heads}
    return _variant_records(config, target.name, shape, numbers)


def _program_numbers(
    compiled: Compiled,
    program: hlo.Program,
    name: str,
    num_flops: float,
    config: ConfigDict,
    target: Target,
) -> dict[str, float]:
    """Return one program's numbers on one device, their names beginning with `name`.

    Args:
        compiled: the program with XLA's account of its memory.
        program: its text, parsed.
        name: of the program, such as "step".
        num_flops: model FLOPs of one device.
        config: of the experiment.
        target: the slice that the program is compiled for.
    """
    collectives = costs.collectives(program)
    nbytes, sent = costs.traffic(program), sum(c.sent for c in collectives.values())

    time = roofline.time(Work(nbytes, num_flops, sent), target, config.aot.efficiency)
    numbers = {
        "seconds": time.seconds,
        **{f"{part}_seconds": getattr(time, part) for part in time._fields},
        "argument_bytes": compiled.arguments,
        "temporary_bytes": compiled.temporary,
        "aliased_bytes": compiled.aliased,
        "peak_bytes": compiled.peak,
        "accessed_bytes": nbytes,
        "flops": num_flops,
        "sent_bytes": sent,
        "compile_seconds": compiled.seconds,
        **{f"{kind}_count": c.runs for kind, c in collectives.items()},
        **{f"{kind}_bytes": c.nbytes for kind, c in collectives.items()},
    }
    return {f"{name}_{number}": float(value) for number, value in numbers.items()}


def _variant_records(config: ConfigDict, target: str, shape: dict, numbers: dict) -> list[dict]:
    """Return a record of each number; the last word of a number's name tells its unit."""
    variant = {"size": config.size, "num_heads": config.model.num_heads, "target": target}
    variant |= {"efficiency": config.aot.efficiency} | shape
    units = {"seconds": "s", "bytes": "bytes", "flops": "FLOPs"}
    return [
        record(name, value, units.get(name.rpartition("_")[2], ""), variant=variant)
        for name, value in numbers.items()
    ]


def _training(config: ConfigDict, targets: list[Target], workdir: Path) -> list[dict]:
    """Return the records of the multi-head pretraining step, on the first slice where it fits."""
    settings = config.pretrain
    B, S, T = settings.batch_size, settings.inputs_length, settings.targets_length
    network = _network(config, config.model.num_heads)
    for target in targets:
        # Stop at the first slice that holds the state, because every compilation takes minutes.
        layout = Layout(model=config.aot.training_model, fsdp=True)
        compiler = Compiler(target, layout, workdir / "aot")
        step = compiler.train(network, B, S, T, settings.num_microbatches)
        used = step.failure or f"{step.peak / 2**30:.1f} GiB a chip"
        print(
            f"{target.name}: training, batch {B}: {used}, compiled in {step.seconds:.0f} s",
            flush=True,
        )

        if _fits(target, step):
            num_flops = flops.train_flops(network, B, S, T) / target.chips
            program = hlo.parse(step.text)
            numbers = _program_numbers(step, program, "train", num_flops, config, target)
            shape = {"num_kv_heads": network.num_heads, "batch": "training", "batch_size": B}
            shape |= {"model": config.aot.training_model, "remat": network.remat}
            shape |= {"num_microbatches": settings.num_microbatches}
            return _variant_records(config, target.name, shape, numbers)
    return []
