"""Write a SentencePiece vocabulary as tokenizer.json, for Hugging Face Transformers.

Transformers would make a tokenizer of spiece.model by itself, but one without byte fallback and
with other rules of normalization: "größe" would become unknown. The tokenizer of this file gives
the ids that `gqa.data.tokenizer` gives, for every text. normalization.py has the rules of
normalization.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)

from gqa.data import tokenizer
from gqa.data.tokenizer import EOS, NUM_SENTINELS, PAD
from gqa.interop.huggingface import normalization
from gqa.interop.huggingface.normalization import SPACE
from gqa.runtime.errors import UserError

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
SENTINELS = [f"<extra_id_{k}>" for k in range(NUM_SENTINELS)]

Piece = model_pb2.ModelProto.SentencePiece  # type: ignore[attr-defined]
UNIGRAM, BPE = 1, 2  # kinds of models, in the numbers of SentencePiece
LONGEST = 10**9  # of a text, in tokens or characters: T5 sets no limit


def write(vocabulary: Path, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of a SentencePiece file into a folder.

    Raises:
        UserError: naming the file, if `tokenizers` cannot give the same ids.
    """
    known = tokenizer.load(vocabulary)
    assert isinstance(known, tokenizer.Tokenizer)  # as every vocabulary of a single file is
    model = model_pb2.ModelProto.FromString(vocabulary.read_bytes())  # type: ignore[attr-defined]
    try:
        built = build(model, known)
    except NotExpressible as error:
        raise UserError(
            f"vocabulary {vocabulary}: cannot be written as tokenizer.json, because {error}; "
            "export without --vocabulary"
        ) from error

    built.save(str(folder / TOKENIZER))
    config = NAMES | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": SENTINELS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": LONGEST,
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


class NotExpressible(ValueError):
    """A vocabulary for which `tokenizers` would give other ids; the message says why."""


def build(model: Any, known: tokenizer.Tokenizer) -> Tokenizer:
    """Return a tokenizer that gives the ids of `known`, followed by the end token.

    Args:
        model: SentencePiece's message of the same vocabulary.

    Raises:
        NotExpressible: if it cannot.
    """
    kind = model.trainer_spec.model_type
    if kind not in (UNIGRAM, BPE):
        raise NotExpressible("it is neither a unigram nor a BPE model")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise NotExpressible("it writes spaces behind words")

    pieces = list(model.pieces[: known.num_pieces])
    if any(piece.type == Piece.UNUSED for piece in pieces):
        raise NotExpressible("it has unused pieces")
    names = _names(pieces, known)
    ordinary = [piece for piece in pieces if piece.type in (Piece.NORMAL, Piece.USER_DEFINED)]
    symbols = [piece.piece for piece in ordinary if piece.type == Piece.USER_DEFINED]
    if not all(re.fullmatch(f"{SPACE}[!-~]+", symbol) for symbol in symbols):
        raise NotExpressible("it has symbols defined by its user other than words in ASCII")

    make = _unigram if kind == UNIGRAM else _bpe
    built = Tokenizer(make(pieces, names, known.unknown))
    built.normalizer = normalization.normalizer(model.normalizer_spec, symbols)
    cuts = _cuts(names, pieces, ordinary)
    # SentencePiece's BPE sets the user's symbols apart before it merges. Its unigram model weighs
    # them like other pieces.
    if kind == BPE and symbols:
        longest_first = sorted(map(_escaped, symbols), key=len, reverse=True)
        cuts.append(pre_tokenizers.Split(Regex("|".join(longest_first)), "isolated"))
    if cuts:
        built.pre_tokenizer = pre_tokenizers.Sequence(cuts)

    _add_special_tokens(built, known)
    built.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            # A sentinel is a word of its own.
            decoders.Replace(Regex("^(?=<extra_id_[0-9]{1,2}>$)"), " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", LONGEST, 0),
        ]
    )
    return built


def _names(pieces: Sequence[Any], known: tokenizer.Tokenizer) -> list[str]:
    """Return the pieces' texts; the special ones have the names that texts quote them by."""
    names = [piece.piece for piece in pieces]
    for number, name in zip((PAD, EOS, known.unknown), NAMES.values(), strict=True):
        names[number] = name
    if len(set(names)) < len(names):
        raise NotExpressible("two pieces have the same text")
    return names


def _unigram(pieces: Sequence[Any], names: list[str], unknown: int) -> models.Unigram:
    normal_scores = [piece.score for piece in pieces if piece.type == Piece.NORMAL]
    best, worst = max(normal_scores), min(normal_scores)

    # SentencePiece's score of a user's symbol is better than that of any other way to write it.
    # Special pieces are not found in texts, so their scores may be any.
    scores = [
        piece.score
        if piece.type == Piece.NORMAL
        else len(piece.piece.encode()) * best - 0.1
        if piece.type == Piece.USER_DEFINED
        else worst
        for piece in pieces
    ]
    # Both libraries derive the cost of an unknown character from the worst score, but
    # SentencePiece from that of normal pieces alone.
    if min(scores) < worst:
        raise NotExpressible("it has long symbols defined by its user")
    return models.Unigram(
        list(zip(names, scores, strict=True)),
        unk_id=unknown,
        byte_fallback=any(piece.type == Piece.BYTE for piece in pieces),
    )


def _bpe(pieces: Sequence[Any], names: list[str], unknown: int) -> models.BPE:
    """Return a BPE model that joins two pieces wherever SentencePiece would.

    SentencePiece joins any two neighbours whose text is a piece, the best score first. Here every
    pair that gives a piece is listed, in the order of the pieces' scores.
    """
    normal = {piece.piece: piece.score for piece in pieces if piece.type == Piece.NORMAL}
    merges = []
    for text in sorted(normal, key=lambda text: -normal[text]):
        parts = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [pair for pair in parts if pair[0] in normal and pair[1] in normal]
    return models.BPE(
        vocab={name: number for number, name in enumerate(names)},
        merges=merges,
        unk_token=names[unknown],
        fuse_unk=True,
        byte_fallback=any(piece.type == Piece.BYTE for piece in pieces),
        # A stretch that is a piece becomes this piece: the user's symbols, which no merge gives.
        ignore_merges=any(piece.type == Piece.USER_DEFINED for piece in pieces),
    )


def _cuts(names: list[str], pieces: Sequence[Any], ordinary: Sequence[Any]) -> list[Any]:
    """Return splits that keep a text which spells a special piece from becoming this piece.

    `tokenizers` finds every piece in a text, also "<0x41>", which stands for a byte, and "</s>" in
    a text that is normalized to it. Each such text is cut between two characters that no ordinary
    piece has next to each other, so that the cut changes nothing else.
    """
    special = {
        name: list(map(_escaped, name))
        for name, piece in zip(names, pieces, strict=True)
        if piece.type not in (Piece.NORMAL, Piece.USER_DEFINED, Piece.BYTE)
    }
    groups: list[tuple[tuple[str, ...], list[str]]]
    groups = [((name,), characters) for name, characters in special.items()]
    # Bytes differ in two digits, so that one pattern describes all of them.
    if any(piece.type == Piece.BYTE for piece in pieces):
        every_byte = tuple(f"<0x{byte:02X}>" for byte in range(256))
        groups.append((every_byte, [*"<0x", "[0-9A-F]", "[0-9A-F]", ">"]))

    neighbours = {pair for piece in ordinary for pair in itertools.pairwise(piece.piece)}
    single = {piece.piece for piece in ordinary if len(piece.piece) == 1}

    def may_be_cut(text: str, place: int) -> bool:
        # Two unknown characters become one unknown token, unless a cut divides them.
        left, right = text[place - 1], text[place]
        return (left, right) not in neighbours and bool({left, right} & single)

    patterns = []
    for texts, characters in groups:
        places = [
            place
            for place in range(1, len(characters))
            if all(may_be_cut(text, place) for text in texts)
        ]
        if not places:
            raise NotExpressible(f"its pieces can spell {texts[0]}, which is a special piece")
        before, behind = characters[: places[0]], characters[places[0] :]
        patterns.append(f"(?<={''.join(before)})(?={''.join(behind)})")
    return [pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")] if patterns else []


def _escaped(text: str) -> str:
    """Return a regular expression of Oniguruma for exactly this text."""
    return "".join(rf"\x{{{ord(character):X}}}" for character in text)


def _add_special_tokens(built: Tokenizer, known: tokenizer.Tokenizer) -> None:
    """Add the tokens that are found in a text before it is normalized, and the end token."""
    # The sentinels follow the pieces, the last of them first.
    tokens = [*NAMES.values(), *reversed(SENTINELS)]
    built.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in tokens])
    ids = {name: built.token_to_id(name) for name in tokens}
    expected = dict(zip(NAMES.values(), (PAD, EOS, known.unknown), strict=True))
    expected |= {name: int(known.sentinels[k]) for k, name in enumerate(SENTINELS)}
    assert ids == expected, "the special tokens have other ids than in the vocabulary"

    end = NAMES["eos_token"]
    built.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, EOS)]
    )
