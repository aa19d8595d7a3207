"""What a way of converting is called, in results and in a sweep's list of methods.

A method, and whatever departs from the usual, each a word: `svd-logit`, `mean-strided-renorm`,
`svd-logit-8192` (calibration tokens), `mean-kl1` (uptrain.beta), `svd-logit-shrink0.1`.
"""

import math
from typing import Any

from gqa import convert
from gqa.convert import calibration
from gqa.runtime.errors import UserError

FLAGS = ("renorm", "sequential", "per_layer_budget")
RATES = {"shrink": "convert.shrinkage", "kl": "uptrain.beta"}


def name(settings: dict[str, Any]) -> str:
    """What results call the conversion of a stage's settings, beta aside."""
    words = [settings["method"]]
    words += [settings["space"]] if "space" in settings else []
    words += [settings["grouping"]] if settings["grouping"] != "contiguous" else []
    words += [flag for flag in FLAGS if settings.get(flag)]
    tokens = settings.get("calibration_tokens", calibration.TOKENS)
    words += [str(tokens)] if tokens != calibration.TOKENS else []
    shrinkage = settings.get("shrinkage", convert.SHRINKAGE)
    words += [f"shrink{shrinkage:g}"] if shrinkage != convert.SHRINKAGE else []
    return "-".join(words)


def with_beta(method: str, beta: float) -> str:
    """What the same is called when uptrained near the parent."""
    return f"{method}-kl{beta:g}" if beta else method


def before_uptraining(method: str) -> str:
    """The inverse of `with_beta`: what beta makes no difference to."""
    return method.partition("-kl")[0]


def by_layer(method: str) -> bool:
    """Whether KV heads were spread over layers, so that times depend on how."""
    return "per_layer_budget" in method.split("-")


def keys(text: str) -> dict[str, Any]:
    """The config's keys that a name stands for; those it does not speak of are left out.

    Raises:
        UserError: naming the word that says nothing.
    """
    method, *words = text.split("-")
    found = {"convert.method": method}
    for word in words:
        if word in convert.SPACES:
            found["convert.space"] = word
        elif word in convert.GROUPINGS:
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
    known = [*convert.SPACES, *convert.GROUPINGS, *FLAGS]
    raise UserError(
        f"method {text!r}: {word!r} says nothing; after the method, use any of "
        f"{', '.join(known)}, a number of calibration tokens, shrink<number>, kl<beta>"
    )
