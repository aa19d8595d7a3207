"""Words and their phonemes: what is read, and that no stem stands on both sides of the split."""

import sqlite3
from types import SimpleNamespace

import pytest
from nltk.stem.snowball import SnowballStemmer

from gqa.data import lexicon, tasks, tokenizer
from gqa.data.examples import SPLITS, Example
from gqa.runtime.errors import UserError

ROWS = [
    ("tomato", 1, "t ə m ˈɑ t oʊ"),
    ("tomato", 0, "t ə m ˈeɪ t oʊ"),
    ("read", 0, "ɹ ˈi d"),
    ("read", 1, "ɹ ˈɛ d"),
    ("read", 2, "ɹ ˌi d"),
    ("a's", 0, "ˈeɪ z"),
    ("16e", 0, "s ɛ z j ɛ m"),
    ("abat-jour", 0, "a b a ʒ u ʁ"),
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small lexicon in the place of the installed packages."""
    path = tmp_path / "lexicon ä?#.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE word_phonemes (id INTEGER, word, pron_order, phonemes)")
        database.executemany(
            "INSERT INTO word_phonemes VALUES (?, ?, ?, ?)",
            [(i, *row) for i, row in enumerate(ROWS)],
        )
    database.close()
    distribution = SimpleNamespace(version="1.0", locate_file=lambda name: path)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: distribution)
    for function in (lexicon.entries, lexicon._splits):
        function.cache_clear()
    yield path
    for function in (lexicon.entries, lexicon._splits):
        function.cache_clear()


def test_pronunciations_are_in_order_and_those_of_english_without_stress(package):
    """ "read" keeps two: without stress marks, its third pronunciation is its first."""
    assert lexicon.entries("en") == (
        ("read", ("ɹ i d", "ɹ ɛ d")),
        ("tomato", ("t ə m eɪ t oʊ", "t ə m ɑ t oʊ")),
    )
    assert lexicon.entries("fr")[0].pronunciations == ("ɹ ˈi d", "ɹ ˈɛ d", "ɹ ˌi d")


def test_the_database_is_only_read(package):
    before = package.read_bytes(), sorted(package.parent.iterdir())
    package.chmod(0o400)
    lexicon.entries("de")
    assert (package.read_bytes(), sorted(package.parent.iterdir())) == before


def test_a_missing_or_damaged_lexicon_is_one_line(package):
    package.write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="not a database; reinstall it with pip install"):
        lexicon.entries("en")
    package.unlink()
    with pytest.raises(UserError, match="not there; reinstall it with pip install"):
        lexicon.entries("en")


def test_a_lexicon_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(lexicon, "_package", lambda language: "gruut-lang-none")
    with pytest.raises(UserError, match="English lexicon is not installed: pip install gruut-lang"):
        tasks.get("pronounce_en").fingerprint()


@pytest.mark.parametrize("language", lexicon.LANGUAGES)
def test_no_stem_is_in_two_splits(language):
    stem = SnowballStemmer(lexicon.LANGUAGES[language].lower()).stem
    splits = lexicon._splits(language)
    words = {split: {entry.word for entry in splits[split]} for split in SPLITS}
    stems = {split: set(map(stem, words[split])) for split in SPLITS}
    assert not stems["train"] & stems["test"]
    assert not stems["train"] & stems["validation"]
    assert not stems["validation"] & stems["test"]

    # Nothing is lost, and the held-out splits have their shares, of words and at the beginning.
    total = sum(map(len, words.values()))
    assert total == len(lexicon.entries(language)) == sum(map(len, splits.values()))
    assert 0.02 < len(words["validation"]) / total < 0.04
    assert 0.04 < len(words["test"]) / total < 0.07
    first = [entry.word[0] for entry in splits["test"][:200]]
    assert len(set(first)) > 15


def test_forms_of_one_stem_stand_together():
    sides = {
        lexicon.split_of(SnowballStemmer("german").stem(word))
        for word in ("duplizierte", "dupliziertem", "duplizierten", "dupliziert")
    }
    assert len(sides) == 1
    assert {lexicon.split_of(f"{i}") for i in range(1000)} == set(SPLITS)


def test_the_mixture_takes_turns_and_draws_equally():
    validation = tasks.get("pronounce").load("validation")
    assert [example.inputs.split(":")[0] for example in validation[:6]] == [
        "English",
        "German",
        "French",
        "English",
        "German",
        "French",
    ]
    parts = tasks.get("pronounce").parts()
    assert [weight for _, weight in parts] == [1.0, 1.0, 1.0]
    assert [part for part, _ in parts] == [
        tasks.get(f"pronounce_{language}").load("train") for language in ("en", "de", "fr")
    ]


def test_another_version_is_another_text(package, monkeypatch):
    before = tasks.get("pronounce").fingerprint()
    assert before != tasks.get("pronounce_en").fingerprint()
    newer = SimpleNamespace(version="2.0")
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: newer)
    assert tasks.get("pronounce").fingerprint() != before


def test_the_vocabulary_has_a_piece_for_each_letter_and_each_phoneme(tmp_path):
    """Other texts would make "er", "lich" or "▁Eng" pieces, which are frequent."""
    data = [example for code in lexicon.LANGUAGES for example in lexicon.examples(code, "test")]
    texts = tasks.vocabulary_texts("pronounce", data)
    vocabulary = tokenizer.train(texts, path=tmp_path / "m", **lexicon.VOCABULARY._asdict())
    for example in data:
        word = example.inputs.partition(" ")[2]
        assert len(vocabulary.encode(example.inputs)) == 1 + len(word)
        for target in example.targets:
            assert len(vocabulary.encode(target)) == len(target.split())


def test_letter_by_letter_says_the_commonest_phoneme_of_each_letter():
    train = [
        Example("English: on", ("ɑ n",)),
        Example("English: no", ("n oʊ",)),
        Example("English: to", ("t oʊ",)),
        Example("English: knee", ("n i",)),  # says nothing: two phonemes for four letters
    ]
    inputs = ["English: not", "English: knot"]
    assert lexicon.letter_by_letter(train, inputs) == ["n oʊ t", "n oʊ t"]
