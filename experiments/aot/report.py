"""Turn results.jsonl into report.md and its figure: compiled programs beside the paper's times."""

import os
from pathlib import Path

from matplotlib.figure import Figure

from experiments.report import paper, plot, tables
from gqa.aot import chips
from gqa.evaluation import results
from gqa.runtime import atomic_files
from gqa.runtime.errors import UserError

EQUAL, LARGEST, TRAINING = "equal", "largest", "training"
TITLES = {LARGEST: "the largest batch that fits", EQUAL: "the largest batch that all hold"}
CONVERTED = {"MHA / GQA-8": ("MHA-XXL", "GQA-8-XXL", 8), "MHA / MQA": ("MHA-XXL", "MQA-XXL", 1)}
QUESTION = (
    "This page answers how fast a network with each number of KV heads would generate on "
    "accelerators that were not at hand, and what bounds it."
)
NOTES = """Nothing here was run: XLA's own compiler made each program for the slice, without weights
or devices, and these are the program's own numbers, a chip. Memory is what XLA reports. "Must move"
is the weights a token reads and the KV cache, counted from shapes (self-attention's as the mean
over tokens, whose cache grows); "accessed" is every HBM operand and result of the compiled program,
decoder layers unrolled, loops as often as they run, with self-attention's cache at its full length.
A kernel (prefill's attention) counts its operands once. A token's time is the slower of accessed
bytes at HBM bandwidth and model FLOPs at bfloat16 peak, plus the bytes sent at the rate of a chip's
links in the slice (rings; nothing is hidden behind computation), all at one stated share of the
ceilings. No other constant, none fitted. Latencies, the host and input are left out. Time per
sample is chip-seconds: prefill and every token times chips, over the batch. The paper gives neither
its batch per network nor its partitioning; "8 TPUs" is taken as 8 chips, and its
timing as the largest batch of up to 32 a chip."""


def run(results_path: str | os.PathLike, folder: str | os.PathLike, name: str) -> str:
    """Write report.md, sample_seconds.png and .svg of the run `name`; return the tables as text."""
    records = [r for r in results.read(results_path) if (r["run"], r["stage"]) == (name, "aot")]
    if not records:
        raise UserError(
            f"{results_path}: nothing compiled of {name}; run it without --stage=report"
        )
    records = [r for r in records if r["time"] == records[-1]["time"]]
    rows = _rows(records)
    folder = Path(folder)
    lines, plain = ["# Ahead of time", QUESTION, NOTES], []
    for title, header, cells in _sections(rows):
        lines += [f"## {title}", tables.markdown(header, cells)]
        plain.append(f"{title}\n\n{tables.plain(header, cells)}")
    last = records[-1]
    lines += [_verdict(rows), "![Chip-seconds a sample against KV heads](sample_seconds.png)"]
    lines.append(f"- commit {last['commit']}, compiled on {last['device']}, {last['time']}")
    _figure(rows, folder)
    atomic_files.write(folder / "report.md", "\n\n".join(line for line in lines if line) + "\n")
    return "\n\n".join([*plain, f"report: {folder / 'report.md'}"])


def _rows(records: list[dict]) -> list[tuple[dict, dict]]:
    rows: dict[str, tuple[dict, dict]] = {}
    for record in records:
        row = rows.setdefault(str(record["variant"]), (record["variant"], {}))
        row[1][record["metric"]] = record["value"]
    return list(rows.values())


def _of(rows: list, batch: str) -> list[tuple[dict, dict]]:
    found = [row for row in rows if row[0]["batch"] == batch]
    return sorted(found, key=lambda row: row[0]["num_kv_heads"])


def _sections(rows: list) -> list[tuple[str, list, list]]:
    sections = []
    for batch, title in TITLES.items():
        if found := _of(rows, batch):
            v = found[0][0]
            about = f"{v['size']} on {_slice(v)}, {title}, {v['efficiency']:g} of the ceilings"
            sections.append((about, *_times(found)))
            sections.append((f"A token at {title}: a chip's memory and traffic", *_memory(found)))
            sections.append((f"What the compiled step does at {title}", *_program(found)))
    if found := _of(rows, EQUAL):
        sections.append(("Prefill", *_prefill(found)))
    sections += [("Ratios of Table 1", *_ratios(rows))]
    sections += [_training(*row) for row in _of(rows, TRAINING)]
    return [section for section in sections if section[2]]


def _slice(v: dict) -> str:
    target = chips.find(v["target"])
    name = f"TPU {target.kind}" if target.platform == "tpu" else f"NVIDIA {target.kind.upper()}"
    return f"{target.chips} chips of {name} ({v['target']})"


def _published(v: dict) -> dict[int, float]:
    """The paper's seconds a sample by KV heads, where a row is of its network on its hardware."""
    return paper.FIGURE6 if (v["size"], v["target"]) == ("xxl", "v4-16") else {}


def _times(rows: list) -> tuple[list, list]:
    header = ["KV heads", "cache", "batch", "prefill", "token", "memory", "compute", "network"]
    header += ["time / sample", "paper", "ours - paper", "ours / paper"]
    cells = []
    for v, n in rows:
        K, sample = v["num_kv_heads"], n["sample_seconds"]
        published = _published(v).get(K)
        beside = [tables.DASH] * 3
        if published:
            beside = [f"{published:.2f} s", f"{sample - published:+.2f} s"]
            beside.append(f"{sample / published:.2f}")
        parts = ["prefill_seconds", "step_seconds", "step_memory_seconds", "step_compute_seconds"]
        times = [tables.seconds(n[part]) for part in (*parts, "step_network_seconds")]
        cells.append(
            [str(K), v["layout"], str(v["batch_size"]), *times, f"{sample:.3f} s", *beside]
        )
    return header, cells


def _memory(rows: list) -> tuple[list, list]:
    header = ["KV heads", "arguments", "temporary", "peak", "of HBM", "must move", "accessed"]
    header += ["accessed / must"]
    cells = []
    for v, n in rows:
        hbm, must = chips.find(v["target"]).chip.hbm, n["step_must_bytes"]
        names = ("step_argument_bytes", "step_temporary_bytes", "step_peak_bytes")
        share = f"{100 * n['step_peak_bytes'] / hbm:.0f}%"
        moved = [tables.size(must), tables.size(n["step_accessed_bytes"])]
        ratio = f"{n['step_accessed_bytes'] / must:.2f}"
        sizes = [tables.size(n[name]) for name in names]
        cells.append([str(v["num_kv_heads"]), *sizes, share, *moved, ratio])
    return header, cells


def _program(rows: list) -> tuple[list, list]:
    header = ["KV heads", "collectives (times, bytes)", "sent", "reads of a cache byte"]
    header += ["cache-sized copies", "compiled in"]
    cells = []
    for v, n in rows:
        more = [tables.size(n["step_sent_bytes"]), f"{n['step_cache_reads']:.2f}"]
        more.append(f"{n['step_moves']:.0f}")
        more.append(tables.seconds(n["step_compile_seconds"]))
        cells.append([str(v["num_kv_heads"]), _collectives(n, "step"), *more])
    return header, cells


def _collectives(numbers: dict, program: str) -> str:
    kinds = [name.removesuffix("_count") for name in numbers if name.endswith("_count")]
    own = [kind for kind in kinds if kind.startswith(f"{program}_")]
    return "; ".join(
        f"{kind.removeprefix(f'{program}_')} {numbers[f'{kind}_count']:.0f}, "
        f"{tables.size(numbers[f'{kind}_bytes'])}"
        for kind in own
    )


def _prefill(rows: list) -> tuple[list, list]:
    header = ["KV heads", "time", "compute", "memory", "network", "peak", "accessed", "collectives"]
    cells = []
    for v, n in rows:
        parts = ("prefill_seconds", "prefill_compute_seconds", "prefill_memory_seconds")
        times = [tables.seconds(n[part]) for part in (*parts, "prefill_network_seconds")]
        sizes = [tables.size(n[f"prefill_{x}_bytes"]) for x in ("peak", "accessed")]
        cells.append([str(v["num_kv_heads"]), *times, *sizes, _collectives(n, "prefill")])
    return header, cells


def _samples(rows: list, batch: str) -> dict[int, float]:
    return {v["num_kv_heads"]: n["sample_seconds"] for v, n in _of(rows, batch)}


def _ratios(rows: list) -> tuple[list, list]:
    header, cells = ["", "published", *TITLES.values()], []
    for name, (parent, model, K) in CONVERTED.items():
        published = paper.TABLE1[parent][0] / paper.TABLE1[model][0]
        ours = [_samples(rows, batch) for batch in TITLES]
        if all({K, 64} <= found.keys() for found in ours) and _published(rows[0][0]):
            cells.append([name, f"{published:.1f}x", *(f"{f[64] / f[K]:.1f}x" for f in ours)])
    return header, cells


def _verdict(rows: list) -> str:
    """Whether these times have the published jump from 32 to 64 KV heads, and from what."""
    largest, equal = (_samples(rows, batch) for batch in (LARGEST, EQUAL))
    published = _published(rows[0][0])
    if not all({32, 64} <= found.keys() for found in (largest, equal, published)):
        return ""
    jump, alone = largest[64] / largest[32], equal[64] / equal[32]
    there = published[64] / published[32]
    batches = {v["num_kv_heads"]: v["batch_size"] for v, _ in _of(rows, LARGEST)}
    answer = "explains" if jump > 0.8 * there else "does not explain"
    return (
        f"The roofline {answer} the paper's jump from 32 to 64 KV heads: it is {there:.1f}x "
        f"there, here {jump:.2f}x with batches of {batches[32]} and {batches[64]}, and "
        f"{alone:.2f}x at one batch. Table 1's times are means over tasks of different lengths; "
        "the ratios here are at the lengths above."
    )


def _training(v: dict, n: dict) -> tuple[str, list, list]:
    settings = f"model={v['model']}, remat={v['remat']}, {v['num_microbatches']} microbatches"
    title = f"Training {v['size']} on {_slice(v)}: batch {v['batch_size']}, FSDP, {settings}"
    parts = ("seconds", "compute_seconds", "memory_seconds", "network_seconds")
    header = ["step", "compute", "memory", "network", "arguments", "temporary", "peak", "sent"]
    sizes = ("argument_bytes", "temporary_bytes", "peak_bytes", "sent_bytes")
    cells = [tables.seconds(n[f"train_{part}"]) for part in parts]
    cells += [tables.size(n[f"train_{size}"]) for size in sizes]
    cells.append(_collectives(n, "train"))
    return title, [*header, "collectives"], [cells]


def _figure(rows: list, folder: Path) -> None:
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (batch, title) in enumerate(TITLES.items()):
        if found := _samples(rows, batch):
            axes.plot(found.keys(), found.values(), label=f"compiled: {title}", **plot.style(i))
    if published := _published(rows[0][0]):
        axes.plot(published.keys(), published.values(), label="published", **plot.style(6))
    plot.kv_heads_axis(axes)
    axes.set(ylabel="Chip-seconds a sample", ylim=(0, None))
    plot.tidy(axes)
    plot.legend_below(figure, axes)
    plot.save_all(figure, folder, "sample_seconds")
