"""Metrics of texts in every script, and the official values of exact match and F1."""

import re
import string
from collections import Counter

import pytest
import sacrebleu

from gqa.evaluation import metrics

SENTENCES = {
    "Russian": "Столица Франции находится на берегу реки Сены",
    "Greek": "Η πρωτεύουσα της Γαλλίας είναι το Παρίσι",
    "Hindi": "फ्रांस की राजधानी पेरिस है",
    "Arabic": "عاصمة فرنسا هي باريس على نهر السين",
    "Hebrew": "בירת צרפת היא פריז",
    "Korean": "프랑스의 수도는 센 강변에 있는 파리입니다",
    "Thai": "เมืองหลวงของฝรั่งเศสคือปารีส",
    "Chinese": "法国的首都是巴黎位于塞纳河畔",
    "Japanese": "フランスの首都はパリです",
    "German": "Die Wörter ähneln sich für Übungen",
}
ROUGE = ("rouge1", "rouge2", "rougeL")


@pytest.mark.parametrize("name", [*ROUGE, "f1", "exact_match", "bleu"])
@pytest.mark.parametrize("language", SENTENCES)
def test_a_perfect_answer_is_100_and_an_empty_one_0(language, name):
    text = SENTENCES[language]
    assert metrics.score(name, [text], [[text]]).value == pytest.approx(100)
    assert metrics.score(name, [""], [[text]]).value == 0


@pytest.mark.parametrize("name", ["rouge1", "f1", "bleu"])
@pytest.mark.parametrize("language", ["Chinese", "Japanese", "Thai"])
def test_one_wrong_character_of_an_unspaced_script_costs_a_part(language, name):
    text = SENTENCES[language]
    value = metrics.score(name, [text[:-1] + "x"], [[text]]).value
    assert 50 < value < 100


def test_letters_beyond_ascii_are_part_of_their_word():
    assert metrics.score("rouge1", ["ähnlich"], [["öhnlich"]]).value == 0
    assert metrics.score("rouge1", ["café crème"], [["cafe creme"]]).value == 0
    assert metrics.score("rouge1", ["हिन्दी"], [["हनद"]]).value == 0


def test_bleu_of_chinese_is_sacrebleus():
    predictions = ["法国的首都是巴黎。", "我喜欢在早上喝咖啡。"]
    references = ["法国首都是巴黎。", "我早上喜欢喝咖啡。"]
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score
    assert expected > 10
    value = metrics.score("bleu", predictions, [[r] for r in references]).value
    assert value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predictions", "references", "order"),
    [
        (["yes", "no"], [["yes"], ["no"]], 1),
        (["in Paris", "never"], [["in Paris"], ["in Rome", "never"]], 2),
        (["in Rome", "yes"], [["in Paris"], ["never"]], 2),
        (["yes yes yes yes yes"], [["yes"]], 1),
        (["巴黎", "北京"], [["巴黎"], ["东京"]], 2),
        # One reference of 4 tokens is enough for the usual BLEU, which is 0 without any 4-gram.
        (["yes", "a b c"], [["yes"], ["a b c d"]], 4),
    ],
)
def test_bleu_counts_ngrams_up_to_the_longest_reference(predictions, references, order):
    """sacreBLEU's default of 4 would give perfect answers of fewer tokens 0."""
    tokenize = "zh" if "巴黎" in predictions else "13a"
    most = max(map(len, references))
    padded = [[texts[min(i, len(texts) - 1)] for texts in references] for i in range(most)]
    bleu = sacrebleu.BLEU(max_ngram_order=order, tokenize=tokenize)
    expected = bleu.corpus_score(predictions, padded).score
    assert metrics.score("bleu", predictions, references).value == pytest.approx(expected)
    if all(p in texts for p, texts in zip(predictions, references, strict=True)):
        assert expected == pytest.approx(100)

    note = metrics.note("bleu", references)
    assert (f"n-grams of at most {order} " in note) == (order < 4)


@pytest.mark.parametrize("gold", ["A", "the!", "An", "?", "The"])
@pytest.mark.parametrize("name", ["f1", "exact_match"])
def test_a_gold_answer_of_articles_and_punctuation_is_no_empty_answer(name, gold):
    assert metrics.score(name, [""], [[gold]]).value == 0
    assert metrics.score(name, ["Paris"], [[gold]]).value == 0
    assert metrics.score(name, [gold], [[gold]]).value == 100


PREDICTIONS = [
    "The Eiffel Tower, in Paris",
    "`42'",
    "an apple_pie",
    "a well-known man",
    "No idea",
    "",
]
GOLDS = ["Eiffel tower", "42", "apple pie", "well known", "The Louvre", "Mona Lisa"]


def triviaqa(text):
    """The normalization of TriviaQA's evaluation, written from its description."""
    text = text.replace("_", " ").lower()
    for mark in string.punctuation + "‘’´`":
        text = text.replace(mark, " ")
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad(text):
    """The normalization of SQuAD's evaluation: punctuation is deleted."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gold", GOLDS)
def test_exact_match_and_f1_are_the_official_ones(prediction, gold):
    """Of TriviaQA always, of SQuAD where no punctuation stands inside a word."""

    def official(normalize):
        words, expected = normalize(prediction), normalize(gold)
        same = sum((Counter(words) & Counter(expected)).values())
        f1 = 2 * same / (len(words) + len(expected)) if same else 0
        return 100 * (words == expected), 100 * f1

    ours = [metrics.score(name, [prediction], [[gold]]).value for name in ("exact_match", "f1")]
    assert ours == pytest.approx(official(triviaqa))
    if "-" not in prediction and "_" not in prediction:
        assert ours == pytest.approx(official(squad))


def test_a_note_says_how_a_script_is_treated():
    chinese, russian = [[SENTENCES["Chinese"]]], [[SENTENCES["Russian"]]]
    assert metrics.note("bleu", chinese) == (
        "bleu: each character is a word, as in sacreBLEU's tokenizer zh"
    )
    assert metrics.note("rougeL", chinese) == "rougeL: each character is a word"
    assert "not stemmed" in metrics.note("rougeL", russian)
    assert metrics.note("bleu", russian) == ""
    assert all(metrics.note(name, [[SENTENCES["German"]]]) == "" for name in metrics.METRICS)


def test_word_accuracy_compares_tokens_as_they_are():
    values = [
        metrics.score("word_accuracy", [text], [["a b", "a  c"]]).value
        for text in ("a b", " a   c", "A b", "a b c", "ab")
    ]
    assert values == [100, 100, 0, 0, 0]


def test_phoneme_error_rate_is_edits_over_the_length_of_the_nearest_reference():
    """Two edits for the four phonemes of the first word's reference, none for the second word."""
    predictions, references = ["t ə m oʊ", "a"], [["t ə m eɪ", "x y"], ["b b", "a"]]
    value = metrics.score("phoneme_error_rate", predictions, references).value
    assert value == pytest.approx(100 * 1 / 5)
    assert metrics.score("phoneme_error_rate", ["x y z"], [["a"]]).value == 300


def test_a_perfect_answer_of_signs_alone_is_100():
    for name in ("rouge1", "rougeL"):
        assert metrics.score(name, ["\U0001f600 \u2192"], [["\U0001f600\u2192"]]).value == 100
        assert metrics.score(name, ["\U0001f600"], [["\u2192"]]).value == 0


def test_the_first_sentence_ends_at_the_stop_of_its_script():
    texts = [
        "यह एक है। यह दो है।",
        "هل هذا؟ نعم.",
        "یہ ایک ہے۔ دو",
        "好！真好。",
        "አንድ። ሁለት",
        "1.5 m. No",
    ]
    expected = ["यह एक है।", "هل هذا؟", "یہ ایک ہے۔", "好！", "አንድ።", "1.5 m."]
    assert metrics.first_sentence(texts) == expected
