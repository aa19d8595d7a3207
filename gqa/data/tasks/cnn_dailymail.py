"""Summarize a news article (CNN/Daily Mail)."""

from gqa.data import tfds
from gqa.data.examples import Example

METRICS = ("rouge1", "rouge2", "rougeL")
HEADLINE = "rouge1"
LENGTHS = (512, 256)
PREFIX = "summarize: "

load, check, fingerprint = tfds.task(
    "cnn_dailymail", lambda row: Example(row["article"], (row["highlights"],)), PREFIX
)
