"""Read a docstring and say what one of its parameters is.

The answer stands in the context and most contexts describe several parameters, so this measures
addressing and copying through cross-attention.
"""

import zlib

from gqa.data.corpus import Corpus
from gqa.data.examples import Example

METRICS = ("rouge1", "rouge2", "rougeL", "f1", "exact_match")
HEADLINE = "rougeL"


def load(split: str, *, corpus: Corpus, context_words: int = 48) -> list[Example]:
    """Return questions of one split; their context is the `context_words` around the entry.

    The question comes first, so that truncation cannot cut it off. 48 words fit 128 tokens of a
    4096-piece vocabulary nine times in ten.
    """
    return [
        Example(
            f"question: parameter {row['parameter']} context: {_context(row, context_words)}",
            (row["answer"],),
        )
        for row in corpus.rows("parameter_qa", split)
    ]


def _context(row: dict, size: int) -> str:
    """Return `size` words of the docstring, with the whole entry anywhere among them.

    Where the stretch begins is drawn from a hash: a fixed place would tell where the answer is.
    """
    words = row["context"].split()

    # For example, an entry of words 60 to 70 of 100 allows stretches of 48 words that begin at 22
    # to 52.
    first = max(0, row["end"] - size)
    last = max(first, min(row["begin"], len(words) - size))
    draw = zlib.crc32(f"{row['parameter']} {row['context']}".encode())
    begin = first + draw % (last - first + 1)
    return " ".join(words[begin : begin + size])
