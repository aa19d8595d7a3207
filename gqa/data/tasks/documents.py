"""The user's own pretraining text: plain text files, or a column of other ones; see `gqa.rows`."""

from gqa.data import user_files
from gqa.runtime.errors import UserError


def load(
    split: str, *, corpus=None, train: str = "", validation: str = "", column: str = "text"
) -> list[str]:
    """Documents of one split: rows of its files, which are paragraphs where they are plain text."""
    del corpus  # for the tasks that read it
    found = [_documents(entry, column)[0] for entry in _entries(split, train, validation)]
    return [document for part in found for document in part]


def parts(*, train: str, column: str, **options) -> list[tuple[list[str], float]]:
    """Training documents of each part of a mixture, with its weight."""
    del options
    return [
        (_documents(entry, column)[0], entry.weight) for entry in user_files.entries(train, "train")
    ]


def check(
    *, train: str = "", validation: str = "", column: str = "text"
) -> list[user_files.Report]:
    """Refuse wrong paths and what has many bad rows, by reading every file given.

    Returns what is left out.
    """
    reports = []
    for split in ("train", "validation"):
        for entry in _entries(split, train, validation):
            reports += _documents(entry, column)[1]
    return reports


def fingerprint(*, column: str, **options) -> list:
    """What the documents are made from, not where it lies, as JSON."""
    return [user_files.contents(options), column]


def _entries(split: str, train: str, validation: str) -> list[user_files.Entry]:
    names = {"train": train, "validation": validation}[split]
    if not names:
        raise UserError("task documents needs train=PATH and validation=PATH")
    return user_files.entries(names, split)


def _documents(entry: user_files.Entry, column: str):
    """Documents of an entry, and what was left out."""
    return user_files.collect(
        entry, user_files.needed(column), lambda row: user_files.text(row, column)
    )
