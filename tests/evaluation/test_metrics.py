"""Metrics agree with the libraries and definitions they stand for, and intervals cover."""

import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from gqa.evaluation import metrics
from gqa.runtime.errors import UserError

PREDICTIONS = [
    "The cats were sitting on the mat in the kitchen",
    "a number of heads of the decoder",
    "",
    "the shape of the returned array, as integers",
]
REFERENCES = [
    ["A cat sat on the mat", "The cat sits on the mat in a kitchen"],
    ["the number of heads in the decoder"],
    ["whether to shuffle"],
    ["size of an array", "the shape of the returned array", "shape"],
]


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_best_reference_by_f_measure(name):
    scorer = RougeScorer([name], use_stemmer=True)
    best = [
        max(scorer.score(reference, text)[name].fmeasure for reference in references)
        for text, references in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    assert metrics.score(name, PREDICTIONS, REFERENCES).value == pytest.approx(100 * np.mean(best))


def test_bleu_is_sacrebleu_with_unequal_numbers_of_references():
    streams = [[r[i] if i < len(r) else None for r in REFERENCES] for i in range(3)]
    expected = sacrebleu.corpus_bleu(PREDICTIONS, streams).score
    assert expected > 10
    few_matches = ["the cat", "a mat of the array"], [["the cat sat"], ["the mat of array"]]
    smoothed = sacrebleu.corpus_bleu(few_matches[0], [["the cat sat", "the mat of array"]]).score
    assert smoothed > 0
    assert metrics.score("bleu", *few_matches).value == pytest.approx(smoothed)
    assert metrics.score("bleu", PREDICTIONS, REFERENCES).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "reference", "exact", "f1"),
    [
        ("The Beatles!", "beatles", 100, 100),
        ("a well-known theory", "well known", 0, 80),
        ("red green", "blue", 0, 0),
        ("green red", "red green", 0, 100),
        ("red red red", "red", 0, 50),
        ("red red", "red red red", 0, 80),  # two words of 2 and of 3 are shared, not one
        ("red red blue", "red blue blue", 0, 200 / 3),
        ("the", "", 0, 0),
        ("red", "", 0, 0),
        ("theatre", "atre", 0, 0),
    ],
)
def test_exact_match_and_f1(text, reference, exact, f1):
    assert metrics.score("exact_match", [text], [[reference]]).value == exact
    assert metrics.score("f1", [text], [["nothing alike", reference]]).value == pytest.approx(f1)


def test_interval_is_that_of_a_proportion():
    references = [["yes" if i % 4 else "no"] for i in range(400)]
    value, low, high, n, _ = metrics.score("exact_match", ["yes"] * 400, references)
    half = 196 * np.sqrt(0.75 * 0.25 / 400)
    assert (value, n) == (75, 400)
    assert low == pytest.approx(75 - half, abs=0.5)
    assert high == pytest.approx(75 + half, abs=0.5)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_intervals_hold_the_value_and_repeat(name):
    texts = [f"{text} {i}" for i in range(10) for text in PREDICTIONS]
    references = [[f"{r} {i % 3}" for r in refs] for i in range(10) for refs in REFERENCES]
    score = metrics.score(name, texts, references)
    assert score.low <= score.value <= score.high
    assert score == metrics.score(name, texts, references)


@pytest.mark.parametrize("name", sorted({*metrics.METRICS} - {"bleu"}))  # that is no mean
def test_replicates_are_of_the_same_resamples_for_every_prediction(name):
    """So that one example's change is one number times how often it was drawn."""
    references = [[f"{word} {word}"] for word in ("red", "green", "blue", "pink")]
    right = [reference for (reference,) in references]
    first, second = ([*right[:i], "no", *right[i + 1 :]] for i in (0, 1))
    both = [["no", "no", *right[2:]], first, second, right]
    zero, one, two, all_right = (metrics.score(name, p, references).replicates for p in both)
    assert len(all_right) == metrics.REPLICATES
    assert len(set(one)) > 3
    gains = np.subtract(all_right, one) + np.subtract(all_right, two)
    assert gains == pytest.approx(np.subtract(all_right, zero), abs=0.002)
    assert all(value == round(value, 3) for value in one)


def test_replicates_tell_a_difference_better_than_the_two_intervals():
    """Of two systems that fail on the same hard examples, one a little better than the other."""
    rng = np.random.default_rng(0)
    hard, better = rng.random(400) < 0.5, rng.random(400) < 0.06
    references = [["yes"]] * 400
    worse, best = (
        metrics.score("exact_match", ["yes" if ok else "no" for ok in found], references)
        for found in (~hard, ~hard | better)
    )
    differences = np.subtract(best.replicates, worse.replicates)
    share = np.mean(hard & better)
    expected = 100 * np.sqrt(share * (1 - share) / 400)  # each example gains 0 or 1
    assert np.std(differences, ddof=1) == pytest.approx(expected, rel=0.15)
    assert np.percentile(differences, 2.5) > 0
    assert best.low < worse.high


def test_unknown_metric_and_empty_test_set_name_what_would_do():
    with pytest.raises(UserError, match=r"'rouge9' is unknown; known: rouge1, .*f1"):
        metrics.score("rouge9", ["a"], [["a"]])
    with pytest.raises(UserError, match="test set is empty"):
        metrics.score("f1", [], [])


def random_targets(count):
    rng = random.Random(0)
    words = ["shape", "of", "the", "array", "number", "heads", "whether", "axis"]
    weights = range(len(words), 0, -1)
    return [" ".join(rng.choices(words, weights, k=rng.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("name", metrics.METRICS)
def test_constant_answer_is_the_best_target(name):
    targets = random_targets(80)
    references = [[target] for target in targets[::2]]

    def value(answer):
        return metrics.score(name, [answer] * len(references), references).value

    answer = metrics.constant_answer(targets, name, references)
    assert value(answer) == pytest.approx(max(map(value, targets)))


def test_constant_answer_finds_the_frequent_and_the_typical_among_few_candidates():
    targets = random_targets(300)
    rare_word = ["zebra"] * 20
    references = [[target] for target in targets]
    answer = metrics.constant_answer(targets + rare_word, "exact_match", [["zebra"]], 2)
    assert answer == "zebra"
    answer = metrics.constant_answer(targets + rare_word, "f1", references, 20)
    scores = {t: metrics.score("f1", [t] * 300, references).value for t in dict.fromkeys(targets)}
    assert scores[answer] > np.percentile(list(scores.values()), 95)


def test_first_sentence():
    texts = ["Return x. Then y.", "A title\n over lines\n\nBody.", "version 1.5 of it! No", "x", ""]
    expected = ["Return x.", "A title over lines", "version 1.5 of it!", "x", ""]
    assert metrics.first_sentence(texts) == expected
