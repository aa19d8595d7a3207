"""SentencePiece text <-> ids, with T5's special ids and sentinels.

Ids are laid out as in T5: padding 0, end of sequence 1, unknown 2, the pieces of the model, then
100 sentinels counting down from the last id. The embedding is rounded up to a multiple of 128 rows.
"""

import hashlib
import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from gqa.runtime import atomic_files
from gqa.runtime.errors import UserError

PAD, EOS, UNK = 0, 1, 2
NUM_SENTINELS = 100
# Sentinels, the three special ids, a piece for each byte, each printable ASCII character and space.
SMALLEST = NUM_SENTINELS + 3 + 256 + 94 + 1


class Tokenizer:
    """A SentencePiece model with `NUM_SENTINELS` extra ids behind its pieces.

    `vocab_size` counts embedding rows (32000 pieces give 32128); the ids from
    `num_pieces + NUM_SENTINELS` up to it are never produced. `hash` identifies the model file.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.hash = hashlib.sha256(model).hexdigest()
        self.num_pieces = self._processor.get_piece_size()
        # Some copies of T5's model already end in the sentinels, as pieces 99 down to 0.
        if self._processor.id_to_piece(self.num_pieces - 1).endswith("<extra_id_0>"):
            self.num_pieces -= NUM_SENTINELS
        self.vocab_size = -(-(self.num_pieces + NUM_SENTINELS) // 128) * 128

    def sentinel(self, k: int) -> int:
        """Id of `<extra_id_k>`: the last real id minus k, e.g. 32099 - k for T5's vocabulary."""
        if not 0 <= k < NUM_SENTINELS:
            raise ValueError(f"sentinel {k} does not exist: there are {NUM_SENTINELS}")
        return self.num_pieces + NUM_SENTINELS - 1 - k

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without EOS."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without EOS; uses every core."""
        return self._processor.encode(list(texts), num_threads=-1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text before the first EOS, padding dropped; sentinels read `<extra_id_k>`."""
        texts: list[str] = []
        pieces: list[int] = []  # ids since the last sentinel
        for token in np.asarray(ids).tolist():
            if token == EOS:
                break
            if token >= self.num_pieces:
                texts += [self._processor.decode(pieces), self._name(token)]
                pieces = []
            else:
                pieces.append(token)
        texts.append(self._processor.decode(pieces))
        return " ".join(text for text in texts if text)

    def _name(self, token: int) -> str:
        """A sentinel by its number; nothing for a padding row of the embedding."""
        k = self.sentinel(0) - token
        return f"<extra_id_{k}>" if k >= 0 else ""


def train(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> Tokenizer:
    """Fit a unigram model on `texts`, write it to `path` and return it.

    `vocab_size` counts the sentinels: 4096 gives 3996 pieces. Bytes are the fallback for rare
    characters, so nothing becomes unknown; whitespace is normalised as T5 does (newline = space).
    """
    path = pathlib.Path(path)
    model = io.BytesIO()
    # Bounded fragments: SentencePiece silently skips any "sentence" longer than 4192 bytes.
    fragments = (
        line[i : i + 1000]
        for t in texts
        for line in t.split("\n")
        if line.strip()
        for i in range(0, len(line), 1000)
    )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=fragments,
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - NUM_SENTINELS,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars="".join(map(chr, range(33, 127))),
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            num_threads=2,  # part of the result: partial sums are per thread
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_advice(str(error), vocab_size)) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(path, model.getvalue())
    return Tokenizer(model.getvalue())


def _advice(error: str, vocab_size: int) -> str:
    """SentencePiece's complaint about a size, in terms of ours."""
    if size := re.search(r"<= (\d+)", error):
        most = int(size[1]) + NUM_SENTINELS
        return f"vocab_size={vocab_size} is too large for the training text: use at most {most}"
    if size := re.search(r"vs (\d+)", error):
        least = int(size[1]) + NUM_SENTINELS
        return f"vocab_size={vocab_size} is too small: use at least {least}"
    return f"no vocabulary can be trained on this text: {' '.join(error.split())}"


def load(path: str | os.PathLike) -> Tokenizer:
    """Read a SentencePiece model written by `train`, or any T5 `spiece.model`."""
    try:
        tokenizer = Tokenizer(pathlib.Path(path).read_bytes())
    except (OSError, RuntimeError, IndexError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a SentencePiece model"
        raise UserError(f"vocabulary {path}: {reason}") from error
    ids = [tokenizer._processor.pad_id(), tokenizer._processor.eos_id()]
    if ids != [PAD, EOS]:
        raise UserError(f"vocabulary {path}: pad and eos have ids {ids}, T5 needs [{PAD}, {EOS}]")
    return tokenizer
