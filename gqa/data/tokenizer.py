"""SentencePiece text <-> ids, with T5's special ids and sentinels.

Ids are laid out as in T5: padding 0, end of sequence 1, unknown 2, the pieces of the model, then
100 sentinels counting down from the last id. The embedding is rounded up to a multiple of 128 rows.
"""

import functools
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

from gqa.data import vocabulary_files
from gqa.runtime import atomic_files, regular_files
from gqa.runtime.errors import ConfigError, UserError

PAD, EOS, UNK = 0, 1, 2
NUM_SENTINELS = 100
MODEL_TYPES = ("unigram", "bpe")

# Special tokens that are recognised in a text, as Transformers' T5Tokenizer recognises them.
SPECIAL = re.compile(r"<extra_id_([1-9]?[0-9])>|(<pad>)|(</s>)|(<unk>)")
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
    """A SentencePiece model with `NUM_SENTINELS` extra ids behind its pieces.

    `vocab_size` counts embedding rows (32000 pieces give 32128); the ids from
    `num_pieces + NUM_SENTINELS` up to it are never produced. `hash` identifies the model file.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.hash = hashlib.sha256(model).hexdigest()
        self.unknown = self._processor.unk_id()  # 2 for T5's model, 3 for copies that have <s>
        self.num_pieces = self._processor.get_piece_size()
        # Some copies of T5's model already end in the sentinels, as pieces 99 down to 0.
        last_piece = self._processor.id_to_piece(self.num_pieces - 1)
        self._holds_sentinels = last_piece.endswith("<extra_id_0>")
        if self._holds_sentinels:
            self.num_pieces -= NUM_SENTINELS

        self.vocab_size = -(-(self.num_pieces + NUM_SENTINELS) // 128) * 128

    def sentinel(self, k: int) -> int:
        """Return the id of `<extra_id_k>`, the last real id minus k: 32099 - k for T5's model."""
        if not 0 <= k < NUM_SENTINELS:
            raise ValueError(f"sentinel {k} does not exist: there are {NUM_SENTINELS}")
        return self.num_pieces + NUM_SENTINELS - 1 - k

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without EOS at the end.

        "<extra_id_0>" to "<extra_id_99>", "</s>", "<pad>" and "<unk>" in a text become their
        special ids, as in Transformers, wherever the text comes from: a text that quotes "</s>" in
        its middle is cut there by whoever reads up to the first EOS.
        """
        if "<" not in text:
            return self._processor.encode(text)

        # SentencePiece would cut "</s>" into ordinary pieces, so each text between special tokens
        # is encoded by itself.
        ids: list[int] = []
        begin = 0
        for match in SPECIAL.finditer(text):
            ids += self._processor.encode(text[begin : match.start()])
            ids.append(self._special(match))
            begin = match.end()
        return ids + self._processor.encode(text[begin:])

    def _special(self, match: re.Match[str]) -> int:
        """Return the id of a special token that was recognised in a text."""
        sentinel, pad, eos, _ = match.groups()
        if sentinel is not None:
            return self.sentinel(int(sentinel))
        return PAD if pad else EOS if eos else self.unknown

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does; uses every core."""
        # Few texts have special tokens. Encode all in parallel, then encode these few again.
        encoded = self._processor.encode(list(texts), num_threads=-1)
        for i, text in enumerate(texts):
            if SPECIAL.search(text):
                encoded[i] = self.encode(text)
        return encoded

    def normalize(self, text: str) -> str:
        """Return a text as `decode` would write it if every character were in the vocabulary.

        T5's vocabularies apply NFKC and collapse white space: a fullwidth question mark becomes
        "?". Special tokens, which `encode` recognises in a text, are left out, and the text ends at
        "</s>". References are normalized before they are compared with texts that were decoded
        with `skip_special_tokens`.
        """
        if "<" not in text:
            return self._normalize(text)

        # A network that was trained on "the </s> cat" ends its answer behind "the".
        texts: list[str] = []
        begin = 0
        for match in SPECIAL.finditer(text):
            texts.append(self._normalize(text[begin : match.start()]))
            begin = match.end()
            token = self._special(match)
            if token == EOS:
                begin = len(text)
                break
            is_unknown = token == self.unknown
            texts.append(self._processor.decode([token]).strip() if is_unknown else "")
        texts.append(self._normalize(text[begin:]))
        return " ".join(filter(None, texts))

    def _normalize(self, text: str) -> str:
        """Return a text without special tokens as `normalize` does."""
        # NFKC makes "<extra_id_0>" of fullwidth characters. A model that holds this piece then
        # encodes it as the sentinel, which is no part of a text; any other model spells it.
        if self._holds_sentinels:
            ids = self._processor.encode(text)
            if max(ids, default=0) >= self.num_pieces:
                return self.decode(ids, skip_special_tokens=True)

        # SentencePiece writes a space as this character.
        return self._processor.normalize(text).replace("\u2581", " ").strip()

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Return the text before the first EOS, without padding.

        Sentinels read `<extra_id_k>`, or are left out with `skip_special_tokens`.
        """
        texts: list[str] = []
        pieces: list[int] = []  # ids since the last sentinel

        # Sentinels are no pieces of the model, which decodes the stretches between them.
        for token in np.asarray(ids).tolist():
            if token == EOS:
                break
            if token >= self.num_pieces:
                name = "" if skip_special_tokens else self._name(token)
                texts += [self._processor.decode(pieces), name]
                pieces = []
            else:
                pieces.append(token)
        texts.append(self._processor.decode(pieces))
        return " ".join(text for text in texts if text)

    def _name(self, token: int) -> str:
        """Return `<extra_id_k>` for a sentinel's id, and "" for a padding row of the embedding."""
        k = self.sentinel(0) - token
        return f"<extra_id_{k}>" if k >= 0 else ""


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
    return Tokenizer(model)


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


def load(path: str | os.PathLike) -> Tokenizer:
    """Read a SentencePiece model written by `train`, or any T5 `spiece.model`.

    Raises:
        UserError: naming the path, if it cannot be read, is no such model, would take too much
            memory or time (see `gqa.data.vocabulary_files`), or has other special ids than T5.
    """
    try:
        content = regular_files.read_bytes(path)
        vocabulary_files.check(content)
        tokenizer = Tokenizer(content)
        _check_ids(tokenizer)
    except UserError as error:
        raise UserError(f"vocabulary {error}") from error
    except vocabulary_files.WrongVocabulary as error:
        raise UserError(f"vocabulary {path}: {error}") from error
    except (RuntimeError, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"vocabulary {path}: not a SentencePiece model") from error
    return tokenizer


@functools.lru_cache(maxsize=4)
def count_ids(path: str) -> int:
    """Return how many ids, sentinels among them, the vocabulary of an absolute path has.

    The file is read once in a process, because a sweep asks several times for each of its points.
    """
    return load(path).sentinel(0) + 1


def _check_ids(tokenizer: Tokenizer) -> None:
    """Refuse a model whose padding, end or sentinels have other ids than in T5."""
    # Batches write padding and EOS as fixed numbers. With other ids they would be ordinary pieces.
    processor = tokenizer._processor
    ids = [processor.pad_id(), processor.eos_id()]
    if ids != [PAD, EOS]:
        raise vocabulary_files.WrongVocabulary(f"pad and eos have ids {ids}, T5 needs [0, 1]")

    # A model that holds sentinels must hold all of them, because their ids are counted from the
    # last.
    if tokenizer.num_pieces < processor.get_piece_size():
        for k in range(NUM_SENTINELS):
            if not processor.id_to_piece(tokenizer.sentinel(k)).endswith(f"<extra_id_{k}>"):
                raise vocabulary_files.WrongVocabulary(
                    f"piece {tokenizer.sentinel(k)} must be <extra_id_{k}>, because the last "
                    "piece is <extra_id_0>"
                )
