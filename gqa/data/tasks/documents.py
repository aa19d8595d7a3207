"""The user's own pretraining text: plain text files, or one column of files in other formats.

`gqa.data.user_files` finds the files and their columns.
"""

from gqa.data import split_overlap, user_files
from gqa.runtime.errors import UserError


def load(
    split: str, *, corpus=None, train: str = "", validation: str = "", column: str = "text"
) -> list[str]:
    """Return the documents of one split: paragraphs of plain text, or rows of the other formats."""
    del corpus  # every task takes it
    parts = [_documents(entry, column)[0] for entry in _entries(split, train, validation)]
    return [document for part in parts for document in part]


def parts(*, train: str, column: str, **options) -> list[tuple[list[str], float]]:
    """Return the training documents of each part of a mixture, with its weight."""
    del options
    return [
        (_documents(entry, column)[0], entry.weight) for entry in user_files.entries(train, "train")
    ]


def check(*, train: str = "", validation: str = "", column: str = "text") -> list[str]:
    """Read every file; return lines about rows and files that are left out, and rows in two splits.

    Raises:
        UserError: for a wrong path or column, a file with many bad rows, a file that both splits
            name, or two splits with the same rows.
    """
    lines: list[str] = []
    rows: dict[str, list[int]] = {"train": [], "validation": []}

    # Every file is read before the job begins, because one found bad later would waste the work
    # done so far.
    for split in rows:
        for entry in _entries(split, train, validation):
            documents, reports = _documents(entry, column)
            rows[split] += map(hash, documents)
            lines += [line for report in reports for line in report.lines()]
    for names in (train, validation):
        lines += user_files.passed_over(names)
    split_overlap.check_files({"train": train, "validation": validation})
    return lines + split_overlap.check_rows(rows)


def fingerprint(*, column: str, **options) -> list:
    """Return what determines the documents, as JSON: contents of the files, not their paths."""
    return [user_files.contents(options), column]


def _entries(split: str, train: str, validation: str) -> list[user_files.Entry]:
    names = {"train": train, "validation": validation}[split]
    if not names:
        raise UserError("task documents needs train=PATH and validation=PATH")
    return user_files.entries(names, split)


def _documents(entry: user_files.Entry, column: str):
    """Return the documents of an entry, and the reports of its bad rows."""
    return user_files.collect(
        entry, user_files.needed(column), lambda row: user_files.text(row, column)
    )
