"""Splits that share files or rows, so that scores would be of texts seen in training.

`gqa.data.user_files` says which files a split has and what their rows are.
"""

import itertools

import numpy as np

from gqa.data import user_files
from gqa.data.examples import SPLITS
from gqa.runtime import file_hashes
from gqa.runtime.errors import UserError


def check_files(options: dict) -> None:
    """Refuse a file that two splits name, under whatever name or link, or as a copy.

    Raises:
        UserError: naming the file and the splits.
    """
    splits: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        if not options.get(split):
            continue
        entries = user_files.entries(options[split], split)
        for file in {file for entry in entries for file in entry.files}:
            # The first split with these contents keeps them.
            other, first = splits.setdefault(file_hashes.sha256(file), (split, file))
            if other != split:
                raise UserError(
                    f"{file}: {split} has the same contents as {first} of {other}, so that scores "
                    "would be of texts seen in training; give each split files of its own"
                )


def check_rows(rows: dict[str, list[int]]) -> list[str]:
    """Return a line for each two splits that share rows, in files of any name, format or order.

    Args:
        rows: for every split, the hash of each of its rows. 64 bits are enough to count with, and
            much less than the text.

    Raises:
        UserError: if two splits have the same rows.
    """
    numbers = {split: np.array(hashes, np.int64) for split, hashes in rows.items()}
    lines = []
    for first, second in itertools.combinations(numbers, 2):
        is_shared = np.isin(numbers[second], numbers[first])
        if is_shared.size and is_shared.all() and np.isin(numbers[first], numbers[second]).all():
            raise UserError(
                f"{second} has the same rows as {first}, in other files, so that scores would be "
                "of texts seen in training; give each split rows of its own"
            )
        if is_shared.any():
            lines.append(
                f"{is_shared.sum()} of {is_shared.size} rows of {second} are rows of {first}, too; "
                "scores should be of texts that are in no other split"
            )
    return lines
