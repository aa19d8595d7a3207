"""The user's own examples: files with a source column and a target column.

A target may be a list of references. `gqa.data.user_files` finds the files and their columns,
`gqa.data.file_formats` reads them.
"""

from gqa.data import split_overlap, user_files
from gqa.data.examples import SPLITS, Example
from gqa.runtime.errors import UserError

METRICS = (
    "rouge1",
    "rouge2",
    "rougeL",
    "bleu",
    "exact_match",
    "f1",
    "word_accuracy",
    "phoneme_error_rate",
)
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
    """Return the examples of one split: `prefix` + `source` -> `target`.

    `source` is a column or a template such as "{question} context: {context}".
    """
    del corpus, metrics  # every task takes `corpus`; `metrics` is for `tasks.scoring`
    names = {"train": train, "validation": validation, "test": test}[split]
    if not names:
        raise UserError(f"task files needs {split}=PATH here")
    parts = [
        _examples(entry, source, target, prefix)[0] for entry in user_files.entries(names, split)
    ]
    return [example for part in parts for example in part]


def parts(*, source: str, target: str, train: str, prefix: str = "", **options):
    """Return the training examples of each part of a mixture, with its weight."""
    del options
    return [
        (_examples(entry, source, target, prefix)[0], entry.weight)
        for entry in user_files.entries(train, "train")
    ]


def check(*, source: str = "", target: str = "", metrics=METRICS, **options) -> list[str]:
    """Read every file; return lines about rows and files that are left out, and rows in two splits.

    Raises:
        UserError: for a wrong path, column or metric, a file with many bad rows, or a file that
            two splits name, or two splits with the same rows.
    """
    if not (source and target and options.get("train")):
        raise UserError("task files needs train=PATH and the columns source=NAME and target=NAME")
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"metrics={name!r} is unknown; choose from {', '.join(METRICS)}")

    lines: list[str] = []
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        names = options.get(split) or ""
        for entry in user_files.entries(names, split):
            examples, reports = _examples(entry, source, target, "")
            rows[split] += map(hash, examples)
            lines += [line for report in reports for line in report.lines()]
        lines += user_files.passed_over(names)
    if not options.get("validation"):
        raise UserError("task files needs validation=PATH to choose a checkpoint by")
    split_overlap.check_files(options)
    return lines + split_overlap.check_rows(rows)


def fingerprint(*, source: str, target: str, prefix: str, **options) -> list:
    """Return what determines the examples, as JSON: contents of the files, not their paths."""
    return [user_files.contents(options), source, target, prefix]


def _examples(entry: user_files.Entry, source: str, target: str, prefix: str):
    """Return the examples of an entry, and the reports of its bad rows."""

    def make(row: dict) -> Example:
        return Example(prefix + user_files.text(row, source), tuple(user_files.texts(row, target)))

    return user_files.collect(entry, user_files.needed(source, target), make)
