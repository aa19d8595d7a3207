"""Text <-> ids by a tokenizer.json, for folders of Hugging Face without a SentencePiece file.

The library `tokenizers` does the work, as it does for Transformers. The class has the methods of
`gqa.data.tokenizer.Tokenizer`.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import tokenizers

from gqa.data import added_tokens
from gqa.data.added_tokens import AddedTokens
from gqa.data.vocabulary_files import WrongVocabulary
from gqa.model.special_tokens import SpecialTokens


class FastTokenizer:
    """The tokenizer of a tokenizer.json, with the attributes of `gqa.data.tokenizer.Tokenizer`."""

    def __init__(self, content: bytes, added: AddedTokens):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing more special
            raise WrongVocabulary(f"not a tokenizer: {' '.join(str(error).split())}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

        for token, number in added.ids.items():
            if self._tokenizer.token_to_id(token) != number:
                raise WrongVocabulary(
                    f"a file beside it gives {token} the id {number}; it does not"
                )
        pad, eos = (self._tokenizer.token_to_id(name) for name in (added.pad, added.eos))
        if pad is None or eos is None:
            raise WrongVocabulary(f"it has no {added.pad if pad is None else added.eos}")

        self.special = SpecialTokens(pad, eos, pad)
        self.hash = hashlib.sha256(content).hexdigest()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.num_ids = 1 + max(ids.values())
        self.vocab_size = -(-self.num_ids // 128) * 128
        self.sentinels = added_tokens.sentinels(ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without EOS at the end.

        Other tokens that the file puts around every text, such as a first `<s>`, are kept.
        """
        return self._without_eos(self._tokenizer.encode(text).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does; uses every core."""
        encoded = self._tokenizer.encode_batch(list(texts))
        return [self._without_eos(text.ids) for text in encoded]

    def _without_eos(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.special.eos else ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Return the text before the first EOS, without padding and without a first `<s>`."""
        kept: list[int] = []
        for token in np.asarray(ids).tolist():
            if token == self.special.eos:
                break
            if token != self.special.pad and token < self.num_ids:
                kept.append(token)
        return self._tokenizer.decode(kept, skip_special_tokens=skip_special_tokens)

    def normalize(self, text: str) -> str:
        """Return a text as `decode` would write it with `skip_special_tokens`."""
        return self.decode(self.encode(text), skip_special_tokens=True)
