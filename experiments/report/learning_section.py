"""Report how well the models learned: beside trivial answers, from inputs, and by conversion."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.report import safe_text, tables
from experiments.report.estimate import Estimate
from experiments.report.summary import Summary
from experiments.report.tables import DASH
from experiments.report.variants_section import interval

SHOWN, LONGEST = 2, 240  # variants whose predictions are shown, and characters of a text
FEW = 3  # networks that a line names; more are counted
MARGIN = 0.01  # nats per token; a loss that is lower by less counts as the same
BASELINES = {
    "constant_answer": "best constant answer",
    "first_sentence": "first sentence",
    "letter_by_letter": "letter by letter",
}
LOSSES = ("test_loss", "test_loss_other_input", "test_loss_unigram")


def answers_without_a_network(summary: Summary) -> str:
    """Say which networks are not shown to be above an answer that needs no network.

    If every network is above, return the scores of these answers; if none was scored, nothing.
    """
    failures = [line for task in summary.tasks for line in _failures(summary, task)]
    if failures:
        return " ".join(failures)

    scores = []
    for name, title in BASELINES.items():
        known = [score for task in summary.tasks if (score := _trivial_score(summary, name, task))]
        if known:
            average = sum(score.value for score in known) / len(known)
            some = f" in {len(known)} of them" if len(known) < len(summary.tasks) else ""
            scores.append(f"{title} {average:.1f}{some}")
    over = f" (averages over {len(summary.tasks)} tasks)" if len(summary.tasks) > 1 else ""
    return f"Baselines without a network: {', '.join(scores)}{over}." if scores else ""


def _failures(summary: Summary, task: str) -> Iterator[str]:
    """Yield a sentence if some network is not shown to be above a trivial answer in this task."""
    trivial = {name: _trivial_score(summary, name, task) for name in BASELINES}
    below = {
        name: {v for v in summary.scored if _is_below(summary.headline(v, task), score)}
        for name, score in trivial.items()
    }
    failing = set().union(*below.values())
    if failing:
        titles = [summary.title(v) for v in summary.scored if v in failing]
        who = "; ".join(titles) if len(titles) <= FEW else f"{len(titles)} networks"
        answers = [
            f"{BASELINES[name]} {score.value:.1f}"
            for name, score in trivial.items()
            if score and below[name]
        ]
        yield f"{task}: not shown to be above the baselines ({', '.join(answers)}): {who}."


def _trivial_score(summary: Summary, name: str, task: str) -> Estimate | None:
    """Return the score of a trivial answer, which is the same beside every network."""
    found = (summary.get(v, "evaluate", name, task) for v in summary.scored)
    return next((score for score in found if score), None)


def baselines(summary: Summary) -> str:
    """Compare each task's models with trivial answers, and say whether they use their input."""
    parts = ["## What the models learned"] if summary.tasks else []
    for task in summary.tasks:
        # A task has the constant answer, and one more baseline that fits its inputs.
        recorded = summary.metrics("evaluate", task)
        names = [name for name in BASELINES if name in recorded]
        header = ["variant", "score", *(BASELINES[name] for name in names), "test loss"]
        header += ["loss, other input", "margin", "loss, unigram", "margin"]

        rows, remarks = [], []
        for variant in summary.scored:
            metrics = ("headline", *BASELINES, *LOSSES)
            estimates = {m: summary.get(variant, "evaluate", m, task) for m in metrics}

            # A variant that was not scored in this task would be a row of dashes.
            if any(estimates.values()):
                rows.append([summary.title(variant), *_baseline_cells(estimates, names)])
                name = safe_text.markdown(summary.title(variant))
                remarks += [f"- {name}: {remark}." for remark in _missing(estimates)]

        # Say that nothing is missing only where something was measured, never over dashes.
        if not remarks and any(cell != DASH for row in rows for cell in row[2:]):
            remarks = ["Every network does better than each of these, and uses its input."]
        parts += [
            f"### {safe_text.markdown(task)}",
            tables.markdown(header, rows),
            "\n".join(remarks),
        ]

    if parts:
        parts.append(
            "Scores in the unit of the main table. Losses and margins in nats per target token, "
            "on the test set: with the example's own input, with another example's, and of a "
            "unigram model of the training targets. A margin is that loss minus the model's own; "
            f"below {MARGIN} it counts as missing."
        )
    return "\n\n".join(parts)


def _baseline_cells(estimates, names):
    model, other_input, unigram = (estimates[name] for name in LOSSES)
    return [
        interval(estimates["headline"]),
        *(interval(estimates[name]) for name in names),
        _number(model),
        _number(other_input),
        _margin(other_input, model),
        _number(unigram),
        _margin(unigram, model),
    ]


def _number(estimate, digits=3):
    return f"{estimate.value:.{digits}f}" if estimate else DASH


def _margin(baseline, model):
    return f"{baseline.value - model.value:+.3f}" if baseline and model else DASH


def _missing(estimates):
    """Yield a sentence for each margin that the model does not have."""
    model, other_input, unigram = (estimates[name] for name in LOSSES)
    score = estimates["headline"]

    if model and other_input and other_input.value - model.value < MARGIN:
        yield "the loss is hardly lower with its own input than another's: the input is not used"
    if model and unigram and unigram.value - model.value < MARGIN:
        yield "the loss is hardly lower than the unigram model's, or higher"

    for name in BASELINES:
        if _is_below(score, estimates[name]):
            yield f"the score is not shown to be above that of the {BASELINES[name]}"


def _is_below(score: Estimate | None, trivial: Estimate | None) -> bool:
    """Return whether a score is not shown to be above that of a trivial answer."""
    # Compare the lower end of the interval, if there is one: a mean above may be chance.
    if score is None or trivial is None:
        return False
    return (score.value if score.low is None else score.low) <= trivial.value


def scores(summary: Summary) -> str:
    """Tabulate every metric of every task, where there is more than the headline."""
    parts = []
    for task in summary.tasks:
        # These stand in the main table and in "What the models learned" already.
        hidden = {"headline", "num_examples", *BASELINES, *LOSSES}
        metrics = [m for m in summary.metrics("evaluate", task) if m not in hidden]
        rows = [
            [summary.title(v), *[interval(summary.get(v, "evaluate", m, task)) for m in metrics]]
            for v in summary.scored
        ]
        if metrics:
            parts += [
                f"### {safe_text.markdown(task)}",
                tables.markdown(["variant", *metrics], rows),
            ]
    return "\n\n".join(["## All scores, in percent", *parts]) if parts else ""


def plain_scores(scored: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return the numbers of one network as a table in plain text.

    Args:
        scored: each record of an evaluation, with the name of its task before it.
    """
    rows = []
    for task, record in scored:
        if record["metric"] == "prediction":
            continue
        score = f"{record['value']:.2f}"
        if record.get("low") is not None:
            score += f" [{record['low']:.2f}, {record['high']:.2f}]"
        rows.append([task, record["metric"], score, record["unit"], str(record.get("n", DASH))])
    return tables.plain(["task", "metric", "score", "unit", "examples"], rows)


def predictions(summary: Summary) -> str:
    """Show the first test examples of each task, with what the first variants made of them."""
    parts = []
    for task in summary.tasks:
        records = {v: summary.predictions(v, task) for v in summary.scored}
        variants = [v for v in records if records[v]][:SHOWN]
        if not variants:
            continue

        parts.append(f"### {safe_text.markdown(task)}")

        # All variants were scored on the same examples, in the same order: a row is an example.
        for i, row in enumerate(zip(*(records[v] for v in variants), strict=False), 1):
            texts = {"reference": row[0]["targets"][0]}
            texts |= {summary.title(v): r["prediction"] for v, r in zip(variants, row, strict=True)}
            lines = [f"{i}. input: {_cut(row[0]['inputs'])}"]
            lines += [
                f"    - {safe_text.markdown(name)}: {_cut(text)}" for name, text in texts.items()
            ]
            parts.append("\n".join(lines))
    return "\n\n".join(["## Predictions", *parts]) if parts else ""


def _cut(text):
    """Cut a text to a line or two, and escape it."""
    text = " ".join(text.split())
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return safe_text.markdown(text)


def conversion(summary: Summary) -> str:
    """Tabulate the losses of pretraining, conversion and uptraining."""
    header = ["variant", "pretrained MHA", "converted", "uptrained", "pretraining steps"]
    header += ["uptraining steps", "alpha"]
    rows = []
    for variant in summary.scored:
        # A converted network was not pretrained itself, so its parent's steps are shown.
        start = variant.parent if variant.is_converted else variant.shape
        cells = [
            *map(_number, summary.losses(variant)),
            _number(summary.get(start, "pretrain", "steps"), digits=0),
            _number(summary.get(variant, "uptrain", "steps"), digits=0),
        ]
        if set(cells) != {DASH}:
            # A network trained from scratch has no alpha; the 0 that stands for it is not shown.
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
