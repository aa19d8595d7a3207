"""Translate English to German (WMT 2014)."""

from gqa.data import tfds
from gqa.data.examples import Example

METRICS = ("bleu",)
HEADLINE = "bleu"
LENGTHS = (512, 256)
PREFIX = "translate English to German: "

load, check, fingerprint = tfds.task(
    "wmt14_translate/de-en", lambda row: Example(row["en"], (row["de"],)), PREFIX
)
