"""Write a function's summary line from its source without the docstring."""

from gqa.data.corpus import Corpus
from gqa.data.examples import Example

METRICS = ("rouge1", "rouge2", "rougeL")
HEADLINE = "rougeL"
PREFIX = "summarize code: "


def load(split: str, *, corpus: Corpus) -> list[Example]:
    """Return function sources of one split with their summary lines."""
    rows = corpus.rows("code_summary", split)
    return [Example(PREFIX + row["source"], (row["summary"],)) for row in rows]
