"""What a way of converting is called, in results and in a sweep's list of methods.

A method, and whatever departs from the usual, each a word: `svd-logit`, `mean-strided-renorm`,
`svd-logit-8192` (calibration tokens), `mean-kl1` (uptrain.beta), `svd-logit-shrink0.1`.
"""

import math
from typing import Any

from experiments.stages.variant import FLAGS
from gqa import conversion
from gqa.runtime.errors import UserError

RATES = {"shrink": "convert.shrinkage", "kl": "uptrain.beta"}


def keys(text: str) -> dict[str, Any]:
    """The config's keys that a name stands for; those it does not speak of are left out.

    Raises:
        UserError: naming the word that says nothing.
    """
    method, *words = text.split("-")
    found = {"convert.method": method}
    for word in words:
        if word in conversion.SPACES:
            found["convert.space"] = word
        elif word in conversion.GROUPINGS:
            found["convert.grouping"] = word
        elif word in FLAGS:
            found[f"convert.{word}"] = True
        elif word.isdecimal() and len(word) < 10:
            found["convert.calibration_tokens"] = int(word)
        else:
            found |= _rate(text, word)
    return found


def _rate(text: str, word: str) -> dict[str, float]:
    for prefix, key in RATES.items():
        try:
            value = float(word.removeprefix(prefix)) if word.startswith(prefix) else math.nan
        except ValueError:
            continue
        if value >= 0 and math.isfinite(value):
            return {key: value}
    known = [*conversion.SPACES, *conversion.GROUPINGS, *FLAGS]
    raise UserError(
        f"method {text!r}: {word!r} says nothing; after the method, use any of "
        f"{', '.join(known)}, a number of calibration tokens, shrink<number>, kl<beta>"
    )
