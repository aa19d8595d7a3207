"""Checks of single values that come from a config, a JSON file or a command line.

Each raises a ConfigError that names the field. Checks that relate several settings are beside what
they protect, such as `gqa.runtime.mesh.check_layout`.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gqa.runtime.errors import ConfigError

MAX_INT32 = 2**31 - 1  # XLA's indices and our steps, seeds and token ids are int32


def check_whole_number(field: str, value: Any, least: int = 1, most: int = MAX_INT32) -> int:
    """Return `value` if it is an integer from `least` to `most`; JSON may hold anything.

    Raises:
        ConfigError: for any other value, True and False among them.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(field, value, f"use a whole number, {least} or more")
    if value > most:
        raise ConfigError(field, value, f"use a whole number from {least} to {most}")
    return value


def check_local_path(field: str, path: str | Path) -> None:
    """Refuse a path that is a URL, which would else become a folder called "gs:".

    A drive such as C:/runs and a name such as step:1 are paths.

    Raises:
        ConfigError: for a path such as gs://bucket/folder.
    """
    url = str(path)
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", url):
        # A Path has one slash in the place of two, which the message puts back.
        if isinstance(path, Path):
            url = f"{scheme[0]}/{url[scheme.end() :]}"
        advice = "mount the bucket or copy its files, and name the folder on this machine"
        raise ConfigError(field, url, advice, "is a URL")


def check_choice(field: str, value: Any, choices: Collection[str]) -> None:
    """Raise a ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(field, value, f"use one of {', '.join(map(str, choices))}")
