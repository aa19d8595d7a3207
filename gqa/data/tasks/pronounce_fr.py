"""Say a word in French: its letters to its phonemes in IPA."""

from gqa.data import lexicon

METRICS = ("word_accuracy", "phoneme_error_rate")
HEADLINE = "word_accuracy"
LENGTHS = (32, 32)

load, parts, fingerprint = lexicon.task("fr")
