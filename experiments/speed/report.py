"""Turn results.jsonl into speed.md and its figure: tables of a run's last speed benchmark."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.report import figures, tables
from experiments.speed import peers
from gqa.evaluation import results
from gqa.runtime import atomic_files
from gqa.runtime.errors import UserError

OURS, MACHINE = "gqa", "machine"
EQUAL, LARGEST = "equal", "largest"  # batches: the same for all, as many sequences as fit
PARTS = ("inference", "training")


class Row(NamedTuple):
    """One system at one shape: what its records say it is, and the records by metric."""

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
    """A number of every row and how it is written; `spread` adds its quartiles."""

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
NOTES = """Medians over turns [quartiles]; everything of a table took turns, and a ratio or a share
is that of numbers from the same turn. Time per token is that of a step of the whole batch. Prefill
is the encoder and every layer's cross-attention keys and values; for other libraries it is the time
to the first token. "Our tokens" is the share of our multi-head tokens that a library with the same
weights chooses, too. The floor is the time of reading the caches at the bandwidth of a large read,
and of the products with the weights at the slower of that and the rate of a large matrix product.
"Attention" is cross-attention alone, without its projections; caches smaller than the processor's
own can be read faster than memory. MFU is model FLOPs over the rate of a large matrix product."""


def run(results_path: str | os.PathLike, folder: str | os.PathLike, name: str) -> str:
    """Write speed.md, speed.png and speed.svg of the run `name`; return the tables as text."""
    records = [r for r in results.read(results_path) if r["run"] == name]
    rows = {part: _rows(_last(records, part)) for part in PARTS}
    if not any(rows.values()):
        raise UserError(f"{results_path}: no timings of {name}; run it without --stage=report")
    sections = [*_inference_sections(rows["inference"]), *_training_sections(rows["training"])]
    folder = Path(folder)
    lines = ["# Speed", QUESTION, NOTES]
    for title, header, cells in sections:
        lines += [f"## {title}", tables.markdown(header, cells)]
    if rows["inference"]:
        for suffix in ("png", "svg"):
            figures.time_by_groups(_lines(rows["inference"]), folder / f"speed.{suffix}")
        lines.append("![Time per sample against KV heads, ours and the paper's](speed.png)")
    lines.append(_provenance(records))
    atomic_files.write(folder / "speed.md", "\n\n".join(lines) + "\n")
    plain = [f"{title}\n\n{tables.plain(header, cells)}" for title, header, cells in sections]
    return "\n\n".join([*plain, f"report: {folder / 'speed.md'}"])


def _last(records: list[dict], part: str) -> list[dict]:
    """Return the records of a part's last measurement, which all have the same time."""
    of_part = [r for r in records if r["stage"] == part]
    return [r for r in of_part if r["time"] == of_part[-1]["time"]]


def _rows(records: list[dict]) -> list[Row]:
    rows: dict[str, Row] = {}
    for record in records:
        row = rows.setdefault(str(record["variant"]), Row(record["variant"], {}))
        row.numbers[record["metric"]] = record
    return list(rows.values())


def _inference_sections(rows: list[Row]) -> list[tuple]:
    sections = []
    for S in dict.fromkeys(row.variant["inputs_length"] for row in rows):
        here = [row for row in rows if row.variant["inputs_length"] == S]
        machine = next(row for row in here if row.variant["system"] == MACHINE)
        for batch in (EQUAL, LARGEST):
            shown = _of(here, batch)
            if not shown:
                continue
            v = shown[0].variant
            size = f"batch {v['batch_size']}" if batch == EQUAL else "the largest batch that fits"
            title = f"{v['size']}: {size}, {S} input and {v['targets_length']} output tokens"
            sections.append((title, *_table(shown, TIMES, with_batch=batch == LARGEST)))
            ours = [row for row in shown if row.variant["system"] == OURS]
            sections.append((f"What a step reads ({_ceilings(machine)})", *_table(ours, TRAFFIC)))
    return sections


def _training_sections(rows: list[Row]) -> list[tuple]:
    sections = []
    for size in dict.fromkeys(row.variant["size"] for row in rows):
        here = [row for row in rows if row.variant["size"] == size]
        machine = next(row for row in here if row.variant["system"] == MACHINE)
        v = here[0].variant
        shown = _of(here, EQUAL)
        shape = f"batch {shown[0].variant['batch_size']}, {v['inputs_length']} input and "
        title = f"Training {size}: {shape}{v['targets_length']} target tokens"
        sections.append((f"{title} ({_ceilings(machine)})", *_table(shown, TRAINING)))
    return sections


def _of(rows: list[Row], batch: str) -> list[Row]:
    """Return the rows of one kind of batch: ours first, then other libraries'."""
    found = [r for r in rows if r.variant["system"] != MACHINE and r.variant["batch"] == batch]
    return sorted(found, key=lambda row: row.variant["system"] != OURS)


def _table(
    rows: list[Row], columns: tuple[Column, ...], with_batch: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells; a column that no row has a number for is left out."""
    columns = [c for c in columns if any(c.metric in row.numbers for row in rows)]
    header = ["", *(["batch"] if with_batch else []), *(column.title for column in columns)]
    cells = [
        [
            row.label,
            *([str(row.variant["batch_size"])] if with_batch else []),
            *(_cell(row.numbers.get(column.metric), column) for column in columns),
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
    read, product = (machine.numbers[name] for name in ("read_bandwidth", "matmul_rate"))
    return (
        f"read {read['value'] / 1e9:.1f} [{read['low'] / 1e9:.1f}, {read['high'] / 1e9:.1f}] GB/s, "
        f"product {product['value'] / 1e9:.0f} [{product['low'] / 1e9:.0f}, "
        f"{product['high'] / 1e9:.0f}] GFLOP/s"
    )


def _lines(rows: list[Row]) -> dict[tuple[str, bool], list]:
    """Return the figure's lines: time per sample by KV heads, per system, length and batch."""
    lines: dict[tuple[str, bool], list] = {}
    for row in [*_of(rows, EQUAL), *_of(rows, LARGEST)]:
        label = f"{row.system}, input {row.variant['inputs_length']}"
        points = lines.setdefault((label, row.variant["batch"] == LARGEST), [])
        points.append((row.variant["num_kv_heads"], row.numbers["sample_seconds"]))
    return lines


def _provenance(records: list[dict]) -> str:
    lines = []
    for part in PARTS:
        if found := _last(records, part):
            r = found[-1]
            lines.append(f"- {part}: commit {r['commit']}, {r['device']}, {r['time']}")
    return "\n".join(lines)
