"""Translate English to German (WMT 2014)."""

from gqa import prepared
from gqa.tasks import Example

METRICS = ("bleu",)
HEADLINE = "bleu"
LENGTHS = (512, 256)
PREFIX = "translate English to German: "

load, check, fingerprint = prepared.task(
    "wmt14_translate/de-en", lambda row: Example(row["en"], (row["de"],)), PREFIX
)
