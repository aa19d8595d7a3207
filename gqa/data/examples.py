"""The form in which every task hands over its data, as texts and as token ids."""

from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validation", "test")

# Token ids of one example's inputs [n] and targets [m], both int32 and without EOS.
TokenPair = tuple[np.ndarray, np.ndarray]


class Example(NamedTuple):
    """One input text with its target texts.

    Training uses the first target. Evaluation takes all of them as references.
    """

    inputs: str
    targets: tuple[str, ...]
