"""What a task gives: examples, each of one input and its reference targets, in three splits."""

from typing import NamedTuple

SPLITS = ("train", "validation", "test")


class Example(NamedTuple):
    """Texts in and out; the first target is trained on, all of them are references."""

    inputs: str
    targets: tuple[str, ...]
