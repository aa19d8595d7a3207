"""Say a word in English, German or French; the input names the language."""

from gqa.data import lexicon

METRICS = ("word_accuracy", "phoneme_error_rate")
HEADLINE = "word_accuracy"
LENGTHS = (32, 32)

load, parts, fingerprint = lexicon.task("en", "de", "fr")
