"""Check a SentencePiece file from anybody, before the library loads it.

The library itself refuses what is damaged. This file refuses what is well-formed and would take the
memory or the time of whoever uses it. `gqa.data.tokenizer` reads and writes such files.

A normalizer's rules are kept as a double array, a trie in one list of units of 32 bits, and behind
it the replacements, each with a zero byte at its end.
Source: "An Efficient Implementation of Trie Structures" (Aoe, 1992), as in Darts-clone.
"""

import struct

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_pb2

# Pieces of the largest public vocabularies: about 900,000.
MOST_PIECES = 1 << 20

# Bytes of a text that a rule matches or writes. The longest rules of NFKC match 12 and write 33.
LONGEST_RULE = 128


class WrongVocabulary(ValueError):
    """A SentencePiece file that cannot be used; the message says why."""


def check(content: bytes) -> None:
    """Check the contents of a SentencePiece file.

    Raises:
        WrongVocabulary: if it is none, or has too many pieces, scores that are no numbers, or rules
            of normalization that are damaged or too long.
    """
    try:
        # Protobuf makes the class when the module is imported, which the type checker cannot see.
        model = model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise WrongVocabulary("not a SentencePiece model") from error

    if not model.pieces:
        raise WrongVocabulary("not a SentencePiece model, or one without pieces")
    if len(model.pieces) > MOST_PIECES:
        raise WrongVocabulary(f"{len(model.pieces):,} pieces; at most {MOST_PIECES:,} are read")
    if not np.isfinite([piece.score for piece in model.pieces]).all():
        raise WrongVocabulary("the score of a piece is NaN or infinite")

    # Texts are normalized when they are encoded, and changed back when ids are decoded.
    for spec in (model.normalizer_spec, model.denormalizer_spec):
        if spec.precompiled_charsmap:
            _check_rules(spec.precompiled_charsmap)


def _check_rules(rules: bytes) -> None:
    """Refuse rules that match or write more than LONGEST_RULE bytes, or lead out of their array."""
    try:
        (size,) = struct.unpack_from("<I", rules)
        units = np.frombuffer(rules, "<u4", size // 4, offset=4)
    except (struct.error, ValueError) as error:
        raise WrongVocabulary("its rules of normalization are damaged") from error

    # One character of a text may become a replacement, so a long one multiplies the text.
    replacements = rules[4 + size :].split(b"\0")
    if max(map(len, replacements)) > LONGEST_RULE:
        raise WrongVocabulary(f"a rule of normalization writes over {LONGEST_RULE} bytes")

    # A node is a unit without the top bit, which marks values. Its children are the units at its
    # base XOR their label, the byte of the text that leads to them.
    places = np.arange(len(units), dtype=np.uint32)
    bases = places ^ ((units >> 10) << ((units & 0x200) >> 6))
    bases_of_parents = places ^ (units & 0xFF)
    is_node = units < 1 << 31

    # A trie whose nodes lead back to themselves would match every text to its end, from each of its
    # bytes on.
    nodes, length = places[:1], 0
    while len(nodes):
        if length > LONGEST_RULE:
            raise WrongVocabulary(f"a rule of normalization matches over {LONGEST_RULE} bytes")
        if max(bases[nodes].max(), bases_of_parents.max()) >= len(units):
            raise WrongVocabulary("its rules of normalization are damaged")

        is_base = np.zeros(len(units), bool)
        is_base[bases[nodes]] = True
        nodes, length = places[is_node & is_base[bases_of_parents]], length + 1
