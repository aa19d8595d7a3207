"""Texts that repeat earlier ones, exactly or nearly, and are left out of the corpus.

Packages copy docstrings from one another. A copy in the test split of a text in the training split
would reward remembering.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator

from gqa.data.python_texts import Text

NGRAM = 8  # words of a run that is compared
NEAR_DUPLICATE = 0.5  # a text is a duplicate if more than this share of its runs was seen


class SeenTexts:
    """The texts so far and their runs of 8 words, against which a new text is compared."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._ngrams: set[int] = set()

    def repeats(self, text: str) -> str:
        """Return "exact", "near" or "" for how `text` repeats earlier texts, and remember it.

        Whitespace does not count. A text is "near" if more than half of its runs of 8 words were
        seen before; a text of fewer than 8 words can only be "exact".
        """
        words = text.split()
        normalized = " ".join(words)
        if normalized in self._texts:
            return "exact"
        self._texts.add(normalized)

        # Checksums of the runs take less memory than the runs.
        ngrams = {
            zlib.crc32(" ".join(words[i : i + NGRAM]).encode("utf-8", "replace"))
            for i in range(len(words) - NGRAM + 1)
        }

        num_seen = len(ngrams & self._ngrams)
        if ngrams and num_seen > NEAR_DUPLICATE * len(ngrams):
            return "near"

        # Only the runs of texts that are kept are remembered.
        self._ngrams |= ngrams
        return ""


def without_duplicates(
    texts: Iterable[Text], seen_texts: SeenTexts, seen_code: SeenTexts, dropped: Counter[str]
) -> Iterator[Text]:
    """Yield the texts that repeat no earlier one, and count the others in `dropped`.

    A text that is new but documents code seen before keeps its words and loses its code.
    """
    for text in texts:
        repetition = seen_texts.repeats(text.text)
        if repetition:
            dropped[f"{repetition} text"] += 1
            continue

        repetition = text.code and seen_code.repeats(text.code)
        if repetition:
            dropped[f"{repetition} code"] += 1
        yield text._replace(code="") if repetition else text
