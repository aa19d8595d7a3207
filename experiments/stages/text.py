"""The text of a run: from the names of tasks and files to token ids and batches.

`gqa/data/tasks/` reads the examples of a task, and `gqa/data/batching.py` makes rows into batches.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.stages.settings import Recipe, TextSettings
from gqa.data import batching, corpus, span_corruption, tasks, token_cache, tokenizer
from gqa.data.corpus_packages import DEFAULT_PACKAGES
from gqa.data.examples import SPLITS, Example, TokenPair
from gqa.runtime import file_hashes
from gqa.runtime.distributed import primary_first
from gqa.runtime.errors import UserError, renamed_fields

# A vocabulary is trained on at most this many texts, the first ones.
VOCABULARY_TEXTS = 1_000_000
ROWS = 16  # the embedding's are a multiple of this where the config leaves them open


class Text(NamedTuple):
    """The vocabulary of a run, and the texts of its tasks.

    Args:
        corpus: the default corpus; None if no task reads it.
        options: the keyword arguments of each task's module.
        folder: WORKDIR/text, where corpus, vocabulary and token ids are kept.
        share: (index, count): this process reads part `index` of the `count` parts of every batch.
        promised: the hashes of the texts that a stage was planned with, by TASK/training or
            TASK/test.
    """

    tokenizer: tokenizer.Vocabulary
    corpus: corpus.Corpus | None
    options: dict[str, dict]
    folder: Path
    share: tuple[int, int] = (0, 1)
    promised: Mapping[str, str] = types.MappingProxyType({})

    def examples(self, task: str, split: str) -> Any:
        """Return the examples of a task, or its documents.

        Raises:
            UserError: if the text is not the one that was promised.
        """
        with self._as_promised(task, "test" if split == "test" else "training"):
            return tasks.get(task).load(split, corpus=self.corpus, **self.options.get(task, {}))

    def parts(self, task: str) -> list[tuple[Any, float]]:
        """Return the training texts of a task, in the parts of a mixture with their weights.

        Raises:
            UserError: if the text is not the one that was promised.
        """
        with self._as_promised(task, "training"):
            return tasks.parts(task, corpus=self.corpus, **self.options.get(task, {}))

    @contextlib.contextmanager
    def _as_promised(self, task: str, part: str) -> Iterator[None]:
        """Refuse a text that was replaced by another one before or while it is read."""
        self._check(task, part)
        yield
        self._check(task, part)

    def _check(self, task: str, part: str) -> None:
        source = self.training_source if part == "training" else self.source
        promised = self.promised.get(f"{task}/{part}")
        # A stage's key holds the hash of its text. With another text the result would lie under a
        # key that promises the old one.
        if promised is not None and promised != source(task):
            raise UserError(
                f"the text of task {task} has changed since this stage was planned; put the old "
                "text back, or run the same command again, which plans with the new text"
            )

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text; they are kept on disk."""
        with primary_first("tokens"):
            return token_cache.tokenize(texts, self.tokenizer, self.folder / "tokens")

    def pairs(self, examples: list[Example]) -> list[TokenPair]:
        """Return the token ids of each example's inputs and first target."""
        with primary_first("tokens"):
            return token_cache.tokenize_examples(examples, self.tokenizer, self.folder / "tokens")

    def source(self, task: str) -> str:
        """Return a hash of the contents of the task's text, whatever folder the text lies in."""
        return _source(task, self.corpus, self.options)

    def training_source(self, task: str) -> str:
        """Return a hash as `source` does, but of the splits train and validation alone.

        So another test file changes no training. A task that has all splits in one place, such as
        the default corpus, has one hash for all.
        """
        options = {key: value for key, value in self.options.get(task, {}).items() if key != "test"}
        return _source(task, self.corpus, {task: options})

    def metrics(self, task: str) -> list[str]:
        """Return the names of the metrics that the task is scored by."""
        return list(tasks.scoring(task, **self.options.get(task, {}))[0])


def split_names(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def task_names(config: ConfigDict) -> tuple[str, ...]:
    """Return every task that a config trains on, the pretraining task first."""
    return (config.pretrain.task, *split_names(config.finetune.tasks))


def settings(config: ConfigDict) -> TextSettings:
    """Return the text that a config asks for, to be made by `prepare`."""
    vocabulary = config.text.vocabulary
    kind, size = _vocabulary_shape(config)
    names = sorted(set(task_names(config)))
    return TextSettings(
        packages=_packages(config),
        # Paths are absolute because a stage may run in a process with another working directory.
        vocabulary=vocabulary and os.path.abspath(vocabulary),
        vocabulary_model=kind,
        vocab_size=size,
        pretraining=config.pretrain.task,
        tasks=tuple(names),
        options={name: _options(config, name) for name in names},
    )


def model_section(config: ConfigDict) -> dict[str, Any]:
    """Return the config's section `model`, with what it leaves to the vocabulary.

    A `vocab_size` of 0 is the vocabulary's, rounded up so that devices can split the rows. The ids
    of special tokens are the given vocabulary's, unless they were taken from a checkpoint.
    """
    rows = -(-_vocabulary_shape(config)[1] // ROWS) * ROWS
    path = config.text.vocabulary
    tokens = tokenizer.shape(os.path.abspath(path)).special.fields if path else {}
    return {**tokens, **config.model, "vocab_size": config.model.vocab_size or rows}


def _vocabulary_shape(config: ConfigDict) -> tuple[str, int]:
    """Return the kind of vocabulary that is trained, and its size.

    Where the config leaves them open, the pretraining task or the vocabulary's file decides.
    """
    # An unknown task is refused later, by the checks of the config, which name the key.
    task = config.pretrain.task
    design = tasks.vocabulary_design(task) if task in tasks.names() else tasks.VOCABULARY

    size = config.model.vocab_size
    if not size and config.text.vocabulary:
        size = tokenizer.shape(os.path.abspath(config.text.vocabulary)).num_ids
    return config.text.vocabulary_model or design.model_type, size or design.vocab_size


def _options(config: ConfigDict, task: str) -> dict:
    """Return the keyword arguments of a task's module, beside the split."""
    # An unknown task has no options here. The checks of the config refuse it, and name its key.
    if task in tasks.names() and "data_dir" in tasks.option_names(task):
        return {"data_dir": config.text.data_dir and os.path.abspath(config.text.data_dir)}
    # Only these two tasks have a section of the config, whose keys are the task's options.
    if task not in ("files", "documents"):
        return {}
    section = config[task].to_dict()
    for split in section.keys() & {*SPLITS}:
        section[split] = ",".join(map(os.path.abspath, split_names(section[split])))
    if "metrics" in section:
        section["metrics"] = split_names(section["metrics"])
    return section


def lengths(finetune: ConfigDict, task: str) -> dict[str, int]:
    """Return the lengths of a task's rows: the task's own where the config's section has 0."""
    task_lengths = getattr(tasks.get(task), "LENGTHS", tasks.LENGTHS)
    keys = ("inputs_length", "targets_length")
    return {key: finetune[key] or length for key, length in zip(keys, task_lengths, strict=True)}


def check(config: ConfigDict) -> None:
    """Refuse unknown tasks, unreadable files and packages that are not installed."""
    wanted = settings(config)
    # Each task once: the pretraining task may also be one to fine-tune on.
    for name in dict.fromkeys(task_names(config)):
        for line in tasks.check(name, **wanted.options[name]):
            print(f"task {name}: {line}")
    for name in split_names(config.finetune.tasks):
        if not hasattr(tasks.get(name), "METRICS"):
            raise UserError(f"finetune.tasks: {name} has documents, not examples to fine-tune on")

    # The functions below are called for their errors alone. `prepare` and `training` call them
    # again for their results.
    num_sentinels = tokenizer.NUM_SENTINELS
    if path := wanted.vocabulary:
        num_sentinels = len(tokenizer.load(path).sentinels)
    if _needs_corpus(wanted):
        try:
            corpus.distributions(wanted.packages)
        except UserError as error:
            raise UserError(f"text.packages: {error}") from error
    if not hasattr(tasks.get(config.pretrain.task), "METRICS"):
        span_corruption.span_lengths(config.pretrain.inputs_length, num_sentinels)


def _needs_corpus(wanted: TextSettings) -> bool:
    return any(map(tasks.needs_corpus, wanted.tasks))


def _packages(config: ConfigDict) -> tuple[str, ...]:
    """Names of the corpus packages; by default the same ones on every machine."""
    if config.text.packages:
        return split_names(config.text.packages)
    return DEFAULT_PACKAGES


def prepare(wanted: TextSettings, workdir: Path) -> Text:
    """Build corpus and vocabulary in `workdir`/text, or read back what is there."""
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
    """Return whether `prepare` would build nothing."""
    folder, built = workdir / "text", None
    if _needs_corpus(wanted):
        built = corpus.find(folder / "corpus", wanted.packages)
        if built is None:
            return False
    # The name of a trained vocabulary holds the hash of the text it was trained on.
    source = _source(wanted.pretraining, built, wanted.options)
    return bool(wanted.vocabulary) or _vocabulary_path(wanted, source, folder).exists()


def _source(task: str, built: corpus.Corpus | None, options: dict[str, dict]) -> str:
    if tasks.needs_corpus(task):
        assert built is not None  # `prepare` builds it for these tasks
        return _hash_rows(built.folder, tuple(map(file_hashes.sha256, built.files)))
    return _hash(tasks.get(task).fingerprint(**options[task]))


@functools.lru_cache(maxsize=4)
def _hash_rows(folder: Path, file_hashes: tuple[str, ...]) -> str:
    """Return the hash of the corpus's uncompressed rows, computed once for unchanged files."""
    del file_hashes  # part of the cache's key, so that changed files are hashed again
    return corpus.hash_rows(folder)


def _vocabulary(
    wanted: TextSettings, built: corpus.Corpus | None, folder: Path
) -> tokenizer.Vocabulary:
    """Load the vocabulary, or train one on the pretraining text and keep it in `folder`."""
    if wanted.vocabulary:
        return tokenizer.load(wanted.vocabulary)

    task, options = wanted.pretraining, wanted.options
    source = _source(task, built, options)
    path = _vocabulary_path(wanted, source, folder)
    if path.exists():
        return tokenizer.load(path)

    data = tasks.get(task).load("train", corpus=built, **options.get(task, {}))
    texts = tasks.vocabulary_texts(task, data[:VOCABULARY_TEXTS])
    # The vocabulary would be kept under the hash of a text that it was not trained on.
    if _source(task, built, options) != source:
        raise UserError(f"the text of task {task} changed while it was read; run again")

    suits = tasks.vocabulary_design(task)
    design = suits._replace(model_type=wanted.vocabulary_model, vocab_size=wanted.vocab_size)
    with renamed_fields("model."):
        trained = tokenizer.train(texts, path=path, **design._asdict())

    # A small text may have too few pieces for the size that was asked for.
    if (size := trained.num_ids) < wanted.vocab_size:
        print(
            f"vocabulary: the text of {task} fills {size} of model.vocab_size={wanted.vocab_size}; "
            f"set that to {size} to leave no row of the embedding unused"
        )
    return trained


def _vocabulary_path(wanted: TextSettings, source: str, folder: Path) -> Path:
    key = _hash([source, wanted.vocab_size, wanted.pretraining, wanted.vocabulary_model])
    return folder / f"vocabulary-{key[:12]}.model"


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Training(NamedTuple):
    """The data of a training stage.

    Args:
        batches: an endless iterator over training batches.
        lengths: inputs_length and targets_length of a batch, in tokens.
        validation: returns an iterator over the validation batches, which are always the same.
        validation_size: how many examples these have.
    """

    batches: Any
    lengths: dict[str, int]
    validation: Callable[[], Iterator]
    validation_size: int


def say_what_is_cut(recipe: Recipe, section: str, split: str, pairs: list[TokenPair]) -> None:
    """Print the share of inputs and of targets that are cut, and the key that would change it.

    Args:
        section: the section of the config that has the lengths.
        split: what a person calls the split.
    """
    sides = {"inputs": recipe.inputs_length, "targets": recipe.targets_length}
    for i, (side, length) in enumerate(sides.items()):
        share = batching.share_cut([pair[i] for pair in pairs], length)
        if share:
            print(
                f"task {recipe.task}: {100 * share:.1f}% of the {split} {side} are cut to "
                f"{length} tokens; raise {section}.{side}_length to keep them whole"
            )


def training(text: Text, recipe: Recipe, section: str = "pretrain") -> Training:
    """Return the data to train on: span corruption of documents, or examples as they are.

    Args:
        section: the section of the config that has the lengths, for the line that says how many
            examples are cut.
    """
    shape: dict[str, Any] = recipe.lengths
    rows: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "shard": text.share,
        "special": text.tokenizer.special,
    }
    stream: dict[str, Any] = rows | {"seed": recipe.seed}
    limit = recipe.validation_examples

    batches: Any
    train, weights = zip(*text.parts(recipe.task), strict=True)
    validation = text.examples(recipe.task, "validation")

    if isinstance(train[0][0], Example):
        pairs = [text.pairs(part) for part in train]
        say_what_is_cut(recipe, section, "training", [*itertools.chain(*pairs)])
        batches = batching.finetuning_batches(pairs, weights, **shape, **stream, pack=recipe.pack)
        held_out, pack = text.pairs(validation[:limit]), recipe.pack
    else:
        # Span corruption decides how long the targets of full inputs are: 114 for 512 inputs.
        sentinels = text.tokenizer.sentinels
        lengths = span_corruption.span_lengths(recipe.inputs_length, len(sentinels))
        shape["targets_length"] = lengths.targets
        corruption: dict = {"inputs_length": recipe.inputs_length, "sentinels": sentinels}

        # Documents in a list are read and tokenised at once. Others are streamed from their files.
        if isinstance(train[0], list):
            tokens = [np.concatenate(text.ids(part)) for part in train]
            batches = batching.pretraining_batches(tokens, weights, **corruption, **stream)
        else:
            # Streamed documents are always one dataset, never a mixture.
            (documents,) = train
            batches = batching.streamed_pretraining_batches(
                documents, text.tokenizer.encode, **corruption, **stream
            )

        # The seed is fixed, so that runs with other seeds have comparable validation losses.
        held_out = span_corruption.held_out_pairs(
            np.concatenate(text.ids(validation)), **corruption, seed=0
        )[:limit]
        pack = False  # every segment fills its row

    evaluation = functools.partial(
        batching.evaluation_batches, held_out, **shape, **rows, pack=pack
    )
    return Training(batches, shape, evaluation, len(held_out))
