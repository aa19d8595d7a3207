"""The report stage: turn results.jsonl into report.md, report.html, figures and a terminal text.

This file puts sections and figures in order. The numbers come from `summary`, which averages over
seeds with `estimate`; each section is a module (`how_many_heads`, `variants_section`,
`learning_section`, `conversion_section`, `stability_section`), and the figures are in `figures*`.
"""

import os
from collections.abc import Collection
from pathlib import Path

from experiments.report import (
    conversion_section,
    ending,
    figures,
    figures_conversion,
    figures_sweep,
    headline,
    how_many_heads,
    html_page,
    learning_section,
    paper,
    plot,
    safe_text,
    stability_section,
    tables,
    variants_section,
)
from experiments.report.summary import Summary, check_variant, variant_of
from gqa.evaluation import results
from gqa.runtime import atomic_files
from gqa.runtime.errors import UserError

STAGES = ("pretrain", "convert", "uptrain", "finetune", "evaluate", "benchmark")
TITLE = "Grouped-query attention: quality against cost"
QUESTION = (
    "The rest of this page says in more detail how much time and memory a network with fewer KV "
    "heads saves against multi-head attention (MHA), and how much quality it loses."
)


def run(
    results_path: str | os.PathLike,
    folder: str | os.PathLike,
    keys: Collection[str],
    within: float = 1.0,
) -> str:
    """Write `report.md`, `report.html` and the figures into `folder`.

    Args:
        keys: of the stages that the report is made of. The results file may hold the results of
            other commands too, on other data or with other settings, which compare with nothing.
        within: how many points of the average score below multi-head attention are acceptable.

    Returns the text for the terminal (`ending`).
    """
    records = _read(results_path, keys)
    summary, folder = Summary(records), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    drawn = _draw(summary, folder, headline.shown(summary, within, plot.LINES))
    sections = [
        f"# {TITLE}",
        *_opening(summary, within),
        how_many_heads.markdown(summary, within),
        variants_section.section(summary),
        *(f"![{ALT[name]}]({name}.png)\n\n{CAPTIONS[name]}" for name in drawn),
        learning_section.baselines(summary),
        learning_section.scores(summary),
        learning_section.predictions(summary),
        learning_section.conversion(summary),
        conversion_section.section(summary),
        stability_section.section(summary),
        _paper_section(),
        _provenance_section(summary, records),
    ]

    # Sections without results are empty texts, which are left out.
    text = safe_text.visible("\n\n".join(filter(None, sections)) + "\n")

    # The page is one file: it holds the SVG of every PNG that the Markdown names.
    pictures = {f"{name}.png": (folder / f"{name}.svg").read_bytes() for name in drawn}

    atomic_files.write(folder / "report.md", text)
    atomic_files.write(folder / "report.html", html_page.page(TITLE, text, pictures))

    return ending.text(summary, within, Path(results_path).parent, folder)


def _opening(summary, within):
    """Return what a reader should see first: the answer, its table, and how to read it."""
    return [
        safe_text.markdown(headline.sentence(summary, within)),
        safe_text.markdown(learning_section.answers_without_a_network(summary)),
        tables.markdown(*headline.table(summary, within)),
        safe_text.markdown(headline.note(summary, within)),
        QUESTION,
    ]


def _read(results_path, keys):
    """Read the records of the stages with these keys."""
    others = dict.fromkeys(("keyed", "without a key"), 0)

    def wanted(record):
        if record["stage"] not in STAGES:
            return False

        # Only records that are kept are checked, so that another command's damaged variant does no
        # harm.
        if record["stage_key"] in keys:
            check_variant(record)
            return True

        # Count what is left out, so that an empty report can be explained.
        others["keyed" if record["stage_key"] else "without a key"] += 1
        return False

    records = results.of_stages(results.read(results_path, wanted), keys)

    if others["without a key"]:
        print(
            f"{results_path}: {others['without a key']} records of an older version name no stage "
            "and are left out; run the command again, which adds the results of finished stages"
        )

    if not records:
        message = f"{results_path}: no results of this command yet"
        if others["keyed"]:
            message += ", only of commands with other settings or data"
        raise UserError(f"{message}; run it without --stage=report")
    return records


def _draw(summary, folder, shown):
    """Draw each figure whose numbers the results have; return the names of the figures drawn."""
    names = [
        figures.quality_against_time(summary, folder, shown),
        figures_sweep.by_groups(summary, folder),
        figures_sweep.by_alpha(summary, folder),
        figures_conversion.by_alpha(summary, folder),
        figures_conversion.by_saving(summary, folder),
        figures_conversion.by_heads(summary, folder),
        figures_conversion.by_calibration(summary, folder),
        figures_sweep.by_method(summary, folder),
        figures.pretraining_loss(summary, folder, shown),
        figures.learning_curves(summary, folder, shown),
    ]
    return [name for name in names if name]


ALT = {
    "quality_time": "Quality against time per sample, ours and the paper's",
    "groups": "Time, score and loss against KV heads, ours and the paper's",
    "alpha": "Score against alpha, ours and the paper's",
    "alpha_loss": "Validation loss against alpha",
    "damage": "Loss above the parent's against KV heads",
    "saved": "Alpha that reaches the mean's loss of alpha 0.05",
    "calibration": "Loss above the parent's against calibration tokens",
    "methods": "Score by conversion method, ours and the paper's",
    "pretraining_loss": "Validation loss before and after conversion",
    "learning_curves": "Validation loss against steps",
}
SCORE_BARS = "Bars: 95% intervals of each score, wider than those of the differences between them."
TABLES = "Of many methods, the paper's and the best of others are drawn; the tables have all."
SEED_BARS = "Bars: 95% intervals over seeds, where there are several."
CAPTIONS = {
    "quality_time": "As the paper's Figure 3. Vertical bars: 95% intervals. Horizontal bars: "
    "quartiles of the timings.",
    "groups": "As the paper's Figure 6, with quality beside it. Every line of scores and losses "
    "begins at the MHA parent, which is not uptrained. Bars: 95% intervals; of times, quartiles.",
    "alpha": f"As the paper's Figure 5. Alpha 0 is converted, then fine-tuned. {SCORE_BARS}",
    "alpha_loss": "Validation loss of the pretraining task, of the converted (alpha 0) and the "
    "uptrained networks; below, how far it is above that of the parent, trained on as long. "
    f"{TABLES} {SEED_BARS}",
    "damage": f"What conversion alone does to the validation loss. {TABLES} {SEED_BARS}",
    "saved": f"Interpolated between the measured alphas, for every seed alone. {SEED_BARS}",
    "calibration": f"What conversion alone does to the validation loss. {SEED_BARS}",
    "methods": f"As the paper's Figure 4, whose points are T5-Large's at alpha 0.05. {SCORE_BARS}",
    "pretraining_loss": f"Validation loss of the pretraining task. {SEED_BARS}",
    "learning_curves": f"Validation loss while training. {SEED_BARS}",
}


def _paper_section():
    rows = []
    for model, values in paper.TABLE1.items():
        time, average, *tasks = f"{values[0]:.2f}", *(f"{value:.1f}" for value in values[1:])

        # Columns and averages are printed to one decimal. Rounding explains a difference of some
        # 0.05, but not the 0.16 of MQA-XXL.
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
NAMED = 6  # a run with more variants than this has them counted, not named


def _provenance_section(summary, records):
    header = ["run", "variants", "stages", "commit", "device", "last result (UTC)"]

    # One row for each run, commit and device. Only the latest record of a number counts in the
    # report, so only its origin is listed.
    groups: dict = {}
    for record in results.latest(records):
        title = _title(summary, record)
        key = record["run"], record["commit"], record["device"]
        groups.setdefault(key, {}).setdefault(title, []).append(record)
    rows = []
    for (name, commit, device), by_title in groups.items():
        group = [record for same_title in by_title.values() for record in same_title]
        stages = ", ".join(dict.fromkeys(record["stage"] for record in group))
        titles = "; ".join(by_title) if len(by_title) <= NAMED else f"{len(by_title)} of them"
        rows.append([name, titles, stages, commit, device, max(r["time"] for r in group)])

    parts = ["## Provenance", tables.markdown(header, rows), _settings(summary)]
    for column, plural in ((3, "commits"), (4, "devices")):
        if len({row[column] for row in rows}) > 1:
            parts.append(
                f"These numbers come from several {plural}: compare across them with care."
            )
    return "\n\n".join(filter(None, parts))


def _title(summary, record):
    """Name what a record measured. Timings belong to a network's shape, not to its weights."""
    variant = variant_of(record)
    if record["stage"] == "benchmark":
        return summary.sized(variant.network, variant)
    return summary.title(variant)


def _settings(summary):
    """List the batch size and lengths of the timings, with the networks that were timed so."""
    lines: dict = {}
    for variant in summary.variants:
        shape = [summary.get(variant, "benchmark", name) for name in SETTINGS]
        if all(shape):
            # Each network once, in order: a dict serves as an ordered set.
            networks = lines.setdefault(tuple(int(size.value) for size in shape), {})
            networks[summary.sized(variant.network, variant)] = None
    return "\n".join(
        f"- timed at batch {batch}, {inputs} input and {targets} target tokens: "
        + safe_text.markdown("; ".join(networks))
        for (batch, inputs, targets), networks in lines.items()
    )
