"""Summarize a news article (CNN/Daily Mail)."""

from gqa import prepared
from gqa.tasks import Example

METRICS = ("rouge1", "rouge2", "rougeL")
HEADLINE = "rouge1"
LENGTHS = (512, 256)
PREFIX = "summarize: "

load, check, fingerprint = prepared.task(
    "cnn_dailymail", lambda row: Example(row["article"], (row["highlights"],)), PREFIX
)
