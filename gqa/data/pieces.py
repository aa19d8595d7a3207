"""How a stretch of text without special tokens becomes ids: SentencePiece's pieces, or bytes.

`gqa.data.tokenizer` recognises special tokens in a text, and hands the stretches between them to
one of these classes.
"""

from collections.abc import Sequence

import sentencepiece

from gqa.data.vocabulary_files import WrongVocabulary

BYTES, FIRST_BYTE = 256, 3  # ByT5: padding, end and unknown come before the bytes


class SentencePieces:
    """The pieces of a SentencePiece model.

    Attributes:
        separator: stands between stretches of text that were decoded by themselves.
    """

    separator = " "

    def __init__(self, model: bytes):
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; uses every core."""
        return self.processor.encode(list(texts), num_threads=-1)

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids."""
        return self.processor.decode(ids)

    def normalize(self, text: str) -> str:
        """Return a text as `decode` would write it if every character were in the vocabulary."""
        # SentencePiece writes a space as this character.
        return self.processor.normalize(text).replace("\u2581", " ").strip()

    def find(self, piece: str) -> int:
        """Return the id of a piece.

        Raises:
            WrongVocabulary: if there is none of this text.
        """
        token = self.processor.piece_to_id(piece)
        if self.processor.id_to_piece(token) != piece:
            raise WrongVocabulary(f"neither a piece nor a file beside it has the token {piece}")
        return token

    def num_sentinels(self) -> int:
        """Return how many sentinels the model ends in, of which `<extra_id_0>` is the last."""
        size = self.processor.get_piece_size()
        count = 0
        while count < size and self.processor.id_to_piece(size - 1 - count).endswith(
            f"<extra_id_{count}>"
        ):
            count += 1
        return count


class Bytes:
    """The bytes of UTF-8, as in ByT5: byte b has the id b + 3. Broken characters are left out."""

    separator = ""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [byte + FIRST_BYTE for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids."""
        values = (token - FIRST_BYTE for token in ids if token >= FIRST_BYTE)
        return bytes(values).decode(errors="ignore")

    def normalize(self, text: str) -> str:
        """Return the text: bytes keep every character."""
        return text
