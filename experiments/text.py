"""From a config's names of tasks and files to token ids: corpus, vocabulary, examples."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gqa import corpus, data, tasks, tokenizer
from gqa.distributed import primary_first
from gqa.errors import UserError

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


class Text(NamedTuple):
    """A vocabulary, and where the tasks' texts come from.

    `share` is which part of every batch this process reads, and of how many.
    """

    tokenizer: tokenizer.Tokenizer
    corpus: corpus.Corpus | None
    options: dict[str, dict]
    folder: Path
    share: tuple[int, int] = (0, 1)

    def examples(self, task: str, split: str) -> list:
        """Examples of a task, or documents."""
        return tasks.get(task).load(split, corpus=self.corpus, **self.options.get(task, {}))

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, kept on disk."""
        with primary_first("tokens"):
            return data.tokenize(texts, self.tokenizer, self.folder / "tokens")

    def pairs(self, examples: list[tasks.Example]) -> list[data.Pair]:
        """Token ids of each example's inputs and first target."""
        with primary_first("tokens"):
            return data.tokenize_examples(examples, self.tokenizer, self.folder / "tokens")

    def source(self, task: str) -> str:
        """A hash of what the task's text is made from: not of where that lies."""
        return _source(task, self.corpus, self.options)

    def metrics(self, task: str) -> list[str]:
        """Names of the metrics that the task is scored by."""
        return list(tasks.scoring(task, **self.options.get(task, {}))[0])


def split_names(text: str) -> tuple[str, ...]:
    """Names of a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def task_names(config: ConfigDict) -> tuple[str, ...]:
    """Every task a config trains on, pretraining first."""
    return (config.pretrain.task, *split_names(config.finetune.tasks))


def settings(config: ConfigDict) -> dict:
    """What `prepare` is to prepare, as JSON; paths are absolute."""
    files = config.files.to_dict()
    files["metrics"] = split_names(files["metrics"])
    for key in ("train", "validation", "test"):
        files[key] = files[key] and os.path.abspath(files[key])
    vocabulary = config.text.vocabulary
    return {
        "packages": list(_packages(config)),
        "vocabulary": vocabulary and os.path.abspath(vocabulary),
        "vocab_size": config.model.vocab_size,
        "pretraining": config.pretrain.task,
        "tasks": sorted(set(task_names(config))),
        "options": {"files": files} if "files" in task_names(config) else {},
    }


def check(config: ConfigDict) -> None:
    """Refuse unknown tasks, unreadable files and packages that are not installed."""
    if not split_names(config.finetune.tasks):
        raise UserError(f"finetune.tasks names no task; use {', '.join(tasks.names())}")
    wanted = settings(config)
    for name in dict.fromkeys(task_names(config)):
        tasks.check(name, **wanted["options"].get(name, {}))
    for name in split_names(config.finetune.tasks):
        if not hasattr(tasks.get(name), "METRICS"):
            raise UserError(f"finetune.tasks: {name} has documents, not examples to fine-tune on")
    if wanted["vocabulary"]:
        tokenizer.load(wanted["vocabulary"])
    if _needs_corpus(wanted):
        corpus.distributions(wanted["packages"])
    data.span_lengths(config.pretrain.inputs_length)


def _needs_corpus(wanted: dict) -> bool:
    return any(name != "files" for name in wanted["tasks"])


def _packages(config: ConfigDict) -> tuple[str, ...]:
    """Names of the corpus packages; by default the pinned ones, the same on every machine."""
    if config.text.packages:
        return split_names(config.text.packages)
    pins = [line for line in REQUIREMENTS.read_text().splitlines() if line[:1].isalpha()]
    return tuple(pin.split("==")[0].split("[")[0] for pin in pins)


def prepare(wanted: dict, workdir: Path) -> Text:
    """Build, or read back, what the `settings` of a config name, in `workdir`/text."""
    with primary_first("text"):
        return _prepare(wanted, workdir)


def _prepare(wanted: dict, workdir: Path) -> Text:
    folder, options = workdir / "text", wanted["options"]
    built = None
    if _needs_corpus(wanted):
        built = corpus.build(folder / "corpus", wanted["packages"])
    text = Text(None, built, options, folder)
    return text._replace(tokenizer=_vocabulary(wanted, text))


def is_prepared(wanted: dict, workdir: Path) -> bool:
    """Whether `prepare` would only read."""
    folder, found = workdir / "text", None
    if _needs_corpus(wanted):
        found = corpus.find(folder / "corpus", wanted["packages"])
        if found is None:
            return False
    source = _source(wanted["pretraining"], found, wanted["options"])
    return bool(wanted["vocabulary"]) or _vocabulary_path(wanted, source, folder).exists()


def _source(task: str, built: corpus.Corpus | None, options: dict[str, dict]) -> str:
    if task != "files":
        return built.manifest["sha256"]
    files = options["files"]
    contents = {split: _sha256(files[split]) for split in tasks.SPLITS if files[split]}
    return _hash([contents, *(files[key] for key in ("source", "target", "prefix"))])


def _vocabulary(wanted: dict, text: Text) -> tokenizer.Tokenizer:
    if wanted["vocabulary"]:
        return tokenizer.load(wanted["vocabulary"])
    task = wanted["pretraining"]
    path = _vocabulary_path(wanted, text.source(task), text.folder)
    if path.exists():
        return tokenizer.load(path)
    texts = text.examples(task, "train")
    if isinstance(texts[0], tasks.Example):
        texts = [part for example in texts for part in (example.inputs, *example.targets)]
    return tokenizer.train(texts, wanted["vocab_size"], path)


def _vocabulary_path(wanted: dict, source: str, folder: Path) -> Path:
    key = _hash([source, wanted["vocab_size"], wanted["pretraining"]])
    return folder / f"vocabulary-{key[:12]}.model"


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
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
    stream = {"batch_size": recipe["batch_size"], "seed": seed, "shard": text.share}
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
        data.evaluation, held_out, **shape, batch_size=recipe["batch_size"], shard=text.share
    )
    return Training(batches, shape, evaluation, len(held_out))
