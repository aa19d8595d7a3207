"""Scores of generated text against one or more references, with bootstrap intervals.

Every metric is first a row of statistics per example, [n, s], and then a function of their sums.
Resampling the rows is therefore enough for an interval, for corpus BLEU as much as for a mean.

Words are found in every script: in Chinese, Japanese, Thai and others that put no space between
words, each character is a word. English texts give the tokens that the metrics' own programs find.
"""

import string
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import regex
from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU

from gqa.runtime.errors import UserError

METRICS = (
    "rouge1",
    "rouge2",
    "rougeL",
    "bleu",
    "exact_match",
    "f1",
    "word_accuracy",
    "phoneme_error_rate",
)
LOWER_IS_BETTER = ("phoneme_error_rate",)
# Resamples behind an interval, and how many of their scores a record keeps (see `Score`).
RESAMPLES = 1000
REPLICATES = 200
NGRAM_ORDER = 4

# Scripts that put no space between words. A character with its marks counts as a word there.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_UNSPACED_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*")
_SIGN = regex.compile(r"[^\s\p{ASCII}]")
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+")

# As in TriviaQA's own evaluation: ASCII punctuation, and the quotes ‘ ’ ´.
_PUNCTUATION = regex.compile(f"[{regex.escape(string.punctuation)}\u2018\u2019\u00b4]")
_ARTICLES = regex.compile(r"\b(a|an|the)\b")
# A sentence ends at . ! or ? before a space, so that "3.5" stays whole; at the stop of another
# script, such as the danda of Hindi or the full-width stops, which no space need follow; or at an
# empty line.
_SENTENCE = regex.compile(
    r".+?(?:[.!?](?=\s|$)|(?![.!?])\p{Sentence_Terminal}|(?=\n\s*\n))", regex.DOTALL
)


class Score(NamedTuple):
    """A score in percent, its 95% bootstrap interval over the examples, and how many they are.

    `replicates` are the scores of the first resamples. Resample i of n examples draws the same
    examples for every score, so two scores of one set can be subtracted replicate by replicate.
    """

    value: float
    low: float
    high: float
    n: int
    replicates: tuple[float, ...]


def score(name: str, predictions: list[str], references: list[list[str]]) -> Score:
    """Score `predictions` [n] against `references` [n][1 or more], in percent."""
    if not predictions:
        raise UserError(f"{name}: there are no predictions to score; the test set is empty")

    statistics = _statistics(name, predictions, references)
    n = len(statistics)

    rng = np.random.default_rng(0)
    resampled = [
        _aggregate(name, statistics[rng.integers(n, size=n)].sum(0), n) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(resampled, [2.5, 97.5])

    value = _aggregate(name, statistics.sum(0), n)
    replicates = tuple(round(value, 3) for value in resampled[:REPLICATES])
    return Score(value, float(low), float(high), n, replicates)


def note(name: str, references: list[list[str]]) -> str:
    """Return one line on how a metric treats these references; "" if it does nothing unusual.

    Unusual are scripts other than Latin, and for BLEU references that are all very short.

    Args:
        references: [n][1 or more], normalized as the predictions are.
    """
    script, facts = _script(references), []
    # These two metrics split at spaces in every script.
    if script == "unspaced" and name not in ("word_accuracy", "phoneme_error_rate"):
        tokens = f"sacreBLEU's tokenizer {_bleu_tokenizer(references)}" if name == "bleu" else ""
        facts.append(f"each character is a word{tokens and ', as in '}{tokens}")
    if script == "other" and name.startswith("rouge"):
        facts.append("words of this script are not stemmed, as those of English are")

    if name == "bleu" and (order := _bleu_order(references)) < NGRAM_ORDER:
        facts.append(
            f"no reference has {NGRAM_ORDER} tokens, so that n-grams of at most {order} are "
            f"counted (max_ngram_order={order} in sacreBLEU)"
        )
    return f"{name}: {'; '.join(facts)}" if facts else ""


def _script(references: list[list[str]]) -> str:
    """Return "unspaced", "latin" or "other": the script of most letters in the references."""
    text = "".join(reference for texts in references for reference in texts)
    letters = len(regex.findall(r"\p{L}", text))

    # The lookahead counts letters only. The scripts also have digits and marks, and `letters` does
    # not count those.
    if 2 * len(regex.findall(rf"(?=\p{{L}})[{_UNSPACED}]", text)) > letters:
        return "unspaced"
    # A text without any letter, such as a number, is treated as Latin.
    return "latin" if 2 * len(regex.findall(r"\p{Latin}", text)) >= letters else "other"


def _bleu_tokenizer(references: list[list[str]]) -> str:
    """Return the name of sacreBLEU's tokenizer for the script of the references.

    "zh" divides Chinese into characters and leaves other words whole. Japanese and Thai would need
    a dictionary, so that "char" divides them into characters, spaces and punctuation.
    """
    if _script(references) != "unspaced":
        return "13a"
    text = "".join(reference for texts in references for reference in texts)
    unspaced = regex.findall(rf"[{_UNSPACED}]", text)

    # Japanese mixes Han with kana, so only text that is nearly all Han is taken for Chinese.
    is_chinese = len(regex.findall(r"\p{Han}", text)) > 0.9 * len(unspaced)
    return "zh" if is_chinese else "char"


def _bleu_order(references: list[list[str]]) -> int:
    """Return the longest n-grams that BLEU counts: 4, or the tokens of the longest reference.

    Where no reference has 4 tokens, a perfect answer has no 4-gram either, so that sacreBLEU's BLEU
    of up to 4-grams is 0 for it.
    """
    bleu = _sentence_bleu(_bleu_tokenizer(references), NGRAM_ORDER)
    longest = 1
    for reference in dict.fromkeys(text for texts in references for text in texts):
        longest = max(longest, bleu.sentence_score(reference, [reference]).sys_len)
        if longest >= NGRAM_ORDER:
            return NGRAM_ORDER
    return longest


def _statistics(name, predictions, references):
    """Return the statistics [n, s] that the metric `name` sums over n examples."""
    if name not in METRICS:
        raise UserError(f"metric {name!r} is unknown; known: {', '.join(METRICS)}")

    pairs = list(zip(predictions, references, strict=True))

    # The BLEU and the error rate of a corpus are no means over examples; they are made of summed
    # counts.
    if name == "bleu":
        bleu = _sentence_bleu(_bleu_tokenizer(references), _bleu_order(references))
        return np.array([_bleu_counts(bleu, *pair) for pair in pairs])
    if name == "phoneme_error_rate":
        return np.array([_edit_counts(*pair) for pair in pairs])

    # All other metrics are means over examples: one statistic each, that of the best reference.
    if name.startswith("rouge"):
        scorer = RougeScorer([name], tokenizer=_UnicodeTokenizer())
        values = [scorer.score_multi(refs, text)[name].fmeasure for text, refs in pairs]
    else:
        compare = {"exact_match": _exact_match, "f1": _f1, "word_accuracy": _same_tokens}[name]
        values = [max(compare(text, reference) for reference in refs) for text, refs in pairs]

    return np.array(values, dtype=np.float64)[:, None]


def _aggregate(name, sums, n):
    """Turn summed statistics [s] of `n` examples into percent."""

    # All edits divided by all phonemes, so that a long word weighs more than a short one.
    if name == "phoneme_error_rate":
        return 100 * float(sums[0] / max(sums[1], 1))  # all references may be empty

    if name != "bleu":
        return 100 * float(sums[0]) / n

    sys_len, ref_len, *counts = sums.tolist()
    order = len(counts) // 2
    correct, total = counts[:order], counts[order:]
    return BLEU.compute_bleu(
        correct, total, sys_len, ref_len, smooth_method="exp", max_ngram_order=order
    ).score


@lru_cache
def _sentence_bleu(tokenizer, order):
    """Return sacreBLEU's scorer of single sentences, of which only the counts are used.

    Its `corpus_score` would need the same number of references for every example.
    """
    # `effective_order` does not change the counts. Without it sacreBLEU warns about each sentence.
    return BLEU(effective_order=True, max_ngram_order=order, tokenize=tokenizer)


def _bleu_counts(bleu, text, references):
    result = bleu.sentence_score(text, references)
    return [result.sys_len, result.ref_len, *result.counts, *result.totals]


class _UnicodeTokenizer(DefaultTokenizer):
    """rouge_score's tokenizer, extended from ASCII to all scripts.

    rouge_score itself takes every character outside a-z and 0-9 for a space. The words of a text
    are cached, because it is compared for several ROUGE variants and with many candidates.
    """

    def __init__(self):
        super().__init__(use_stemmer=True)

    def tokenize(self, text):
        """Return the words of a text in lower case; those of ASCII letters are stemmed."""
        return _stemmed_words(text)


@lru_cache(maxsize=1 << 15)
def _stemmed_words(text):
    # A text of emoji or other signs alone has no words, so that each of its signs counts as one.
    words = _WORD.findall(text.lower()) or _SIGN.findall(text)
    stem = DefaultTokenizer(use_stemmer=True).tokenize
    # rouge_score would cut "café" to "caf", so it gets ASCII words only.
    return [part for word in words for part in (stem(word) if word.isascii() else [word])]


def _normalize(text):
    """Return the words that exact match and F1 compare, as TriviaQA's own evaluation has them.

    Lower case, without punctuation and articles. Punctuation becomes a space, where SQuAD's
    evaluation deletes it: "well-known" is two words. A text of which nothing would be left, such as
    the answer "A", keeps its articles and punctuation, so that an empty text does not equal it.
    """
    words = _ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split()
    return [part for word in words or text.lower().split() for part in _characters(word)]


def _characters(word):
    """Return a word as it is, or its characters if its script puts no space between words."""
    return _WORD.findall(word) if _UNSPACED_WORD.search(word) else [word]


def _exact_match(text, reference):
    return float(_normalize(text) == _normalize(reference))


def _f1(text, reference):
    words, expected = _normalize(text), _normalize(reference)
    if not words or not expected:
        return float(words == expected)
    overlap = (Counter(words) & Counter(expected)).total()
    return 2 * overlap / (len(words) + len(expected))


def _same_tokens(text, reference):
    """Return 1.0 if two texts have the same tokens and differ in space at most, else 0.0."""
    return float(text.split() == reference.split())


def _edit_counts(text, references):
    """Return the edits (insertions, deletions, substitutions) and the length of the reference.

    Both count tokens. The reference is the one with the fewest edits per token.
    """
    tokens = text.split()
    counts = [
        (Levenshtein.distance(tokens, expected), len(expected))
        for expected in map(str.split, references)
    ]

    # An empty reference has no tokens to divide by.
    return min(counts, key=lambda count: count[0] / max(count[1], 1))


def constant_answer(
    train_targets: list[str],
    metric: str,
    references: list[list[str]],
    num_candidates: int = 200,
    num_references: int = 200,
) -> str:
    """Return the one training target that scores best as the answer to every example.

    `references` are the validation set's; an even sample of them is scored. Candidates are the
    most frequent targets, and the targets whose words are the most typical of all targets.
    """
    # Every i-th reference, with i rounded up: 500 references, of which at most 200 are wanted, give
    # every third.
    sample = references[:: -(-len(references) // num_references)]

    counts = Counter(train_targets)
    frequent = [target for target, _ in counts.most_common(num_candidates // 2)]
    typical = sorted(counts, key=_typicality(counts), reverse=True)[: num_candidates // 2]

    def value(candidate):
        statistics = _statistics(metric, [candidate] * len(sample), sample)
        return _aggregate(metric, statistics.sum(0), len(sample))

    # A dict removes duplicates and keeps the order, so that of equally good answers the first
    # always wins. The order of a set of texts would change from process to process.
    return max(dict.fromkeys(frequent + typical), key=value)


def _typicality(counts):
    """Return a key: the expected unigram F1 of a target against a target drawn from `counts`."""
    words = {target: Counter(target.lower().split()) for target in counts}
    total = counts.total()

    # holders[word, i]: the number of targets that hold the word more than i times. An answer with
    # the word twice expects an overlap of (holders[word, 0] + holders[word, 1]) / total in it.
    holders: Counter[tuple[str, int]] = Counter()
    for target, bag in words.items():
        for word, times in bag.items():
            for occurrence in range(times):
                holders[word, occurrence] += counts[target]

    # The mean replaces the length of the other target. This approximation is good enough to choose
    # candidates, which are then scored exactly.
    mean_length = sum(words[target].total() * count for target, count in counts.items()) / total

    def expected_f1(target):
        bag = words[target]
        overlap = sum(holders[w, i] for w, times in bag.items() for i in range(times)) / total
        return 2 * overlap / (bag.total() + mean_length)

    return expected_f1


def first_sentence(inputs: list[str]) -> list[str]:
    """Return the first sentence or paragraph of each text, whichever is shorter, on one line."""
    matches = [_SENTENCE.match(text.strip()) for text in inputs]
    # A text without an end of a sentence is taken whole.
    texts = [match[0] if match else text for match, text in zip(matches, inputs, strict=True)]
    return [" ".join(text.split()) for text in texts]
