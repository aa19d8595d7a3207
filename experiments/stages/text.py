"""From a config's names of tasks and files to token ids: corpus, vocabulary, examples."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.stages.settings import Recipe, TextSettings
from gqa.data import batching, corpus, span_corruption, tasks, token_cache, tokenizer
from gqa.data.corpus_packages import DEFAULT_PACKAGES
from gqa.data.examples import SPLITS, Example, TokenPair
from gqa.runtime.distributed import primary_first
from gqa.runtime.errors import UserError

VOCABULARY_TEXTS = 1_000_000  # the first so many make a vocabulary


class Text(NamedTuple):
    """A vocabulary, and where the tasks' texts come from.

    `share` is which part of every batch this process reads, and of how many.
    """

    tokenizer: tokenizer.Tokenizer
    corpus: corpus.Corpus | None
    options: dict[str, dict]
    folder: Path
    share: tuple[int, int] = (0, 1)

    def examples(self, task: str, split: str) -> Sequence:
        """Examples of a task, or documents."""
        return tasks.get(task).load(split, corpus=self.corpus, **self.options.get(task, {}))

    def parts(self, task: str) -> list[tuple[Sequence, float]]:
        """The same of the training split, in the parts of a mixture with their weights."""
        return tasks.parts(task, corpus=self.corpus, **self.options.get(task, {}))

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, kept on disk."""
        with primary_first("tokens"):
            return token_cache.tokenize(texts, self.tokenizer, self.folder / "tokens")

    def pairs(self, examples: list[Example]) -> list[TokenPair]:
        """Token ids of each example's inputs and first target."""
        with primary_first("tokens"):
            return token_cache.tokenize_examples(examples, self.tokenizer, self.folder / "tokens")

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


def settings(config: ConfigDict) -> TextSettings:
    """Return what `prepare` is to prepare for a config."""
    vocabulary = config.text.vocabulary
    names = sorted(set(task_names(config)))
    return TextSettings(
        packages=_packages(config),
        vocabulary=vocabulary and os.path.abspath(vocabulary),
        vocab_size=config.model.vocab_size,
        pretraining=config.pretrain.task,
        tasks=tuple(names),
        options={name: _options(config, name) for name in names},
    )


def _options(config: ConfigDict, task: str) -> dict:
    """What a task is told, beside the split."""
    if task in tasks.names() and "data_dir" in tasks.option_names(task):
        return {"data_dir": config.text.data_dir and os.path.abspath(config.text.data_dir)}
    if task not in ("files", "documents"):
        return {}
    section = config[task].to_dict()
    for split in section.keys() & {*SPLITS}:
        section[split] = ",".join(map(os.path.abspath, split_names(section[split])))
    if "metrics" in section:
        section["metrics"] = split_names(section["metrics"])
    return section


def lengths(finetune: ConfigDict, task: str) -> dict[str, int]:
    """inputs_length and targets_length of a task: its own where the config's section has 0."""
    own = getattr(tasks.get(task), "LENGTHS", tasks.LENGTHS)
    keys = ("inputs_length", "targets_length")
    return {key: finetune[key] or length for key, length in zip(keys, own, strict=True)}


def check(config: ConfigDict) -> None:
    """Refuse unknown tasks, unreadable files and packages that are not installed."""
    wanted = settings(config)
    for name in dict.fromkeys(task_names(config)):
        for report in tasks.check(name, **wanted.options[name]):
            print(f"task {name}: {report}; left out")
    for name in split_names(config.finetune.tasks):
        if not hasattr(tasks.get(name), "METRICS"):
            raise UserError(f"finetune.tasks: {name} has documents, not examples to fine-tune on")
    if wanted.vocabulary:
        tokenizer.load(wanted.vocabulary)
    if _needs_corpus(wanted):
        corpus.distributions(wanted.packages)
    span_corruption.span_lengths(config.pretrain.inputs_length)


def _needs_corpus(wanted: TextSettings) -> bool:
    return any(map(tasks.needs_corpus, wanted.tasks))


def _packages(config: ConfigDict) -> tuple[str, ...]:
    """Names of the corpus packages; by default the same ones on every machine."""
    if config.text.packages:
        return split_names(config.text.packages)
    return DEFAULT_PACKAGES


def prepare(wanted: TextSettings, workdir: Path) -> Text:
    """Build, or read back, what the `settings` of a config name, in `workdir`/text."""
    with primary_first("text"):
        return _prepare(wanted, workdir)


def _prepare(wanted: TextSettings, workdir: Path) -> Text:
    folder = workdir / "text"
    built = None
    if _needs_corpus(wanted):
        built = corpus.build(folder / "corpus", wanted.packages)
    vocabulary = _vocabulary(wanted, built, folder)
    return Text(vocabulary, built, wanted.options, folder)


def is_prepared(wanted: TextSettings, workdir: Path) -> bool:
    """Whether `prepare` would only read."""
    folder, built = workdir / "text", None
    if _needs_corpus(wanted):
        built = corpus.find(folder / "corpus", wanted.packages)
        if built is None:
            return False
    source = _source(wanted.pretraining, built, wanted.options)
    return bool(wanted.vocabulary) or _vocabulary_path(wanted, source, folder).exists()


def _source(task: str, built: corpus.Corpus | None, options: dict[str, dict]) -> str:
    if tasks.needs_corpus(task):
        return built.manifest["sha256"]
    return _hash(tasks.get(task).fingerprint(**options[task]))


def _vocabulary(
    wanted: TextSettings, built: corpus.Corpus | None, folder: Path
) -> tokenizer.Tokenizer:
    """Load the vocabulary, or train one on the pretraining text and keep it in `folder`."""
    if wanted.vocabulary:
        return tokenizer.load(wanted.vocabulary)
    task, options = wanted.pretraining, wanted.options
    path = _vocabulary_path(wanted, _source(task, built, options), folder)
    if path.exists():
        return tokenizer.load(path)

    texts = tasks.get(task).load("train", corpus=built, **options.get(task, {}))[:VOCABULARY_TEXTS]
    if isinstance(texts[0], Example):
        texts = [part for example in texts for part in (example.inputs, *example.targets)]
    return tokenizer.train(texts, wanted.vocab_size, path)


def _vocabulary_path(wanted: TextSettings, source: str, folder: Path) -> Path:
    key = _hash([source, wanted.vocab_size, wanted.pretraining])
    return folder / f"vocabulary-{key[:12]}.model"


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Training(NamedTuple):
    """Batches to train on, without end, and the same validation batches each time.

    `lengths` are those of a batch: inputs_length and targets_length.
    """

    batches: object
    lengths: dict[str, int]
    validation: Callable[[], Iterator]
    validation_size: int


def training(text: Text, recipe: Recipe) -> Training:
    """Return the data to train on: span corruption of documents, or examples as they are."""
    shape = {"inputs_length": recipe.inputs_length, "targets_length": recipe.targets_length}
    stream = {"batch_size": recipe.batch_size, "seed": recipe.seed, "shard": text.share}
    limit = recipe.validation_examples
    train, weights = zip(*text.parts(recipe.task), strict=True)
    validation = text.examples(recipe.task, "validation")
    if isinstance(train[0][0], Example):
        pairs = [text.pairs(part) for part in train]
        batches = batching.finetuning_batches(pairs, weights, **shape, **stream, pack=recipe.pack)
        held_out = text.pairs(validation[:limit])
    else:
        shape["targets_length"] = span_corruption.span_lengths(recipe.inputs_length).targets
        first_sentinel = text.tokenizer.sentinel(0)
        corruption = {"inputs_length": shape["inputs_length"], "first_sentinel": first_sentinel}
        if isinstance(train[0], list):
            tokens = [np.concatenate(text.ids(part)) for part in train]
            batches = batching.pretraining_batches(tokens, weights, **corruption, **stream)
        else:
            encode = text.tokenizer.encode
            batches = batching.streamed_pretraining_batches(*train, encode, **corruption, **stream)
        held_out = span_corruption.held_out_pairs(
            np.concatenate(text.ids(validation)), **corruption, seed=0
        )[:limit]
    evaluation = functools.partial(
        batching.evaluation_batches,
        held_out,
        **shape,
        batch_size=recipe.batch_size,
        shard=text.share,
    )
    return Training(batches, shape, evaluation, len(held_out))
