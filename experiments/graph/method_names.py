"""Parse the names of conversions in a sweep's list of methods into keys of the config.

A name is a method, followed by a word for every setting that is not the default: `svd-logit`,
`mean-strided-renorm`, `svd-logit-8192` (calibration tokens), `mean-kl1` (uptrain.beta),
`svd-logit-shrink0.1`. `none` names a network that was trained from scratch with the KV heads it
has; no word goes with it. Only what a user typed is parsed; a result record holds the settings, and
`experiments/stages/variant.py` derives the name from them.
"""

import math
from typing import Any

from experiments.stages.variant import FLAGS, NOT_CONVERTED
from gqa import conversion
from gqa.runtime.errors import UserError

RATES = {"shrink": "convert.shrinkage", "kl": "uptrain.beta"}


def keys(text: str) -> dict[str, Any]:
    """Return the config keys that a name sets, with their values; other keys are left out.

    Raises:
        UserError: naming the first word that is not known.
    """
    method, *words = text.split("-")
    if method == NOT_CONVERTED and words:
        raise UserError(
            f"method {text!r}: {words[0]!r} says nothing, because nothing is converted; "
            f"use {NOT_CONVERTED!r}"
        )
    values: dict[str, Any] = {"convert.method": method}
    for word in words:
        if word in conversion.SPACES:
            values["convert.space"] = word
        elif word in conversion.GROUPINGS:
            values["convert.grouping"] = word
        elif word in FLAGS:
            values[f"convert.{word}"] = True
        elif word.isdecimal() and len(word) < 10:
            values["convert.calibration_tokens"] = int(word)
        else:
            values |= _parse_rate(text, word)
    return values


def _parse_rate(text: str, word: str) -> dict[str, float]:
    for prefix, key in RATES.items():
        try:
            value = float(word.removeprefix(prefix)) if word.startswith(prefix) else math.nan
        except ValueError:
            continue
        # `float` also reads "inf", which no rate can be; NaN stands for a word without this prefix.
        if value >= 0 and math.isfinite(value):
            return {key: value}

    known = [*conversion.SPACES, *conversion.GROUPINGS, *FLAGS]
    raise UserError(
        f"method {text!r}: {word!r} says nothing; after the method, use any of "
        f"{', '.join(known)}, a number of calibration tokens, shrink<number>, kl<beta>"
    )
