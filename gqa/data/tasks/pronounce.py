"""Say a word in English, German or French; the input names the language."""

from gqa.data import lexicon

METRICS = ("word_accuracy", "phoneme_error_rate")
HEADLINE = "word_accuracy"
LENGTHS = (40, 40)
VOCABULARY = lexicon.VOCABULARY
BASELINE = ("letter_by_letter", lexicon.letter_by_letter)

vocabulary_texts = lexicon.vocabulary_texts
load, parts, fingerprint = lexicon.task("en", "de", "fr")
