"""Datasets, one module each, found by name.

A module offers `load(split, *, corpus, **options)` for split train, validation or test, which gives
examples or documents. If they are examples it says how they are scored: `METRICS`, and the one of
them that a report averages, `HEADLINE`. Adding a dataset is adding a file here. It may also have

    check(**options)        refuses what it can see is wrong; returns what it would leave out
    fingerprint(**options)  what its text is made from, as JSON, if that is not the corpus
    parts(**options)        training data with the weights of a mixture, [(data, weight)]
    SPLITS, LENGTHS         if they are not those below
"""

import importlib
import inspect
import pkgutil
import types

from gqa.runtime.errors import UserError

LENGTHS = (512, 256)  # tokens of inputs and targets


def names() -> list[str]:
    """Every task there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> types.ModuleType:
    """The module of one task."""
    if name not in names():
        raise UserError(f"task={name!r} is unknown; choose from {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def needs_corpus(name: str) -> bool:
    """Whether the task is made from the corpus of installed packages."""
    return inspect.signature(get(name).load).parameters["corpus"].default is inspect.Parameter.empty


def option_names(name: str) -> list[str]:
    """What the task can be told beside the split."""
    parameters = inspect.signature(get(name).load).parameters
    return [key for key in parameters if key not in ("split", "corpus")]


def check(name: str, **options) -> list:
    """Refuse an unknown task or option, and what the task itself can see is wrong.

    Returns what it says of rows that it will leave out.
    """
    task, known = get(name), option_names(name)
    for option in options:
        if option not in known:
            choice = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"task {name} has no option {option!r}; {choice}")
    return task.check(**options) if hasattr(task, "check") else []


def parts(name: str, **options) -> list[tuple]:
    """Training examples or documents of a mixture's parts, and how often each is drawn from."""
    task = get(name)
    if hasattr(task, "parts"):
        return task.parts(**{key: value for key, value in options.items() if key != "corpus"})
    return [(task.load("train", **options), 1.0)]


def scoring(name: str, **options) -> tuple[tuple[str, ...], str]:
    """Names of a task's metrics, and the one that a report averages."""
    task = get(name)
    metrics = tuple(options.get("metrics") or task.METRICS)
    return metrics, task.HEADLINE if task.HEADLINE in metrics else metrics[0]
