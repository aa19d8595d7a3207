"""Texts to token ids, kept on disk so that each text is encoded only once.

The vocabulary itself is in `gqa.data.tokenizer`; batches are made from the ids in
`gqa.data.batching`.
"""

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np

from gqa.data.examples import Example, TokenPair
from gqa.data.tokenizer import Vocabulary
from gqa.runtime import atomic_files, regular_files

FORMAT = 2  # raise it when a vocabulary gives other ids for the same text


def tokenize(
    texts: Sequence[str], tokenizer: Vocabulary, folder: str | os.PathLike
) -> list[np.ndarray]:
    """Return the int32 token ids [n] of each text, without EOS.

    The ids are read from `folder` if the same texts were encoded with the same vocabulary before.
    Otherwise they are written there.
    """
    # The length of each text is part of the key, so that ["ab", "c"] and ["a", "bc"] differ.
    key = hashlib.sha256(f"{FORMAT} {tokenizer.hash}".encode())
    for text in texts:
        key.update(len(text).to_bytes(8, "little") + text.encode())
    path = pathlib.Path(folder) / f"tokens-{key.hexdigest()[:16]}.npz"

    cached = _read_tokens(path, len(texts))
    if cached is not None:
        return cached

    encoded = [np.array(ids, np.int32) for ids in tokenizer.encode_batch(texts)]
    _write_tokens(path, encoded)
    return encoded


def tokenize_examples(
    examples: Sequence[Example], tokenizer: Vocabulary, folder: str | os.PathLike
) -> list[TokenPair]:
    """Return the token ids of each example's inputs and first target, as `tokenize` does."""
    inputs = tokenize([example.inputs for example in examples], tokenizer, folder)
    targets = tokenize([example.targets[0] for example in examples], tokenizer, folder)
    return list(zip(inputs, targets, strict=True))


def _read_tokens(path: pathlib.Path, count: int) -> list[np.ndarray] | None:
    """Read the ids of `count` texts from `path`; None if the file is missing or damaged."""
    try:
        with regular_files.open_regular(path) as content:
            # `testzip` compares all checksums, so that even one changed bit is noticed. Nothing
            # that is written here is compressed, so the arrays cannot be larger than the file.
            with zipfile.ZipFile(content) as file:
                is_compressed = any(part.compress_type for part in file.infolist())
                if is_compressed or file.testzip() is not None:
                    return None
            content.seek(0)
            with np.load(content) as arrays:
                ids, lengths = arrays["ids"], arrays["lengths"]
    except Exception:  # a damaged zip file raises a dozen exception types; all mean: encode again
        return None

    # The arrays may be others than those of `_write_tokens`, with the right checksums.
    is_ours = (ids.dtype, lengths.dtype, ids.ndim, lengths.ndim) == (np.int32, np.int64, 1, 1)
    if not is_ours or (lengths < 0).any():
        return None
    is_complete = len(lengths) == count and len(ids) == lengths.sum()
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.split(ids, ends)[:-1] if is_complete else None


def _write_tokens(path: pathlib.Path, encoded: Sequence[np.ndarray]) -> None:
    """Write the ids of all texts as one array, with the length of each text beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.writing(path) as temporary, open(temporary, "wb") as file:
        # The empty array gives the result its type even if there are no texts.
        ids = np.concatenate([np.zeros(0, np.int32), *encoded])
        np.savez(file, ids=ids, lengths=np.array([len(text) for text in encoded], np.int64))
