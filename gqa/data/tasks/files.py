"""The user's own text: files with a source and a target column, see `gqa.rows` and `gqa.formats`.

A target may be a list of references.
"""

from gqa.data import user_files
from gqa.data.examples import SPLITS, Example
from gqa.runtime.errors import UserError

METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "exact_match", "f1")
HEADLINE = "rougeL"


def load(
    split: str,
    *,
    corpus=None,
    source: str,
    target: str,
    train: str = "",
    validation: str = "",
    test: str = "",
    prefix: str = "",
    metrics: tuple[str, ...] = METRICS,
) -> list[Example]:
    """Examples of one split from its files: `prefix` + `source` -> `target`.

    `source` is a column or a template such as "{question} context: {context}".
    """
    del corpus, metrics  # for the tasks that read the corpus; for whoever scores
    names = {"train": train, "validation": validation, "test": test}[split]
    if not names:
        raise UserError(f"task files needs {split}=PATH here")
    found = [
        _examples(entry, source, target, prefix)[0] for entry in user_files.entries(names, split)
    ]
    return [example for part in found for example in part]


def parts(*, source: str, target: str, train: str, prefix: str = "", **options):
    """Training examples of each part of a mixture, with its weight."""
    del options
    return [
        (_examples(entry, source, target, prefix)[0], entry.weight)
        for entry in user_files.entries(train, "train")
    ]


def check(
    *, source: str = "", target: str = "", metrics=METRICS, **options
) -> list[user_files.Report]:
    """Refuse wrong paths, columns or metrics and what has many bad rows; reads every file.

    Returns what is left out.
    """
    if not (source and target and options.get("train")):
        raise UserError("task files needs train=PATH and the columns source=NAME and target=NAME")
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"metrics={name!r} is unknown; choose from {', '.join(METRICS)}")
    reports = []
    for split in SPLITS:
        for entry in user_files.entries(options.get(split) or "", split):
            reports += _examples(entry, source, target, "")[1]
    if not options.get("validation"):
        raise UserError("task files needs validation=PATH to choose a checkpoint by")
    return reports


def fingerprint(*, source: str, target: str, prefix: str, **options) -> list:
    """What the examples are made from, not where it lies, as JSON."""
    return [user_files.contents(options), source, target, prefix]


def _examples(entry: user_files.Entry, source: str, target: str, prefix: str):
    """Examples of an entry, and what was left out."""

    def make(row: dict) -> Example:
        return Example(prefix + user_files.text(row, source), tuple(user_files.texts(row, target)))

    return user_files.collect(entry, user_files.needed(source, target), make)
