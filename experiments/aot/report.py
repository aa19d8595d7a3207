"""Write report.md and its figure from results.jsonl: compiled programs beside the paper's times.

`analysis.py` compiles and writes the records; experiments/report formats numbers and draws.
"""

import os
from pathlib import Path

from experiments.report import paper, plot, safe_text, tables
from gqa.aot import chips
from gqa.evaluation import results
from gqa.runtime import atomic_files
from gqa.runtime.errors import UserError

# Kinds of batches; TITLES says what they are.
EQUAL, LARGEST, TRAINING = "equal", "largest", "training"
TITLES = {LARGEST: "the largest batch that fits", EQUAL: "the largest batch that all hold"}
# Rows of the paper's Table 1 whose times are compared: the parent's, the converted network's, and
# the latter's KV heads.
CONVERTED = {"MHA / GQA-8": ("MHA-XXL", "GQA-8-XXL", 8), "MHA / MQA": ("MHA-XXL", "MQA-XXL", 1)}
QUESTION = (
    "This page answers how fast a network with each number of KV heads would generate on "
    "accelerators that were not at hand, and what bounds it."
)
NOTES = """No program was run. XLA's compiler compiled each program for the slice without weights or
devices; all numbers are counted in the compiled program, for one chip. Memory is as XLA reports
it. "Must move" is the bytes that any program would have to read for a token, counted from shapes:
the weights that a token uses and the KV cache (self-attention's at its mean length, because it
grows). "Accessed" is every operand and result in HBM of the compiled program: decoder layers are
unrolled, loops count as often as they run, and self-attention's cache has its full length. A kernel
(prefill's attention) counts its operands once. A token's time is the longer of two times, accessed
bytes at HBM bandwidth and model FLOPs at bfloat16 peak, plus the time of the bytes sent at the rate
of a chip's links in the slice (collectives run on rings and do not overlap with computation). All
three rates are multiplied by one stated share of the ceilings; there is no other constant, and none
is fitted. Latencies, the host and the input are left out. Time per sample is in chip-seconds: the
time of prefill and of every token, times chips, over the batch. The paper gives neither its batch
per network nor its partitioning, so "8 TPUs" is taken as 8 chips, and its timing as that of the
largest batch of up to 32 sequences a chip."""


# What identifies a network and its batch, and its numbers by metric.
Row = tuple[dict, dict]
# The cells of the header, and the cells of each row; in a section they follow a title.
Table = tuple[list[str], list[list[str]]]
Section = tuple[str, list[str], list[list[str]]]


def run(results_path: str | os.PathLike, folder: str | os.PathLike, name: str, key: str) -> str:
    """Write report.md and the figure of a compilation; return the tables as text.

    Args:
        name: of the run, for messages.
        key: the stage key of the compilation's records; others have other settings.

    Raises:
        UserError: if the results have nothing of the run.
    """
    # The records of one compilation have one time; only the last compilation is reported.
    records = results.of_stages(results.read(results_path), {key})
    if not records:
        raise UserError(
            f"{results_path}: nothing compiled of {name} with these settings; "
            "run it without --stage=report"
        )

    rows = _rows(records)
    folder = Path(folder)

    lines, plain = ["# Ahead of time", QUESTION, NOTES], []
    for title, header, cells in _sections(rows):
        lines += [f"## {safe_text.markdown(title)}", tables.markdown(header, cells)]
        plain.append(f"{title}\n\n{tables.plain(header, cells)}")

    last = records[-1]
    lines += [_verdict(rows), "![Chip-seconds a sample against KV heads](sample_seconds.png)"]

    origin = f"commit {last['commit']}, compiled on {last['device']}, {last['time']}"
    lines.append(f"- {safe_text.markdown(origin)}")
    _figure(rows, folder)
    text = "\n\n".join(line for line in lines if line) + "\n"
    atomic_files.write(folder / "report.md", safe_text.visible(text))
    return safe_text.visible("\n\n".join([*plain, f"report: {folder / 'report.md'}"]))


def _rows(records: list[dict]) -> list[Row]:
    """Gather the numbers of each variant: one network at one batch."""
    rows: dict[str, Row] = {}
    for record in records:
        # A variant is a dict, which cannot be a key, so its text is the key.
        row = rows.setdefault(str(record["variant"]), (record["variant"], {}))
        row[1][record["metric"]] = record["value"]
    return list(rows.values())


def _with_batch(rows: list[Row], batch: str) -> list[Row]:
    """Return the rows of one kind of batch, by KV heads."""
    selected = [row for row in rows if row[0]["batch"] == batch]
    return sorted(selected, key=lambda row: row[0]["num_kv_heads"])


def _sections(rows: list[Row]) -> list[Section]:
    """Return all tables that have cells."""
    sections: list[Section] = []
    for batch, title in TITLES.items():
        if batch_rows := _with_batch(rows, batch):
            # All rows have the size, the slice and the efficiency of the first, because they are of
            # one run.
            v = batch_rows[0][0]
            heading = f"{v['size']} on {_slice(v)}, {title}, {v['efficiency']:g} of the ceilings"
            sections.append((heading, *_times(batch_rows)))
            sections.append(
                (f"A token at {title}: a chip's memory and traffic", *_memory(batch_rows))
            )
            sections.append((f"What the compiled step does at {title}", *_program(batch_rows)))

    # Prefill has one size for both kinds of batches, so either kind shows it.
    if equal_rows := _with_batch(rows, EQUAL):
        sections.append(("Prefill", *_prefill(equal_rows)))
    sections += [("Ratios of Table 1", *_ratios(rows))]
    sections += [_training(*row) for row in _with_batch(rows, TRAINING)]
    return [section for section in sections if section[2]]


def _slice(v: dict) -> str:
    """Return a slice in words, such as "8 chips of TPU v4 (v4-16)"."""
    target = chips.find(v["target"])
    name = f"TPU {target.kind}" if target.platform == "tpu" else f"NVIDIA {target.kind.upper()}"
    return f"{target.chips} chips of {name} ({v['target']})"


def _published(v: dict) -> dict[int, float]:
    """Return the paper's seconds per sample by KV heads, if the row is its network and hardware."""
    return paper.FIGURE6 if (v["size"], v["target"]) == ("xxl", "v4-16") else {}


def _times(rows: list[Row]) -> Table:
    """Return the times of generation, beside the paper's."""
    header = ["KV heads", "cache", "batch", "prefill", "token", "memory", "compute", "network"]
    header += ["time / sample", "paper", "ours - paper", "ours / paper"]
    cells = []
    for v, n in rows:
        K, sample = v["num_kv_heads"], n["sample_seconds"]
        published = _published(v).get(K)
        comparison = [tables.DASH] * 3
        if published:
            comparison = [f"{published:.2f} s", f"{sample - published:+.2f} s"]
            comparison.append(f"{sample / published:.2f}")
        parts = ["prefill_seconds", "step_seconds", "step_memory_seconds", "step_compute_seconds"]
        times = [tables.seconds(n[part]) for part in (*parts, "step_network_seconds")]
        cells.append(
            [str(K), v["layout"], str(v["batch_size"]), *times, f"{sample:.3f} s", *comparison]
        )
    return header, cells


def _memory(rows: list[Row]) -> Table:
    """Return a step's memory, and its HBM traffic beside the least that is possible."""
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


def _program(rows: list[Row]) -> Table:
    """Return what the compiled step communicates, reads twice and copies."""
    header = ["KV heads", "collectives (times, bytes)", "sent", "reads of a cache byte"]
    header += ["cache-sized copies", "compiled in"]
    cells = []
    for v, n in rows:
        counts = [tables.size(n["step_sent_bytes"]), f"{n['step_cache_reads']:.2f}"]
        counts.append(f"{n['step_moves']:.0f}")
        counts.append(tables.seconds(n["step_compile_seconds"]))
        cells.append([str(v["num_kv_heads"]), _collectives(n, "step"), *counts])
    return header, cells


def _collectives(numbers: dict, program: str) -> str:
    """Return one program's collectives by kind, such as "all-reduce 49, 1.5 MiB; ..."."""
    # Metrics are named after the program and the collective, such as "step_all-reduce_count".
    kinds = [name.removesuffix("_count") for name in numbers if name.endswith("_count")]
    program_kinds = [kind for kind in kinds if kind.startswith(f"{program}_")]
    return "; ".join(
        f"{kind.removeprefix(f'{program}_')} {numbers[f'{kind}_count']:.0f}, "
        f"{tables.size(numbers[f'{kind}_bytes'])}"
        for kind in program_kinds
    )


def _prefill(rows: list[Row]) -> Table:
    """Return the times, memory and communication of prefill."""
    header = ["KV heads", "time", "compute", "memory", "network", "peak", "accessed", "collectives"]
    cells = []
    for v, n in rows:
        parts = ("prefill_seconds", "prefill_compute_seconds", "prefill_memory_seconds")
        times = [tables.seconds(n[part]) for part in (*parts, "prefill_network_seconds")]
        sizes = [tables.size(n[f"prefill_{x}_bytes"]) for x in ("peak", "accessed")]
        cells.append([str(v["num_kv_heads"]), *times, *sizes, _collectives(n, "prefill")])
    return header, cells


def _samples(rows: list[Row], batch: str) -> dict[int, float]:
    """Return chip-seconds per sample by KV heads."""
    return {v["num_kv_heads"]: n["sample_seconds"] for v, n in _with_batch(rows, batch)}


def _ratios(rows: list[Row]) -> Table:
    """Return how much faster the paper's converted networks are than MHA, published and here."""
    header = ["", "published", *TITLES.values()]
    cells: list[list[str]] = []
    for name, (parent, model, K) in CONVERTED.items():
        published = paper.TABLE1[parent][0] / paper.TABLE1[model][0]
        ours = [_samples(rows, batch) for batch in TITLES]

        # The paper's MHA has 64 heads.
        if all({K, 64} <= samples.keys() for samples in ours) and _published(rows[0][0]):
            cells.append([name, f"{published:.1f}x", *(f"{s[64] / s[K]:.1f}x" for s in ours)])
    return header, cells


def _verdict(rows: list[Row]) -> str:
    """Say whether these times show the paper's jump from 32 to 64 KV heads."""
    largest, equal = (_samples(rows, batch) for batch in (LARGEST, EQUAL))
    published = _published(rows[0][0])
    if not all({32, 64} <= samples.keys() for samples in (largest, equal, published)):
        return ""

    # MHA's batch is smaller where 64 heads do not fit; at equal batches only the cache differs.
    jump, equal_jump = largest[64] / largest[32], equal[64] / equal[32]
    published_jump = published[64] / published[32]
    batches = {v["num_kv_heads"]: v["batch_size"] for v, _ in _with_batch(rows, LARGEST)}
    answer = "explains" if jump > 0.8 * published_jump else "does not explain"
    return (
        f"The roofline {answer} the paper's jump from 32 to 64 KV heads: the time grows "
        f"{published_jump:.1f}x in the paper, here {jump:.2f}x with batches of {batches[32]} and "
        f"{batches[64]}, and {equal_jump:.2f}x at equal batches. Table 1's times "
        "are means over tasks of different lengths; the ratios here are at the lengths above."
    )


def _training(v: dict, n: dict) -> Section:
    """Return the table of one pretraining step."""
    settings = f"model={v['model']}, remat={v['remat']}, {v['num_microbatches']} microbatches"
    title = f"Training {v['size']} on {_slice(v)}: batch {v['batch_size']}, FSDP, {settings}"
    parts = ("seconds", "compute_seconds", "memory_seconds", "network_seconds")
    header = ["step", "compute", "memory", "network", "arguments", "temporary", "peak", "sent"]
    sizes = ("argument_bytes", "temporary_bytes", "peak_bytes", "sent_bytes")
    cells = [tables.seconds(n[f"train_{part}"]) for part in parts]
    cells += [tables.size(n[f"train_{size}"]) for size in sizes]
    cells.append(_collectives(n, "train"))
    return title, [*header, "collectives"], [cells]


def _figure(rows: list[Row], folder: Path) -> None:
    """Draw chip-seconds per sample against KV heads, beside the paper's."""
    figure = plot.Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (batch, title) in enumerate(TITLES.items()):
        if samples := _samples(rows, batch):
            axes.plot(
                list(samples.keys()),
                list(samples.values()),
                label=f"compiled: {title}",
                **plot.style(i),
            )
    if published := _published(rows[0][0]):
        axes.plot(
            list(published.keys()), list(published.values()), label="published", **plot.style(6)
        )
    plot.kv_heads_axis(axes)
    axes.set(ylabel="Chip-seconds a sample", ylim=(0, None))
    plot.tidy(axes)
    plot.legend_below(figure, axes)
    plot.save_all(figure, folder, "sample_seconds")
