"""What a result says of the network that was measured, and the names that follow from it.

A variant holds settings, never a name: `method_label` derives the name from them. The opposite
direction, from a name typed in a sweep to settings, is in `experiments/graph/method_names.py`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from gqa import conversion
from gqa.conversion import calibration

# Settings that are named by their own word where they are on.
FLAGS = ("renorm", "sequential", "per_layer_budget")
NOT_CONVERTED = "none"  # the method of a network that was trained with the KV heads it has


@dataclass(frozen=True)
class Variant:
    """One network: its shape, how it was converted, how long it was uptrained, and its seed.

    A setting of the conversion is None or False where it makes no difference to the result, so that
    equal networks are equal variants.

    Args:
        num_kv_heads: of the decoder's self-attention; with `per_layer_budget`, the number of KV
            heads that would fill the same cache if every layer had as many.
        method: one of `gqa.conversion.METHODS`, or NOT_CONVERTED.
        alpha: uptraining steps as a fraction of the pretraining steps.
        beta: weight of the KL divergence from the multi-head parent in the loss of uptraining.
    """

    size: str
    num_heads: int
    num_kv_heads: int
    num_kv_heads_cross_attention: int
    num_kv_heads_encoder: int
    alpha: float
    seed: int
    method: str = NOT_CONVERTED
    space: str | None = None
    grouping: str | None = None
    renorm: bool = False
    shrinkage: float | None = None
    calibration_tokens: int | None = None
    sequential: bool = False
    per_layer_budget: bool = False
    beta: float = 0.0

    @property
    def heads(self) -> dict[str, int]:
        """The number of KV heads of each attention, by the attention's name."""
        return {
            "encoder": self.num_kv_heads_encoder,
            "self_attention": self.num_kv_heads,
            "cross_attention": self.num_kv_heads_cross_attention,
        }

    @property
    def is_converted(self) -> bool:
        """Whether the network was made from one with more KV heads."""
        return self.method != NOT_CONVERTED

    @property
    def method_label(self) -> str:
        """The name of how the network was made, e.g. `svd-logit` or `mean-kl1`."""
        return method_label(dataclasses.asdict(self))


def method_label(settings: dict[str, Any]) -> str:
    """Name a conversion by its method and each setting that is not the default, joined by dashes.

    Args:
        settings: the fields of a `Variant`, such as the `variant` of a result record.
    """
    words = [settings["method"]]
    words += [settings["space"]] if settings["space"] else []
    words += [settings["grouping"]] if settings["grouping"] not in (None, "contiguous") else []
    words += [flag for flag in FLAGS if settings[flag]]

    tokens, shrinkage = settings["calibration_tokens"], settings["shrinkage"]
    words += [str(tokens)] if tokens not in (None, calibration.TOKENS) else []
    words += [f"shrink{shrinkage:g}"] if shrinkage not in (None, conversion.SHRINKAGE) else []
    words += [f"kl{settings['beta']:g}"] if settings["beta"] else []
    return "-".join(words)
