"""Summarize an interview (MediaSum); each turn begins with its speaker."""

from gqa.data import tfds
from gqa.data.examples import Example

METRICS = ("rouge1", "rouge2", "rougeL")
HEADLINE = "rouge1"
LENGTHS = (2048, 512)
PREFIX = "summarize: "


def example(row: dict) -> Example:
    """Make an example whose inputs have a line for each turn; a row may lack speakers."""
    speakers = row["speaker"] or [""] * len(row["utt"])
    turns = zip(speakers, row["utt"], strict=False)
    text = "\n".join(f"{who}: {said}" if who else said for who, said in turns)
    return Example(text, (row["summary"],))


load, check, fingerprint = tfds.task("media_sum", example, PREFIX)
