"""Pretraining text: docstrings and comments of the installed packages, one document per module."""

from gqa.data.corpus import Corpus


def load(split: str, *, corpus: Corpus) -> list[str]:
    """Return the documents of one split, in a fixed order."""
    return [row["text"] for row in corpus.rows("docstrings", split)]
