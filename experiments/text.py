"""From a config's names of tasks and files to token ids: corpus, vocabulary, examples."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gqa import corpus, data, tasks, tokenizer
from gqa.errors import UserError

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


class Text(NamedTuple):
    """A vocabulary, and where the tasks' texts come from; `hash` identifies all of it."""

    tokenizer: tokenizer.Tokenizer
    corpus: corpus.Corpus | None
    options: dict[str, dict]
    folder: Path
    hash: str

    def examples(self, task: str, split: str) -> list:
        """Examples of a task, or documents."""
        return tasks.get(task).load(split, corpus=self.corpus, **self.options.get(task, {}))

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, kept on disk."""
        return data.tokenize(texts, self.tokenizer, self.folder / "tokens")

    def pairs(self, examples: list[tasks.Example]) -> list[data.Pair]:
        """Token ids of each example's inputs and first target."""
        return data.tokenize_examples(examples, self.tokenizer, self.folder / "tokens")


def task_options(config: ConfigDict) -> dict[str, dict]:
    """Options of the tasks that have any: `files` has the user's paths and columns."""
    files = dict(config.files)
    files["metrics"] = split_names(files["metrics"])
    return {"files": files}


def split_names(text: str) -> tuple[str, ...]:
    """Names of a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def task_names(config: ConfigDict) -> tuple[str, ...]:
    """Every task a config trains on, pretraining first."""
    return (config.pretrain.task, *split_names(config.finetune.tasks))


def check(config: ConfigDict) -> None:
    """Refuse unknown tasks, unreadable files and packages that are not installed."""
    if not split_names(config.finetune.tasks):
        raise UserError(f"finetune.tasks names no task; use {', '.join(tasks.names())}")
    for name in task_names(config):
        tasks.check(name, **task_options(config).get(name, {}))
    for name in split_names(config.finetune.tasks):
        if not hasattr(tasks.get(name), "METRICS"):
            raise UserError(f"finetune.tasks: {name} has documents, not examples to fine-tune on")
    if config.text.vocabulary:
        tokenizer.load(config.text.vocabulary)
    if _needs_corpus(config):
        corpus.distributions(_packages(config))
    data.span_lengths(config.pretrain.inputs_length)


def _needs_corpus(config: ConfigDict) -> bool:
    return any(name != "files" for name in task_names(config))


def _packages(config: ConfigDict) -> tuple[str, ...]:
    """Names of the corpus packages; by default the pinned ones, the same on every machine."""
    if config.text.packages:
        return split_names(config.text.packages)
    pins = [line for line in REQUIREMENTS.read_text().splitlines() if line[:1].isalpha()]
    return tuple(pin.split("==")[0].split("[")[0] for pin in pins)


def prepare(config: ConfigDict, workdir: Path) -> Text:
    """Build, or read back, what the config's tasks need in `workdir`/text."""
    folder, options = workdir / "text", task_options(config)
    built = corpus.build(folder / "corpus", _packages(config)) if _needs_corpus(config) else None
    sources = {"corpus": built.manifest["sha256"] if built else None}
    if "files" in task_names(config):
        paths = [config.files[split] for split in tasks.SPLITS if config.files[split]]
        sources["files"] = [_sha256(path) for path in paths] + [sorted(config.files.items())]
    text = Text(None, built, options, folder, "")
    vocabulary = _vocabulary(config, text, sources)
    sources["vocabulary"] = vocabulary.hash
    return text._replace(tokenizer=vocabulary, hash=_hash(sources))


def _vocabulary(config: ConfigDict, text: Text, sources: dict) -> tokenizer.Tokenizer:
    if config.text.vocabulary:
        return tokenizer.load(config.text.vocabulary)
    size, task = config.model.vocab_size, config.pretrain.task
    path = text.folder / f"vocabulary-{_hash([sources, size, task])[:12]}.model"
    if path.exists():
        return tokenizer.load(path)
    texts = text.examples(task, "train")
    if isinstance(texts[0], tasks.Example):
        texts = [part for example in texts for part in (example.inputs, *example.targets)]
    return tokenizer.train(texts, size, path)


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Training(NamedTuple):
    """Batches to train on, without end, and the same validation batches each time.

    `lengths` are those of a batch: inputs_length and targets_length.
    """

    batches: object
    lengths: dict[str, int]
    validation: Callable[[], Iterator]
    validation_size: int


def training(text: Text, task: str, recipe: dict, seed: int) -> Training:
    """The data of a training stage: span corruption of documents, or examples as they are.

    `recipe` is a config's section pretrain or finetune, as a dict.
    """
    shape = {name: recipe[name] for name in ("inputs_length", "targets_length")}
    shard = (jax.process_index(), jax.process_count())
    stream = {"batch_size": recipe["batch_size"], "seed": seed, "shard": shard}
    limit = recipe["validation_examples"]
    train, validation = (text.examples(task, split) for split in ("train", "validation"))
    if isinstance(train[0], tasks.Example):
        batches = data.seq2seq(text.pairs(train), **shape, **stream, pack=recipe.get("pack", False))
        held_out = text.pairs(validation[:limit])
    else:
        shape["targets_length"] = data.span_lengths(recipe["inputs_length"]).targets
        first_sentinel = text.tokenizer.sentinel(0)
        corruption = {"inputs_length": shape["inputs_length"], "first_sentinel": first_sentinel}
        batches = data.pretrain(np.concatenate(text.ids(train)), **corruption, **stream)
        held_out = data.corrupted(np.concatenate(text.ids(validation)), **corruption, seed=0)[
            :limit
        ]
    evaluation = functools.partial(
        data.evaluation, held_out, **shape, batch_size=recipe["batch_size"], shard=shard
    )
    return Training(batches, shape, evaluation, len(held_out))
