"""The report stage: results.jsonl -> report.md, two figures and the table for the terminal."""

import os
from pathlib import Path

from experiments import figures, paper, tables
from experiments.summary import Summary, differ
from experiments.tables import DASH
from gqa import results
from gqa.errors import UserError

STAGES = ("pretrain", "convert", "uptrain", "finetune", "evaluate", "benchmark")
MARGIN = 0.01  # nats per token; a loss that is lower by less counts as the same
NO_DIFFERENCE = "none shown"


def run(results_path: str | os.PathLike, folder: str | os.PathLike, within=1.0) -> str:
    """Write `report.md` and its figures into `folder`; return the main table as plain text."""
    records = [r for r in results.read(results_path) if r["stage"] in STAGES]
    if not records:
        raise UserError(f"{results_path}: no results yet; run a stage before the report")
    summary = Summary(records)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures.quality_against_time(summary, folder / "quality_time.png")
    loss_drawn = figures.pretraining_loss(summary, folder / "pretraining_loss.png")
    sections = [
        "# Grouped-query attention: quality against cost",
        _variants_section(summary),
        _figure_section(),
        _baselines_section(summary),
        _scores_section(summary),
        _conversion_section(summary, loss_drawn),
        _paper_section(),
        _provenance_section(summary, records),
    ]
    temporary = folder / "report.md.tmp"
    temporary.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "report.md")
    return tables.plain(*_variants_table(summary))


def _variants_section(summary):
    return "\n\n".join(
        [
            "## Variants",
            tables.markdown(*_variants_table(summary)),
            "In parentheses: against the MHA parent of the same size, as a ratio and in percent "
            "for cost, in points and in percent for quality. Brackets: 95% interval (bootstrap "
            "over test examples; with several seeds, the spread of their mean is added in "
            "quadrature). Prefill and time per token are those of a whole batch; time per sample "
            "is the batch's share. Every variant is timed in turn with its parent; if the parent "
            "was timed more than once, the variant's times are their ratio to the parent in "
            "their own run, times the parent's latest. "
            f'"{NO_DIFFERENCE}": the two intervals overlap, so this run shows no difference.',
            _sample_sizes(summary),
        ]
    )


def _variants_table(summary):
    """Return the header and rows of the main table."""
    tasks = summary.tasks if len(summary.tasks) < 2 else [*summary.tasks, "average"]
    costs = {
        "parameters": ("num_params", tables.count),
        "KV cache / sequence": ("kv_cache_bytes", tables.size),
        "time / token": ("token_seconds", tables.seconds),
        "prefill": ("prefill_seconds", tables.seconds),
        "time / sample": ("sample_seconds", tables.seconds),
    }
    titles = [_task_title(summary, task) for task in tasks]
    header = ["variant", "KV heads", *costs, *titles, "seeds"]
    rows = [
        [
            summary.title(variant),
            _kv_heads(variant),
            *[_cost(summary, variant, *cost) for cost in costs.values()],
            *[_quality(summary, variant, task) for task in tasks],
            _seeds(summary, variant),
        ]
        for variant in summary.variants
    ]
    return header, rows


def _kv_heads(variant):
    if variant.cross_num_kv_heads == variant.num_kv_heads:
        return str(variant.num_kv_heads)
    return f"self {variant.num_kv_heads}, cross {variant.cross_num_kv_heads}"


def _seeds(summary, variant):
    scores = [summary.get(variant, "evaluate", "headline", task) for task in summary.tasks]
    counts = sorted({score.seeds for score in scores if score})
    return "-".join(str(count) for count in counts) or DASH


def _task_title(summary, task):
    unit = next((s.unit for v in summary.variants if (s := _headline(summary, v, task))), "%")
    return f"{task} ({unit})"


def _headline(summary, variant, task):
    if task == "average":
        return summary.average(variant)
    return summary.get(variant, "evaluate", "headline", task)


def _cost(summary, variant, metric, form):
    """Return one cost with its ratio to the parent's: `256 KiB (0.50x, -50%)`."""
    own = summary.get(variant, "benchmark", metric)
    parent = summary.get(variant.parent, "benchmark", metric)
    if own is None:
        return DASH
    if parent is None or variant == variant.parent or not parent.value:
        return form(own.value)
    ratio = own.value / parent.value
    return f"{form(own.value)} ({ratio:.2f}x, {_percent(ratio - 1)})"


def _percent(change):
    return f"{round(100 * change):+d}%"


def _quality(summary, variant, task):
    """Return one score with its interval and what it shows against the parent's."""
    own = _headline(summary, variant, task)
    parent = _headline(summary, variant.parent, task)
    if own is None or parent is None or variant == variant.parent:
        return _interval(own)
    difference = own.value - parent.value
    relative = f", {_percent(difference / parent.value)}" if parent.value else ""
    shown = f"{difference:+.1f}{relative}" if differ(own, parent) else NO_DIFFERENCE
    return f"{_interval(own)} ({shown})"


def _interval(score):
    if score is None:
        return DASH
    if score.low is None:
        return f"{score.value:.1f}"
    return f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"


def _sample_sizes(summary):
    parts = []
    for task in summary.tasks:
        scores = [summary.get(v, "evaluate", "headline", task) for v in summary.variants]
        counts = sorted({s.n for s in scores if s and s.n})
        parts += [f"{task} {' or '.join(map(str, counts))}"] if counts else []
    return f"Test examples: {', '.join(parts)}." if parts else "No task has been evaluated yet."


def _figure_section():
    return "\n\n".join(
        [
            "![Quality against time per sample, ours and the paper's](quality_time.png)",
            "Vertical bars: 95% intervals. Horizontal bars: quartiles of the timings.",
        ]
    )


BASELINES = {"constant_answer": "best constant answer", "first_sentence": "first sentence"}
LOSSES = ("test_loss", "test_loss_other_input", "test_loss_unigram")


def _baselines_section(summary):
    """Say what each task's model learned: beside trivial answers, and from its input."""
    header = ["variant", "score", *BASELINES.values(), "test loss"]
    header += ["other example's input", "margin", "unigram model", "margin"]
    parts = ["## What the models learned"] if summary.tasks else []
    for task in summary.tasks:
        rows, remarks = [], []
        for variant in summary.variants:
            metrics = ("headline", *BASELINES, *LOSSES)
            found = {m: summary.get(variant, "evaluate", m, task) for m in metrics}
            if any(found.values()):
                rows.append([summary.title(variant), *_baseline_cells(found)])
                remarks += [f"- {summary.title(variant)}: {r}." for r in _missing(found)]
        if not remarks and any(cell != DASH for row in rows for cell in row[2:]):
            remarks = ["Every margin measured here is there."]
        parts += [f"### {task}", tables.markdown(header, rows), "\n".join(remarks)]
    if parts:
        parts.append(
            "Scores in the unit of the main table. Losses and margins in nats per target token, "
            "on the test set: with the example's own input, with another example's, and of a "
            "unigram model of the training targets. A margin is that loss minus the model's own; "
            f"below {MARGIN} it counts as missing."
        )
    return "\n\n".join(parts)


def _baseline_cells(found):
    own, other, unigram = (found[name] for name in LOSSES)
    return [
        _interval(found["headline"]),
        _interval(found["constant_answer"]),
        _interval(found["first_sentence"]),
        _number(own),
        _number(other),
        _margin(other, own),
        _number(unigram),
        _margin(unigram, own),
    ]


def _number(estimate, digits=3):
    return f"{estimate.value:.{digits}f}" if estimate else DASH


def _margin(baseline, own):
    return f"{baseline.value - own.value:+.3f}" if baseline and own else DASH


def _missing(found):
    """Yield a sentence for each margin that the model does not have."""
    own, score = found["test_loss"], found["headline"]
    if own and (other := found["test_loss_other_input"]) and other.value - own.value < MARGIN:
        yield "the loss is hardly lower with its own input than another's: the input is not used"
    if own and (unigram := found["test_loss_unigram"]) and unigram.value - own.value < MARGIN:
        yield "the loss is hardly lower than the unigram model's, or higher"
    for name in ("constant_answer", "first_sentence"):
        trivial = found[name]
        if score and trivial and (score.value if score.low is None else score.low) <= trivial.value:
            yield f"the score is not shown to be above that of the {BASELINES[name]}"


def _scores_section(summary):
    """Tabulate every metric of every task, where there is more than the headline."""
    parts = []
    for task in summary.tasks:
        hidden = {"headline", "num_examples", *BASELINES, *LOSSES}
        metrics = [m for m in summary.metrics("evaluate", task) if m not in hidden]
        rows = [
            [summary.title(v), *[_interval(summary.get(v, "evaluate", m, task)) for m in metrics]]
            for v in summary.variants
        ]
        if metrics:
            parts += [f"### {task}", tables.markdown(["variant", *metrics], rows)]
    return "\n\n".join(["## All scores, in percent", *parts]) if parts else ""


def _conversion_section(summary, drawn):
    header = ["variant", "pretrained MHA", "converted", "uptrained", "pretraining steps"]
    header += ["uptraining steps", "alpha"]
    rows = []
    for variant in summary.variants:
        converted = variant.method != "none"
        start = variant.parent if converted else variant
        cells = [
            _number(summary.get(start, "pretrain", "validation_loss")),
            _number(summary.get(variant, "convert", "validation_loss")),
            _number(summary.get(variant, "uptrain", "validation_loss")),
            _number(summary.get(start, "pretrain", "steps"), digits=0),
            _number(summary.get(variant, "uptrain", "steps"), digits=0),
        ]
        if set(cells) != {DASH}:
            alpha = f"{variant.alpha:g}" if converted or variant.alpha else DASH
            rows.append([summary.title(variant), *cells, alpha])
    if not rows:
        return ""
    parts = ["## Conversion and uptraining", tables.markdown(header, rows)]
    parts.append(
        "Validation loss of the pretraining task, in nats per token. A variant trained "
        "from scratch shows its own pretraining in the first column."
    )
    if drawn:
        parts.append("![Validation loss before and after conversion](pretraining_loss.png)")
    return "\n\n".join(parts)


def _paper_section():
    rows = []
    for model, values in paper.TABLE1.items():
        time, average, *tasks = f"{values[0]:.2f}", *(f"{value:.1f}" for value in values[1:])
        mark = " (*)" if abs(paper.recomputed_average(model) - values[1]) > 0.06 else ""
        rows.append([model, time, average + mark, *tasks])
    mean = paper.recomputed_average("MQA-XXL")
    return "\n\n".join(
        [
            "## The paper's Table 1 (published: T5-XXL on TPUv4)",
            tables.markdown(["model", *paper.COLUMNS], rows),
            "Ainslie et al. 2023, arXiv:2305.13245; development sets, seconds per sample and chip. "
            "Published numbers, not ours: other models, data and hardware, and not a target. "
            f"(*) The mean of the seven MQA-XXL columns is {mean:.2f}, not the printed 46.6; the "
            "other rows agree with theirs.",
        ]
    )


SETTINGS = ("batch_size", "inputs_length", "targets_length")


def _provenance_section(summary, records):
    header = ["run", "variant", "stages", "commit", "device", "last result (UTC)"]
    groups = {}
    for record in results.latest(records):
        key = record["run"], summary.variant_of(record), record["commit"], record["device"]
        groups.setdefault(key, []).append(record)
    rows = []
    for (name, variant, commit, device), group in groups.items():
        stages = ", ".join(dict.fromkeys(record["stage"] for record in group))
        last = max(record["time"] for record in group)
        rows.append([name, summary.title(variant), stages, commit, device, last])
    parts = ["## Provenance", tables.markdown(header, rows), _settings(summary)]
    for column, what in ((3, "commits"), (4, "devices")):
        if len({row[column] for row in rows}) > 1:
            parts.append(f"These numbers come from several {what}: compare across them with care.")
    return "\n\n".join(filter(None, parts))


def _settings(summary):
    """Say at which shapes the timings were taken."""
    lines = {}
    for variant in summary.variants:
        found = [summary.get(variant, "benchmark", name) for name in SETTINGS]
        if all(found):
            lines.setdefault(tuple(int(f.value) for f in found), []).append(variant)
    return "\n".join(
        f"- timed at batch {batch}, {inputs} input and {targets} target tokens: "
        + "; ".join(summary.title(variant) for variant in variants)
        for (batch, inputs, targets), variants in lines.items()
    )
