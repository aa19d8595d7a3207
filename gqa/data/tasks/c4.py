"""Pretraining text of T5: web pages in English (C4), each read when it is needed."""

import grain

from gqa.data import tfds
from gqa.runtime.errors import UserError

DATASET = "c4/en"
SPLITS = ("train", "validation")
VALIDATION = 10_000  # documents of the validation split, some 5 million tokens


def load(split: str, *, corpus=None, data_dir: str = "") -> grain.MapDataset | list[str]:
    """Return documents: a sequence read from disk for training, else a list of the first."""
    del corpus  # every task takes it
    records = tfds.records(DATASET, data_dir, split)
    if split == "train":
        return grain.MapDataset.source(records).map(lambda row: row["text"])
    return [records[i]["text"] for i in range(min(len(records), VALIDATION))]


def check(*, data_dir: str = "") -> list:
    """Refuse a folder that is missing or is not C4."""
    for split in SPLITS:
        if not isinstance(tfds.records(DATASET, data_dir, split)[0].get("text"), str):
            raise UserError(f"{tfds.find(DATASET, data_dir)}: not the features of {DATASET}")
    return []


def fingerprint(*, data_dir: str = "") -> list:
    """Return what determines the documents, as JSON."""
    return tfds.describe(DATASET, data_dir)
