"""Rewrite SentencePiece's rules of normalization as a normalizer of the package `tokenizers`.

SentencePiece reads a text from left to right and replaces the longest sequence of characters that
has a rule; a character without one stays. The normalizer `Precompiled` of `tokenizers` takes the
same table, but looks sequences up by grapheme and takes the shortest rule, so that decomposed
letters (e and an accent), Hangul and emoji come out differently. It is right for single characters.

Therefore the normalizer of this file works in steps:

    1. mark the end of every sequence that a rule matches, and of every other character
    2. replace single characters by their rules, each apart from its neighbours
    3. compose each sequence (NFC)
    4. replace the sequences that NFC of `tokenizers` does not know, because Unicode had them later
    5. remove the marks, then white space as SentencePiece does

The table is a double array; `gqa/data/vocabulary_files.py` says how it is laid out and checks it.
The marks are three noncharacters of Unicode, which no text should contain. A text that has them
all the same loses them here.
"""

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import Regex, normalizers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
SEQUENCE_END, CHARACTER_END, SYMBOL_BEGIN = "\ufdd0", "\ufdd1", "\ufdd2"

# A trie of characters; a node holds its children, and whether it ends a sequence under "".
Trie = dict[str, Any]


def normalizer(spec: Any, symbols: Iterable[str]) -> normalizers.Sequence:
    """Return the normalizer of a SentencePiece model.

    Args:
        spec: the model's `normalizer_spec`.
        symbols: the pieces that the user defined, each with SPACE before it. Where a text spells
            one with SPACE, no rule changes it.
    """
    steps = _rule_steps(spec.precompiled_charsmap, symbols) if spec.precompiled_charsmap else []

    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex("^ +"), ""),
            normalizers.Replace(Regex(f"[ {SPACE}]+$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    steps.append(normalizers.Replace(SYMBOL_BEGIN, SPACE))
    return normalizers.Sequence(steps)


def _rule_steps(table: bytes, symbols: Iterable[str]) -> list[normalizers.Normalizer]:
    """Return the steps 1 to 5 of the module's docstring, without white space."""
    rules = read_rules(table)
    sequences = [sequence for sequence in rules if len(sequence) > 1]

    # What steps 2 and 3 make of a sequence, where that is not what its rule says.
    nfc = normalizers.NFC()
    singly = {each: "".join(rules.get(x, x) for x in each) for each in sequences}
    late = [each for each in sequences if nfc.normalize_str(singly[each]) != rules[each]]
    late.sort(key=len, reverse=True)

    # A rule turns SPACE into a space, so that of a symbol is written in another way meanwhile.
    behind = [symbol.removeprefix(SPACE) for symbol in symbols]
    hidden = [
        normalizers.Replace(Regex(f"{SPACE}(?={_pattern(_trie(behind))})"), SYMBOL_BEGIN)
    ] * bool(behind)

    # \K ends the match where it stands, so that the mark is inserted and nothing is replaced.
    pattern = _pattern(_trie([*sequences, *(SYMBOL_BEGIN + each for each in behind)]))
    return [
        *hidden,
        normalizers.Replace(Regex(rf"(?m:{pattern}|.)\K"), SEQUENCE_END),
        normalizers.Replace(Regex(r"(?m:.)\K"), CHARACTER_END),
        normalizers.Precompiled(table),
        normalizers.Replace(CHARACTER_END, ""),
        normalizers.NFC(),
        *(
            normalizers.Replace(
                nfc.normalize_str(singly[each]) + SEQUENCE_END, rules[each] + SEQUENCE_END
            )
            for each in late
        ),
        normalizers.Replace(SEQUENCE_END, ""),
    ]


def read_rules(table: bytes) -> dict[str, str]:
    """Return the rules of a table: a sequence of characters -> what replaces it."""
    (size,) = struct.unpack_from("<I", table)
    units = np.frombuffer(table, "<u4", size // 4, offset=4)
    replacements = table[4 + size :]

    # A node without the top bit lies at its parent's base XOR its label.
    places = np.flatnonzero((units < 1 << 31) & (units & 0xFF > 0))
    labels = units[places] & 0xFF
    children: dict[int, list[tuple[int, int]]] = {}
    for place, label in zip(places.tolist(), labels.tolist(), strict=True):
        children.setdefault(place ^ label, []).append((place, label))

    rules = {}
    nodes = [(0, b"")]
    while nodes:
        place, sequence = nodes.pop()
        unit = int(units[place])
        base = place ^ ((unit >> 10) << ((unit & 0x200) >> 6))

        # The bit says that a rule ends here; the unit at the base then holds the place of its
        # replacement.
        if unit >> 8 & 1:
            begin = int(units[base]) & 0x7FFF_FFFF
            end = replacements.index(b"\0", begin)
            rules[sequence.decode()] = replacements[begin:end].decode()
        nodes += [(child, sequence + bytes([label])) for child, label in children.get(base, ())]
    return rules


def _trie(sequences: Iterable[str]) -> Trie:
    root: Trie = {}
    for sequence in sequences:
        node = root
        for character in sequence:
            node = node.setdefault(character, {})
        node[""] = True
    return root


def _pattern(node: Trie) -> str:
    """Return a regular expression for the longest of the sequences below a node.

    Children with the same sequences below them become one class of characters. For the rules of
    NFKC this takes 16,000 characters instead of a million, most of which would be Hangul.
    """
    children: dict[str, list[int]] = {}
    for character, child in node.items():
        if character:
            children.setdefault(_pattern(child), []).append(ord(character))
    if not children:
        return ""

    alternatives = [_characters(group) + below for below, group in children.items()]
    return f"(?:{'|'.join(alternatives)}){'?' if '' in node else ''}"


def _characters(codes: list[int]) -> str:
    """Return a class of characters, as ranges."""
    ranges: list[list[int]] = []
    for code in sorted(codes):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(rf"\x{{{a:X}}}-\x{{{b:X}}}" for a, b in ranges) + "]"
