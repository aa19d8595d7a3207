"""Pronunciation lexicons of English, German and French: words and their phonemes in IPA.

The lexicons are SQLite files inside the PyPI packages gruut-lang-en, -de and -fr (MIT licence).
This file reads them and divides the words among the splits; the modules
`gqa.data.tasks.pronounce*` make examples of them. The packages are not imported: only the database
of an installed package is opened, read-only.

Saying a word that one has not seen, grapheme-to-phoneme conversion, is a standard task for
sequence-to-sequence models. It suits a small network: a few minutes of training on a CPU are enough
to say most words correctly.
"""

import functools
import importlib.metadata
import itertools
import pathlib
import sqlite3
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nltk.stem.snowball import SnowballStemmer

from gqa.data import tokenizer
from gqa.data.examples import SPLITS, Example
from gqa.runtime.errors import UserError

FORMAT = 2  # raise it when other examples, or another vocabulary, are made of the same lexicon

# Names of the languages by their code in the package's name.
LANGUAGES = {"en": "English", "de": "German", "fr": "French"}

# Of 100 stems, so many are held out for each split; all others are for training.
HELD_OUT = {"validation": 3, "test": 5}

# Words whose stems begin with the same letters, this many, stand on one side of the split.
STEM_LETTERS = 5

# A piece for each letter and for each phoneme. If frequent groups of letters were pieces too, as
# SentencePiece would make them, "wehr" and "mehr" would have different letters to the network.
VOCABULARY = tokenizer.Design(
    "bpe", 647, tuple(f"{name}:" for name in LANGUAGES.values()), coverage=1.0
)

# Primary and secondary stress. The literature on English removes them before training and scoring.
STRESS = str.maketrans("", "", "ˈˌ")


class Entry(NamedTuple):
    """A word, and its pronunciations: phonemes separated by spaces, the commonest first."""

    word: str
    pronunciations: tuple[str, ...]


def task(*languages: str) -> tuple[Callable, Callable, Callable]:
    """Return the functions `load`, `parts` and `fingerprint` of a task (see `gqa.data.tasks`).

    Several languages are a mixture: training draws equally from each, and the held-out splits take
    turns, so that their first examples are equally divided, too.

    Args:
        languages: codes such as "en", at least one.
    """

    def load(split: str, *, corpus=None) -> list[Example]:
        del corpus  # every task takes it

        # One word of each language in turn, as many as the smallest of their splits has.
        turns = zip(*(examples(language, split) for language in languages), strict=False)
        return list(itertools.chain.from_iterable(turns))

    def parts() -> list[tuple[list[Example], float]]:
        return [(examples(language, "train"), 1.0) for language in languages]

    def fingerprint() -> list:
        return [[FORMAT, language, _distribution(language).version] for language in languages]

    return load, parts, fingerprint


def examples(language: str, split: str) -> list[Example]:
    """Return the examples of one language, such as "English: guidance" -> "ɡ aɪ d ə n s".

    Every pronunciation of the word is a target.

    Args:
        language: "en", "de" or "fr".
        split: "train", "validation" or "test".

    Raises:
        UserError: if the package with the lexicon is not installed or its file is damaged.
    """
    name = LANGUAGES[language]
    return [
        Example(f"{name}: {entry.word}", entry.pronunciations) for entry in _splits(language)[split]
    ]


def vocabulary_texts(data: Sequence[Example]) -> list[str]:
    """Return words spelled letter by letter, and phonemes: every letter and phoneme is a word."""
    spelled = (f"{_language(example.inputs)} {' '.join(_word(example.inputs))}" for example in data)
    return [*spelled, *(target for example in data for target in example.targets)]


def letter_by_letter(train: Sequence[Example], inputs: Sequence[str]) -> list[str]:
    """Return what a word sounds like if each letter has the phoneme that it has most often.

    A baseline that needs no network. Words with as many phonemes as letters tell which phonemes a
    letter has; a letter that none of them holds is silent.

    Args:
        train: training examples.
        inputs: such as "English: guidance".
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        word, phonemes = _word(example.inputs), example.targets[0].split()
        if len(word) == len(phonemes):
            # The word and its phonemes are read side by side: "help" and "h ɛ l p".
            for letter, phoneme in zip(word, phonemes, strict=True):
                counts[letter][phoneme] += 1

    commonest = {letter: counter.most_common(1)[0][0] for letter, counter in counts.items()}
    return [
        " ".join(commonest[letter] for letter in _word(text) if letter in commonest)
        for text in inputs
    ]


def _language(inputs: str) -> str:
    return inputs.partition(" ")[0]


def _word(inputs: str) -> str:
    return inputs.rpartition(" ")[2]


@functools.cache
def entries(language: str) -> tuple[Entry, ...]:
    """Return the words of a lexicon, sorted, without names that hold a space, digit or hyphen.

    Raises:
        UserError: if the package with the lexicon is not installed or its file is damaged.
    """
    path = _database(language)
    query = "SELECT word, phonemes FROM word_phonemes ORDER BY word, pron_order, id"
    try:
        # An immutable database is read without a lock or a journal beside it.
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            rows = connection.execute(query).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UserError(
            f"lexicon {path}: {error}; reinstall it with "
            f"pip install --force-reinstall {_package(language)}"
        ) from error

    pronunciations = defaultdict(list)
    for word, phonemes in rows:
        # Apostrophes and hyphens join words ("l'appartement"), which the split would not notice.
        if word.isalpha():
            pronunciations[word].append(_normalised(phonemes, language))
    return tuple(Entry(word, tuple(dict.fromkeys(said))) for word, said in pronunciations.items())


def _normalised(phonemes: str, language: str) -> str:
    """Return the phonemes as the task has them: those of English without stress."""
    return phonemes.translate(STRESS) if language == "en" else phonemes


def split_of(stem: str) -> str:
    """Return the split of the words whose stems begin like `stem`.

    German "duplizierte" and "duplizierten" have one stem, so that a network which has seen one of
    them is not tested on the other.
    """
    # Of 100 buckets, 0 to 2 are for validation and 3 to 7 for test. A hash keeps a word's split
    # when a lexicon gains other words.
    bucket = zlib.crc32(stem[:STEM_LETTERS].encode()) % 100
    for split, size in HELD_OUT.items():
        if bucket < size:
            return split
        bucket -= size
    return "train"


@functools.cache
def _splits(language: str) -> dict[str, tuple[Entry, ...]]:
    """Return the entries of each split, in an order that has nothing to do with the alphabet."""
    stem = SnowballStemmer(LANGUAGES[language].lower()).stem
    splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in entries(language):
        splits[split_of(stem(entry.word))].append(entry)

    # The first examples of a split must be a fair sample of it, because an evaluation may take only
    # the first ones.
    for split in splits.values():
        split.sort(key=lambda entry: (zlib.crc32(entry.word.encode()), entry.word))
    return {split: tuple(members) for split, members in splits.items()}


def _package(language: str) -> str:
    return f"gruut-lang-{language}"


def _distribution(language: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(_package(language))
    except importlib.metadata.PackageNotFoundError as error:
        package = _package(language)
        raise UserError(
            f"the {LANGUAGES[language]} lexicon is not installed: pip install {package}"
        ) from error


def _database(language: str) -> pathlib.Path:
    """Return the path of the lexicon's SQLite file."""
    distribution = _distribution(language)
    path = pathlib.Path(str(distribution.locate_file(f"gruut_lang_{language}/lexicon.db")))
    if not path.is_file():
        raise UserError(
            f"lexicon {path}: not there; reinstall it with "
            f"pip install --force-reinstall {_package(language)}"
        )
    return path.resolve()
