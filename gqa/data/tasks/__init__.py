"""The datasets ("tasks"): one module each, found by its name.

To add a dataset, add a module to this package; nothing else changes. The module has

    load(split, *, corpus, **options)
                            the data of split train, validation or test: a list of `Example`, or
                            of str if it is text for pretraining (documents). A task that is not
                            made from the corpus of installed packages has the default corpus=None.
    METRICS, HEADLINE       names of its metrics, and the metric that a report averages; a task of
                            documents has neither

and, where they are needed,

    check(**options)        raises UserError for data that is missing or wrong, before the job
                            begins; returns lines about rows that would be left out and others
                            that a user should know of
    fingerprint(**options)  what determines its text, as JSON; needed without the corpus
    parts(**options)        the parts of a mixture with their weights, [(data, weight)]
    SPLITS                  if it lacks a split
    LENGTHS                 tokens of inputs and targets, if they differ from those below
    VOCABULARY              the `tokenizer.Design` of a vocabulary that suits its text, likewise
    vocabulary_texts(data)  the texts that a vocabulary is trained on, given the training data, if
                            these are not the inputs and targets, or the documents
    BASELINE                (name, answer), if the task has a baseline that says more than the first
                            sentence of the input: answer(training examples, inputs) gives texts
"""

import importlib
import inspect
import pkgutil
import types
from collections.abc import Sequence

from gqa.data import tokenizer
from gqa.data.examples import Example
from gqa.runtime.errors import UserError

LENGTHS = (512, 256)  # tokens of inputs and targets
VOCABULARY = tokenizer.Design()  # for prose, and a network that trains in minutes


def names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> types.ModuleType:
    """Return the module of one task."""
    # The name comes from the command line, and only modules of this package may be imported by it.
    if name not in names():
        raise UserError(f"task={name!r} is unknown; choose from {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def needs_corpus(name: str) -> bool:
    """Return whether the task is made from the corpus of installed packages."""
    # Such a task cannot do without a corpus, so its `load` has no default for the argument.
    return inspect.signature(get(name).load).parameters["corpus"].default is inspect.Parameter.empty


def option_names(name: str) -> list[str]:
    """Return the names of the options of a task."""
    parameters = inspect.signature(get(name).load).parameters
    return [key for key in parameters if key not in ("split", "corpus")]


def check(name: str, **options) -> list[str]:
    """Check the options and the data of a task; return lines that a user should read.

    Raises:
        UserError: for an unknown task or option, and whatever the task's own check refuses.
    """
    task, known = get(name), option_names(name)
    for option in options:
        if option not in known:
            choice = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"task {name} has no option {option!r}; {choice}")
    return task.check(**options) if hasattr(task, "check") else []


def parts(name: str, **options) -> list[tuple]:
    """Return the training data of each part of a mixture, with its weight."""
    task = get(name)
    if hasattr(task, "parts"):
        return task.parts(**{key: value for key, value in options.items() if key != "corpus"})
    return [(task.load("train", **options), 1.0)]


def vocabulary_design(name: str) -> tokenizer.Design:
    """Return the vocabulary that suits the text of a task."""
    return getattr(get(name), "VOCABULARY", VOCABULARY)


def vocabulary_texts(name: str, data: Sequence) -> list[str]:
    """Return the texts that a vocabulary for the task is trained on.

    Args:
        data: training examples of the task, or its documents.
    """
    task = get(name)
    if hasattr(task, "vocabulary_texts"):
        return task.vocabulary_texts(data)

    # Pairs of texts share one vocabulary, so it is trained on both sides.
    if isinstance(data[0], Example):
        return [text for example in data for text in (example.inputs, *example.targets)]
    return list(data)


def scoring(name: str, **options) -> tuple[tuple[str, ...], str]:
    """Return the names of a task's metrics, and the metric that a report averages."""
    task = get(name)
    metrics = tuple(options.get("metrics") or task.METRICS)
    return metrics, task.HEADLINE if task.HEADLINE in metrics else metrics[0]
