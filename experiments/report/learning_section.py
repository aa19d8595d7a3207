"""What the models learned: beside trivial answers, from their inputs, and through conversion."""

import re

from experiments.report import tables
from experiments.report.summary import Summary
from experiments.report.tables import DASH
from experiments.report.variants_section import interval

SHOWN, LONGEST = 2, 240  # variants whose predictions are shown, and characters of a text
MARGIN = 0.01  # nats per token; a loss that is lower by less counts as the same
BASELINES = {"constant_answer": "best constant answer", "first_sentence": "first sentence"}
LOSSES = ("test_loss", "test_loss_other_input", "test_loss_unigram")


def baselines(summary: Summary) -> str:
    """Say what each task's model learned: beside trivial answers, and from its input."""
    header = ["variant", "score", *BASELINES.values(), "test loss"]
    header += ["other example's input", "margin", "unigram model", "margin"]
    parts = ["## What the models learned"] if summary.tasks else []
    for task in summary.tasks:
        rows, remarks = [], []
        for variant in summary.scored:
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
        interval(found["headline"]),
        interval(found["constant_answer"]),
        interval(found["first_sentence"]),
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


def scores(summary: Summary) -> str:
    """Tabulate every metric of every task, where there is more than the headline."""
    parts = []
    for task in summary.tasks:
        hidden = {"headline", "num_examples", *BASELINES, *LOSSES}
        metrics = [m for m in summary.metrics("evaluate", task) if m not in hidden]
        rows = [
            [summary.title(v), *[interval(summary.get(v, "evaluate", m, task)) for m in metrics]]
            for v in summary.scored
        ]
        if metrics:
            parts += [f"### {task}", tables.markdown(["variant", *metrics], rows)]
    return "\n\n".join(["## All scores, in percent", *parts]) if parts else ""


def predictions(summary: Summary) -> str:
    """Show the first test examples of each task, with what the first variants made of them."""
    parts = []
    for task in summary.tasks:
        found = {v: summary.predictions(v, task) for v in summary.scored}
        found = {v: records for v, records in found.items() if records}
        variants = list(found)[:SHOWN]
        if not variants:
            continue
        parts.append(f"### {task}")
        for i, row in enumerate(zip(*(found[v] for v in variants), strict=False), 1):
            texts = {"reference": row[0]["targets"][0]}
            texts |= {summary.title(v): r["prediction"] for v, r in zip(variants, row, strict=True)}
            lines = [f"{i}. input: {_cut(row[0]['inputs'])}"]
            lines += [f"    - {name}: {_cut(text)}" for name, text in texts.items()]
            parts.append("\n".join(lines))
    return "\n\n".join(["## Predictions", *parts]) if parts else ""


def _cut(text):
    """Fit a text into a line or two, with nothing in it that Markdown would take for its own."""
    text = " ".join(text.split())
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return re.sub(r"([\\`*_\[\]<>|!#&])", r"\\\1", text)


def conversion(summary: Summary) -> str:
    """Tabulate the losses of pretraining, conversion and uptraining."""
    header = ["variant", "pretrained MHA", "converted", "uptrained", "pretraining steps"]
    header += ["uptraining steps", "alpha"]
    rows = []
    for variant in summary.scored:
        start = variant.parent if variant.is_converted else variant.shape
        cells = [
            *map(_number, summary.losses(variant)),
            _number(summary.get(start, "pretrain", "steps"), digits=0),
            _number(summary.get(variant, "uptrain", "steps"), digits=0),
        ]
        if set(cells) != {DASH}:
            alpha = f"{variant.alpha:g}" if variant.is_converted or variant.alpha else DASH
            rows.append([summary.title(variant), *cells, alpha])
    if not rows:
        return ""
    parts = ["## Conversion and uptraining", tables.markdown(header, rows)]
    parts.append(
        "Validation loss of the pretraining task, in nats per token. A variant trained "
        "from scratch shows its own pretraining in the first column."
    )
    return "\n\n".join(parts)
