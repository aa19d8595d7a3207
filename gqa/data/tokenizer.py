"""Text <-> ids, with special tokens and sentinels: vocabularies that are trained here, and others.

Ids of vocabularies that are trained here are laid out as in T5: padding 0, end of sequence 1,
unknown 2, the pieces of the model, then 100 sentinels counting down from the last id. The embedding
is rounded up to a multiple of 128 rows. In a folder of Hugging Face, the files beside the
vocabulary may give tokens other ids (`gqa.data.added_tokens`).
"""

import functools
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

from gqa.data import added_tokens, vocabulary_files
from gqa.data.added_tokens import AddedTokens, Tokens
from gqa.data.fast_tokenizer import FastTokenizer
from gqa.data.pieces import BYTES, FIRST_BYTE, Bytes, SentencePieces
from gqa.data.vocabulary_files import WrongVocabulary
from gqa.model.special_tokens import SpecialTokens
from gqa.runtime import atomic_files, regular_files
from gqa.runtime.errors import ConfigError, UserError

SPIECE, FAST = "spiece.model", "tokenizer.json"  # files of a folder
PAD, EOS, UNK = 0, 1, 2
NUM_SENTINELS = 100
BYTE_EXTRA_IDS = 125  # tokens behind the bytes of ByT5
MODEL_TYPES = ("unigram", "bpe")

# Sentinels, the three special ids, a piece for each byte, each printable ASCII character and space.
SMALLEST = NUM_SENTINELS + 3 + 256 + 94 + 1


class Design(NamedTuple):
    """A vocabulary to be trained.

    Args:
        model_type: one of MODEL_TYPES. T5's vocabularies are unigram. BPE keeps short and frequent
            words, such as phonemes, whole.
        vocab_size: counts the sentinels: 4096 gives 3996 pieces.
        symbols: words that are one piece each, and of which no part becomes a piece.
        coverage: the share of the text's characters that have a piece of their own. The rarest
            characters beyond it are written as bytes.
    """

    model_type: str = "unigram"
    vocab_size: int = 4096
    symbols: tuple[str, ...] = ()
    coverage: float = 0.9995


class Tokenizer:
    """Pieces of text, and tokens that are recognised in a text before it is cut into pieces.

    `num_ids` counts all ids, `num_pieces` those of pieces. `vocab_size` counts embedding rows, a
    multiple of 128: 32100 ids give 32128. `hash` identifies the files of the vocabulary.
    """

    def __init__(
        self, pieces: SentencePieces | Bytes, num_pieces: int, tokens: Tokens, identity: bytes
    ):
        self._pieces, self._tokens, self.num_pieces = pieces, tokens, num_pieces
        self.special, self.sentinels = tokens.special, tokens.sentinels
        self.unknown = tokens.unknown
        self.num_ids = max(num_pieces, 1 + max(tokens.ids.values()))
        self.vocab_size = -(-self.num_ids // 128) * 128
        self.hash = hashlib.sha256(identity).hexdigest()
        self._holds_sentinels = isinstance(pieces, SentencePieces) and pieces.num_sentinels() > 0

        # What decoding writes by name. The three special tokens are left to the pieces.
        own = (self.special.pad, self.special.eos, tokens.unknown)
        self._names = {token: text for text, token in tokens.ids.items() if token not in own}
        # The longest first, because one token may be the beginning of another.
        longest_first = sorted(tokens.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._initials = {text[0] for text in tokens.ids}

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without EOS at the end.

        "<extra_id_0>", "</s>", "<pad>" and the other special tokens become their ids, as in
        Transformers, wherever the text comes from: a text that quotes "</s>" in its middle is cut
        there by whoever reads up to the first EOS.
        """
        # SentencePiece would cut "</s>" into ordinary pieces, so each text between special tokens
        # is encoded by itself.
        ids: list[int] = []
        begin = 0
        for match in self._found(text):
            ids += self._pieces.encode(text[begin : match.start()])
            ids.append(self._tokens.ids[match[0]])
            begin = match.end()
        return ids + self._pieces.encode(text[begin:])

    def _found(self, text: str) -> Iterator[re.Match[str]]:
        """Return the places of tokens that a text names."""
        # Most texts have no "<", and a search for it takes less time than one for all tokens.
        if not any(character in text for character in self._initials):
            return iter(())
        return self._pattern.finditer(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does; uses every core."""
        # Few texts have special tokens. Encode all in parallel, then encode these few again.
        encoded = self._pieces.encode_batch(texts)
        for i, text in enumerate(texts):
            if next(self._found(text), None):
                encoded[i] = self.encode(text)
        return encoded

    def normalize(self, text: str) -> str:
        """Return a text as `decode` would write it if every character were in the vocabulary.

        T5's vocabularies apply NFKC and collapse white space: a fullwidth question mark becomes
        "?". Special tokens, which `encode` recognises in a text, are left out, and the text ends at
        "</s>". References are normalized before they are compared with texts that were decoded
        with `skip_special_tokens`.
        """
        # A network that was trained on "the </s> cat" ends its answer behind "the".
        texts: list[str] = []
        begin = 0
        for match in self._found(text):
            texts.append(self._normalize(text[begin : match.start()]))
            begin = match.end()
            token = self._tokens.ids[match[0]]
            if token == self.special.eos:
                begin = len(text)
                break
            if token == self.unknown:
                texts.append(self._pieces.decode([token]).strip())
            elif match[0] in self._tokens.plain:
                texts.append(match[0])
        texts.append(self._normalize(text[begin:]))
        return self._pieces.separator.join(filter(None, texts))

    def _normalize(self, text: str) -> str:
        """Return a text without special tokens as `normalize` does."""
        # NFKC makes "<extra_id_0>" of fullwidth characters. A model that holds this piece then
        # encodes it as the sentinel, which is no part of a text; any other model spells it.
        if self._holds_sentinels:
            ids = self._pieces.encode(text)
            if max(ids, default=0) >= self.num_pieces:
                return self.decode(ids, skip_special_tokens=True)
        return self._pieces.normalize(text)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Return the text before the first EOS, without padding.

        Sentinels read `<extra_id_k>`, or are left out with `skip_special_tokens`.
        """
        texts: list[str] = []
        pieces: list[int] = []  # ids since the last token that is no piece

        # Sentinels are no pieces of the model, which decodes the stretches between them.
        for token in np.asarray(ids).tolist():
            if token == self.special.eos:
                break
            if token in self._names or token >= self.num_pieces:
                name = self._names.get(token, "")  # "" for a padding row of the embedding
                is_shown = name in self._tokens.plain or not skip_special_tokens
                texts += [self._pieces.decode(pieces), name if is_shown else ""]
                pieces = []
            elif token != self.special.pad:
                pieces.append(token)
        texts.append(self._pieces.decode(pieces))
        return self._pieces.separator.join(text for text in texts if text)


Vocabulary = Tokenizer | FastTokenizer


def from_model(model: bytes, added: AddedTokens = added_tokens.T5) -> Tokenizer:
    """Return the vocabulary of a SentencePiece file, with the tokens that `added` adds to it.

    Raises:
        WrongVocabulary: if padding, the end of a text or a sentinel has no id, or another than T5's
            where `added` says nothing else.
    """
    pieces = SentencePieces(model)
    processor = pieces.processor

    # Some copies of T5's model already end in the sentinels, as pieces 99 down to 0.
    size = processor.get_piece_size()
    inside = pieces.num_sentinels()
    num_pieces, count = size - inside, inside or added.extra_ids

    if added == added_tokens.T5:
        pad, eos = processor.pad_id(), processor.eos_id()
        if [pad, eos] != [PAD, EOS]:
            raise WrongVocabulary(f"pad and eos have ids {[pad, eos]}, T5 needs [0, 1]")
        if 0 < inside < NUM_SENTINELS:
            raise WrongVocabulary(
                f"piece {size - 1 - inside} must be <extra_id_{inside}>, because the last piece is "
                "<extra_id_0>"
            )
    else:
        pad, eos = (
            token if (token := added.ids.get(name)) is not None else pieces.find(name)
            for name in (added.pad, added.eos)
        )

    # Sentinels count down from the last id, unless a file gives them ids.
    ids = {added.pad: pad, added.eos: eos, added.unknown: processor.unk_id()}
    if "<extra_id_0>" not in added.ids:
        last = num_pieces + count - 1
        ids |= {f"<extra_id_{k}>": last - k for k in range(count)}
    ids |= added.ids
    tokens = Tokens(
        ids,
        added.plain,
        SpecialTokens(pad, eos, pad),
        processor.unk_id(),
        added_tokens.sentinels(ids),
    )

    # Files that say what T5's rules say leave the vocabulary the one that the model alone is.
    identity = model
    usual = {"<pad>": PAD, "</s>": EOS, "<unk>": processor.unk_id()}
    usual |= {f"<extra_id_{k}>": num_pieces + NUM_SENTINELS - 1 - k for k in range(NUM_SENTINELS)}
    if (ids, added.plain) != (usual, frozenset()):
        identity += json.dumps([sorted(ids.items()), sorted(added.plain)]).encode()
    return Tokenizer(pieces, num_pieces, tokens, identity)


def from_bytes(added: AddedTokens) -> Tokenizer:
    """Return ByT5's vocabulary: bytes, with further tokens behind them.

    ByT5 was trained with the last bytes as sentinels, 258, 257 ..., which no text in UTF-8 needs.
    Its `<extra_id_k>` are ids that training never saw.
    """
    first = BYTES + FIRST_BYTE
    extra = {f"<extra_id_{k}>": first + k for k in range(BYTE_EXTRA_IDS)}
    own = {added.pad: PAD, added.eos: EOS, added.unknown: UNK}
    ids = own | (dict(added.ids) or extra)
    sentinels = np.arange(first - 1, first - 1 - NUM_SENTINELS, -1)
    tokens = Tokens(ids, added.plain, SpecialTokens(PAD, EOS, PAD), UNK, sentinels)
    identity = json.dumps(["bytes", sorted(ids.items())]).encode()
    return Tokenizer(Bytes(), first, tokens, identity)


def train(
    texts: Sequence[str],
    vocab_size: int,
    path: str | os.PathLike,
    model_type: str = "unigram",
    symbols: Sequence[str] = (),
    coverage: float = 0.9995,
) -> Tokenizer:
    """Fit a SentencePiece model to `texts`, write it to `path` and return it.

    Bytes are the fallback for rare characters, so nothing becomes unknown; whitespace is normalized
    as T5 does (newline = space). A text with too few different pieces gives a smaller vocabulary.

    Args:
        vocab_size: as in a `Design`, like all that follow.

    Raises:
        UserError: if `vocab_size` is too small for the bytes and the characters of the text.
    """
    path = pathlib.Path(path)
    design = Design(model_type, vocab_size, tuple(symbols), coverage)
    try:
        model = _fit(texts, design)
    except RuntimeError as error:
        # "... <= 1234" is how SentencePiece says that the text gives 1234 pieces at most.
        most = re.search(r"<= (\d+)", str(error))
        if most is None:
            raise _refusal(str(error), vocab_size) from error
        model = _fit(texts, design._replace(vocab_size=int(most[1]) + NUM_SENTINELS))

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(path, model)
    return from_model(model)


def _fit(texts: Sequence[str], design: Design) -> bytes:
    """Return a SentencePiece model, whose pieces include bytes and special tokens.

    Raises:
        RuntimeError: if the text cannot give so many, or not so few.
    """
    # Bounded fragments: SentencePiece silently skips any "sentence" longer than 4192 bytes.
    fragments = (
        line[i : i + 1000]
        for text in texts
        for line in text.split("\n")
        if line.strip()
        for i in range(0, len(line), 1000)
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=fragments,
        model_writer=model,
        model_type=design.model_type,
        vocab_size=design.vocab_size - NUM_SENTINELS,
        # SentencePiece writes the space before a word as this character.
        user_defined_symbols=[f"\N{LOWER ONE EIGHTH BLOCK}{symbol}" for symbol in design.symbols],
        # The marks of IPA for length and for affricates belong to other scripts than its letters.
        split_by_unicode_script=design.model_type != "bpe",
        byte_fallback=True,
        character_coverage=design.coverage,
        required_chars="".join(map(chr, range(33, 127))),
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNK,
        bos_id=-1,
        num_threads=2,  # part of the result: partial sums are per thread
        minloglevel=2,
    )
    return model.getvalue()


def _refusal(error: str, vocab_size: int) -> UserError:
    """Return SentencePiece's complaint about a number of pieces as one about `vocab_size`."""
    if size := re.search(r"vs (\d+)", error):
        least = int(size[1]) + NUM_SENTINELS
        return ConfigError("vocab_size", vocab_size, f"use at least {least}", "is too small")
    return UserError(f"no vocabulary can be trained on this text: {' '.join(error.split())}")


def load(path: str | os.PathLike) -> Vocabulary:
    """Read a SentencePiece model, or the vocabulary of a Hugging Face folder.

    A model by itself is one that `train` wrote, or any T5 `spiece.model`. In a folder, the files
    beside the vocabulary say which tokens are added to it.

    Raises:
        UserError: naming the path, if it cannot be read, is no vocabulary, would take too much
            memory or time (see `gqa.data.vocabulary_files`), or lacks padding or the end of a text.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            return _load_folder(path)
        content = regular_files.read_bytes(path)
        vocabulary_files.check(content)
        return from_model(content)
    except UserError as error:
        raise UserError(f"vocabulary {error}") from error
    except WrongVocabulary as error:
        raise UserError(f"vocabulary {path}: {error}") from error
    except (RuntimeError, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"vocabulary {path}: not a SentencePiece model") from error


def _load_folder(folder: pathlib.Path) -> Vocabulary:
    """Read the vocabulary of a Hugging Face folder: pieces, bytes, or a tokenizer.json."""
    added = added_tokens.read(folder)
    if (folder / SPIECE).exists():
        content = regular_files.read_bytes(folder / SPIECE)
        vocabulary_files.check(content)
        return from_model(content, added)
    if added.tokenizer_class == "ByT5Tokenizer":
        return from_bytes(added)
    if (folder / FAST).exists():
        return FastTokenizer(
            regular_files.read_bytes(folder / FAST, added_tokens.MOST_BYTES), added
        )
    raise WrongVocabulary(
        f"no {SPIECE} and no {FAST}; save the tokenizer of the model as a fast one "
        "(save_pretrained of Transformers)"
    )


def is_in(folder: str | os.PathLike) -> bool:
    """Return whether a folder has a vocabulary that `load` knows."""
    folder = pathlib.Path(folder)
    is_bytes = added_tokens.read(folder).tokenizer_class == "ByT5Tokenizer"
    return is_bytes or any((folder / name).is_file() for name in (SPIECE, FAST))


class Shape(NamedTuple):
    """The shape of a vocabulary, as a network needs it: the number of ids, and the special ones."""

    num_ids: int
    special: SpecialTokens


@functools.lru_cache(maxsize=4)
def shape(path: str) -> Shape:
    """Return the shape of the vocabulary at an absolute path.

    The file is read once in a process, because a sweep asks several times for each of its points.
    """
    vocabulary = load(path)
    return Shape(vocabulary.num_ids, vocabulary.special)
