"""Write a docstring's summary line from the rest of it."""

from gqa.data.corpus import Corpus
from gqa.data.examples import Example

METRICS = ("rouge1", "rouge2", "rougeL")
HEADLINE = "rougeL"
PREFIX = "summarize: "


def load(split: str, *, corpus: Corpus) -> list[Example]:
    """Return docstring bodies of one split with their summary lines."""
    rows = corpus.rows("docstring_summary", split)
    return [Example(PREFIX + row["source"], (row["summary"],)) for row in rows]
