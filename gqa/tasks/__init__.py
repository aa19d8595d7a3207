"""Datasets, one module each, found by name.

A module offers `load(split, *, corpus=None, **options)` for split train, validation or test, and
says how it is scored: `METRICS`, and the one of them that a report averages, `HEADLINE`. Adding a
dataset is adding a file here.
"""

import importlib
import inspect
import pkgutil
import types
from typing import NamedTuple

from gqa.errors import UserError

SPLITS = ("train", "validation", "test")


class Example(NamedTuple):
    """Texts in and out; the first target is trained on, all of them are references."""

    inputs: str
    targets: tuple[str, ...]


def names() -> list[str]:
    """Every task there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> types.ModuleType:
    """The module of one task."""
    if name not in names():
        raise UserError(f"task={name!r} is unknown; choose from {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def check(name: str, **options) -> None:
    """Refuse an unknown task or option, and what the task itself can see is wrong. Cheap."""
    task = get(name)
    known = [
        key for key in inspect.signature(task.load).parameters if key not in ("split", "corpus")
    ]
    for option in options:
        if option not in known:
            choice = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"task {name} has no option {option!r}; {choice}")
    if hasattr(task, "check"):
        task.check(**options)


def scoring(name: str, **options) -> tuple[tuple[str, ...], str]:
    """Names of a task's metrics, and the one that a report averages."""
    task = get(name)
    metrics = tuple(options.get("metrics") or task.METRICS)
    return metrics, task.HEADLINE if task.HEADLINE in metrics else metrics[0]
