"""Say a word in English, German or French; the input names the language."""

from gqa.data import lexicon

METRICS = ("word_accuracy", "phoneme_error_rate")
HEADLINE = "word_accuracy"
LENGTHS = (32, 32)
BASELINE = ("letter_by_letter", lexicon.letter_by_letter)

load, parts, fingerprint = lexicon.task("en", "de", "fr")
