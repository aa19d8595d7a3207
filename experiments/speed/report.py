"""Write speed.md and its figure from results.jsonl: tables of a run's last speed benchmark.

`benchmark.py` measures and writes the records; experiments/report formats numbers and draws.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.report import figures, safe_text, tables
from experiments.speed import peers
from gqa.evaluation import results
from gqa.runtime import atomic_files
from gqa.runtime.errors import UserError

OURS, MACHINE = "gqa", "machine"
# Kinds of batches: the size that all systems have, and as many sequences as fit in memory.
EQUAL, LARGEST = "equal", "largest"
PARTS = ("inference", "training")


# A title, the cells of the header, and the cells of each row.
Section = tuple[str, list[str], list[list[str]]]


class Row(NamedTuple):
    """One system at one shape: the fields that identify it, and its records by metric."""

    variant: dict
    numbers: dict[str, dict]

    @property
    def system(self) -> str:
        """The system's name for readers."""
        return peers.TITLES.get(self.variant["system"], "ours")

    @property
    def label(self) -> str:
        """The row's name among rows of the same shape."""
        return f"{self.system}, {self.variant['num_kv_heads']} KV heads"


class Column(NamedTuple):
    """A column of a table: its metric and how a number is written; `spread` adds quartiles."""

    title: str
    metric: str
    form: Callable[[float], str]
    spread: bool = False


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB/s"


def _rate(value: float) -> str:
    return f"{value:,.0f}"


TIMES = (
    Column("prefill", "prefill_seconds", tables.seconds, spread=True),
    Column("prefill / HF encoder", "prefill_ratio_hugging_face_encoder", _ratio),
    Column("time / token", "token_seconds", tables.seconds, spread=True),
    Column("token / MHA", "token_ratio_mha", _ratio),
    *(Column(f"token / {t}", f"token_ratio_{name}", _ratio) for name, t in peers.TITLES.items()),
    Column("tokens/s", "tokens_per_second", _rate),
    Column("time / sample", "sample_seconds", tables.seconds),
    Column("sample / MHA", "sample_ratio_mha", _ratio),
    Column("our tokens", "same_tokens", _percent),
)
TRAFFIC = (
    Column("KV cache", "kv_cache_bytes", tables.size),
    Column("weights / step", "step_weight_bytes", tables.size),
    Column("self cache / step", "step_self_cache_bytes", tables.size),
    Column("cross cache / step", "step_cross_cache_bytes", tables.size),
    Column("step reads at", "step_bandwidth", _gigabytes),
    Column("of bandwidth", "step_bandwidth_share", _percent),
    Column("floor", "floor_seconds", tables.seconds),
    Column("floor / time", "floor_share", _percent, spread=True),
    Column("attention", "attention_seconds", tables.seconds),
    Column("attention reads at", "attention_bandwidth", _gigabytes),
    Column("of bandwidth", "attention_bandwidth_share", _percent, spread=True),
)
TRAINING = (
    Column("time / step", "step_seconds", tables.seconds, spread=True),
    Column("/ Hugging Face", f"step_ratio_{peers.HUGGING_FACE}", _ratio),
    Column("target tokens/s", "target_tokens_per_second", _rate),
    Column("MFU", "mfu", _percent, spread=True),
)
QUESTION = (
    "This page answers how fast generation and training are for each number of KV heads, beside "
    "other libraries and what the machine can do at most."
)
NOTES = """Numbers are medians over turns, with quartiles in brackets. All systems of a table took
turns, and a ratio or a share compares numbers from the same turn. Time per token is the time of one
step of the whole batch. Prefill is the encoder and every layer's cross-attention keys and values;
for other libraries it is the time to the first token. "Our tokens" is the share of our multi-head
network's tokens that a library with the same weights chooses too. The floor is the least time that
a step could take on this machine: the caches are read at the bandwidth of a large read, and the
products with the weights take the longer of reading the weights at that bandwidth and computing at
the rate of a large matrix product. "Attention" is cross-attention alone, without its projections;
KV caches that fit in the processor's cache can be read faster than memory. MFU is the model's
FLOP/s over the rate of a large matrix product."""


def run(
    results_path: str | os.PathLike, folder: str | os.PathLike, name: str, keys: dict[str, str]
) -> str:
    """Write speed.md, speed.png and speed.svg of a run; return the tables as text.

    Args:
        name: of the run, for messages.
        keys: the stage key of the records of each part; others have other settings.

    Raises:
        UserError: if the results have no timings of the run.
    """
    # The records of one measurement have one time; only the last measurement is reported.
    records = results.of_stages(results.read(results_path), keys.values())
    rows = {part: _rows([r for r in records if r["stage"] == part]) for part in PARTS}
    if not any(rows.values()):
        raise UserError(
            f"{results_path}: no timings of {name} with these settings; "
            "run it without --stage=report"
        )

    sections = [*_inference_sections(rows["inference"]), *_training_sections(rows["training"])]
    folder = Path(folder)
    lines = ["# Speed", QUESTION, NOTES]
    for title, header, cells in sections:
        lines += [f"## {safe_text.markdown(title)}", tables.markdown(header, cells)]

    # A run with --stage=training has nothing to draw.
    if rows["inference"]:
        for suffix in ("png", "svg"):
            figures.time_by_groups(_lines(rows["inference"]), folder / f"speed.{suffix}")
        lines.append("![Time per sample against KV heads, ours and the paper's](speed.png)")

    lines.append(_provenance(records))
    atomic_files.write(folder / "speed.md", safe_text.visible("\n\n".join(lines) + "\n"))

    plain = [f"{title}\n\n{tables.plain(header, cells)}" for title, header, cells in sections]
    return safe_text.visible("\n\n".join([*plain, f"report: {folder / 'speed.md'}"]))


def _rows(records: list[dict]) -> list[Row]:
    """Gather the records of each system at each shape into a row."""
    rows: dict[str, Row] = {}
    for record in records:
        # A variant is a dict, which cannot be a key, so its text is the key.
        row = rows.setdefault(str(record["variant"]), Row(record["variant"], {}))
        row.numbers[record["metric"]] = record
    return list(rows.values())


def _inference_sections(rows: list[Row]) -> list[Section]:
    """Return the tables of times and of traffic, for each input length and kind of batch."""
    sections = []
    for S in dict.fromkeys(row.variant["inputs_length"] for row in rows):
        length_rows = [row for row in rows if row.variant["inputs_length"] == S]
        machine = next(row for row in length_rows if row.variant["system"] == MACHINE)
        for batch in (EQUAL, LARGEST):
            # There are no rows of the largest batch if `benchmark.memory_gib` is 0.
            shown = _systems(length_rows, batch)
            if not shown:
                continue

            v = shown[0].variant
            size = f"batch {v['batch_size']}" if batch == EQUAL else "the largest batch that fits"
            title = f"{v['size']}: {size}, {S} input and {v['targets_length']} output tokens"
            sections.append((title, *_table(shown, TIMES, with_batch=batch == LARGEST)))

            # The traffic of other libraries is not known.
            ours = [row for row in shown if row.variant["system"] == OURS]
            sections.append((f"What a step reads ({_ceilings(machine)})", *_table(ours, TRAFFIC)))
    return sections


def _training_sections(rows: list[Row]) -> list[Section]:
    """Return the table of training, for each size of the network."""
    sections = []
    for size in dict.fromkeys(row.variant["size"] for row in rows):
        size_rows = [row for row in rows if row.variant["size"] == size]
        machine = next(row for row in size_rows if row.variant["system"] == MACHINE)
        shown = _systems(size_rows, EQUAL)
        v = shown[0].variant
        shape = f"batch {v['batch_size']}, {v['inputs_length']} input and "
        title = f"Training {size}: {shape}{v['targets_length']} target tokens"
        sections.append((f"{title} ({_ceilings(machine)})", *_table(shown, TRAINING)))
    return sections


def _systems(rows: list[Row], batch: str) -> list[Row]:
    """Return the rows of one kind of batch: our networks first, then other libraries."""
    systems = [r for r in rows if r.variant["system"] != MACHINE and r.variant["batch"] == batch]
    return sorted(systems, key=lambda row: row.variant["system"] != OURS)


def _table(
    rows: list[Row], columns: tuple[Column, ...], with_batch: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells, without the columns of which no row has a number."""
    # Without other libraries, say, the columns that compare with them would hold dashes alone.
    filled = [c for c in columns if any(c.metric in row.numbers for row in rows)]
    header = ["", *(["batch"] if with_batch else []), *(column.title for column in filled)]
    cells = [
        [
            row.label,
            *([str(row.variant["batch_size"])] if with_batch else []),
            *(_cell(row.numbers.get(column.metric), column) for column in filled),
        ]
        for row in rows
    ]
    return header, cells


def _cell(record: dict | None, column: Column) -> str:
    if record is None:
        return tables.DASH
    value = column.form(record["value"])
    if not column.spread:
        return value
    low, high = (column.form(record[name]) for name in ("low", "high"))
    return f"{value} [{low}, {high}]"


def _ceilings(machine: Row) -> str:
    """Return the machine's measured ceilings for a title, such as "read 14.1 [13.9, 14.2] GB/s"."""
    read, product = (machine.numbers[name] for name in ("read_bandwidth", "matmul_rate"))
    return (
        f"read {read['value'] / 1e9:.1f} [{read['low'] / 1e9:.1f}, {read['high'] / 1e9:.1f}] GB/s, "
        f"product {product['value'] / 1e9:.0f} [{product['low'] / 1e9:.0f}, "
        f"{product['high'] / 1e9:.0f}] GFLOP/s"
    )


def _lines(rows: list[Row]) -> dict[tuple[str, bool], list]:
    """Return the figure's lines: time per sample by KV heads, per system, length and batch."""
    lines: dict[tuple[str, bool], list] = {}
    for row in [*_systems(rows, EQUAL), *_systems(rows, LARGEST)]:
        label = f"{row.system}, input {row.variant['inputs_length']}"
        points = lines.setdefault((label, row.variant["batch"] == LARGEST), [])
        points.append((row.variant["num_kv_heads"], row.numbers["sample_seconds"]))
    return lines


def _provenance(records: list[dict]) -> str:
    """Return the commit, the machine and the time of each part's measurement."""
    lines = []
    for part in PARTS:
        if part_records := [record for record in records if record["stage"] == part]:
            # All records of a part were measured together, so the last one stands for them.
            r = part_records[-1]
            origin = f"commit {r['commit']}, {r['device']}, {r['time']}"
            lines.append(f"- {part}: {safe_text.markdown(origin)}")
    return "\n".join(lines)
