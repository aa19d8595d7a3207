"""Summarize several news articles on one event (Multi-News); ||||| stands between them."""

from gqa.data import tfds
from gqa.data.examples import Example

METRICS = ("rouge1", "rouge2", "rougeL")
HEADLINE = "rouge1"
LENGTHS = (2048, 512)
PREFIX = "summarize: "

load, check, fingerprint = tfds.task(
    "multi_news", lambda row: Example(row["document"], (row["summary"],)), PREFIX
)
