"""Describe the network that a result is about, and name it.

A variant holds settings and no name: names are derived from the settings. The opposite direction,
from a name typed in a sweep to settings, is in `experiments/graph/method_names.py`. Stages write
variants into their result records, and the report has one row for each variant.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from gqa import conversion
from gqa.conversion import calibration

# Settings that are named by their own word where they are on.
FLAGS = ("renorm", "sequential", "per_layer_budget")
NOT_CONVERTED = "none"  # the method of a network that was trained with the KV heads it has


@dataclass(frozen=True)
class Conversion:
    """How a network was made from its multi-head parent, setting by setting.

    A setting is None or False where it makes no difference to the result, so that networks made in
    the same way have equal conversions. Without arguments: a network that was not converted.

    Args:
        method: one of `gqa.conversion.METHODS`, or NOT_CONVERTED.
        beta: weight of the KL divergence from the multi-head parent in the loss of uptraining.
    """

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
    def is_converted(self) -> bool:
        """Return whether the weights come from anything but training with the ordinary loss."""
        return self.method != NOT_CONVERTED or self.beta > 0

    @property
    def method_label(self) -> str:
        """The method and each setting that is not the default, as `svd-logit` or `mean-kl1`."""
        # Only settings that differ from the default are named, so that common networks have short
        # names. The space is the exception: where it makes a difference, it is always named.
        words = [self.method]
        words += [self.space] if self.space else []
        words += [self.grouping] if self.grouping not in (None, "contiguous") else []
        words += [flag for flag in FLAGS if getattr(self, flag)]

        tokens, shrinkage = self.calibration_tokens, self.shrinkage
        words += [str(tokens)] if tokens not in (None, calibration.TOKENS) else []
        words += [f"shrink{shrinkage:g}"] if shrinkage not in (None, conversion.SHRINKAGE) else []
        words += [f"kl{self.beta:g}"] if self.beta else []
        return "-".join(words)

    @property
    def before_uptraining(self) -> Self:
        """The conversion alone: beta weighs a loss of uptraining."""
        return dataclasses.replace(self, beta=0.0)

    @property
    def is_usual(self) -> bool:
        """Return whether all settings but method, space and `renorm` have their default values."""
        return (
            self.grouping in (None, "contiguous")
            and self.shrinkage in (None, conversion.SHRINKAGE)
            and self.calibration_tokens in (None, calibration.TOKENS)
            and not (self.sequential or self.per_layer_budget or self.beta)
        )


CONVERSION_FIELDS = tuple(field.name for field in dataclasses.fields(Conversion))
TRAINED_AS_IT_IS = Conversion()


@dataclass(frozen=True, kw_only=True)
class Variant(Conversion):
    """One network: its shape, how it was converted, how long it was uptrained, and its seed.

    The report averages over seeds; there, every variant has the seed 0.

    Args:
        num_kv_heads: of the decoder's self-attention; with `per_layer_budget`, the number of KV
            heads that would fill the same cache if every layer had as many.
        alpha: uptraining steps as a fraction of the pretraining steps.
    """

    size: str
    num_heads: int
    num_kv_heads: int
    num_kv_heads_cross_attention: int
    num_kv_heads_encoder: int
    alpha: float
    seed: int = 0

    @property
    def heads(self) -> dict[str, int]:
        """The number of KV heads of each attention, by the attention's name."""
        return {
            "encoder": self.num_kv_heads_encoder,
            "self_attention": self.num_kv_heads,
            "cross_attention": self.num_kv_heads_cross_attention,
        }

    @property
    def conversion(self) -> Conversion:
        """How the network was made, without its shape, alpha and seed."""
        return Conversion(**{name: getattr(self, name) for name in CONVERSION_FIELDS})

    @property
    def label(self) -> str:
        """Name the variant as the paper does, and how it was reached: `GQA-8 mean, alpha 0.05`."""
        name = self.network
        if self.is_converted:
            name += f" {self.method_label}"
        elif self.is_from_scratch:
            name += " from scratch"
        return f"{name}, alpha {self.alpha:g}" if self.is_converted or self.alpha else name

    @property
    def is_from_scratch(self) -> bool:
        """Return whether a grouped network was trained with its KV heads from the first step on.

        A multi-head network is not called so, because its weights have no other way to be reached.
        """
        return not self.is_converted and self.shape != self.parent

    @property
    def origin(self) -> str:
        """Say how the weights were reached, as `mean, alpha 0.05` or `from scratch, alpha 0.05`."""
        way = self.method_label if self.is_converted else "from scratch"
        return f"{way}, alpha {self.alpha:g}" if self.is_converted or self.alpha else way

    @property
    def network(self) -> str:
        """Name the network alone, however its weights were reached: `GQA-8`."""
        # GQA-8 is the decoder's self-attention. An attention that differs from what this says (the
        # same heads in cross-attention, all heads in the encoder) is added: `GQA-8 cross-16`.
        name = {self.num_heads: "MHA", 1: "MQA"}.get(self.num_kv_heads, f"GQA-{self.num_kv_heads}")
        if self.num_kv_heads_cross_attention != self.num_kv_heads:
            name += f" cross-{self.num_kv_heads_cross_attention}"
        if self.num_kv_heads_encoder != self.num_heads:
            name += f" encoder-{self.num_kv_heads_encoder}"
        return name

    @property
    def shape(self) -> "Variant":
        """The network alone, however its weights were reached."""
        return self.made_by(TRAINED_AS_IT_IS, 0.0)

    @property
    def timed(self) -> "Variant":
        """The variant under which the timings of this one are kept.

        Times depend on the shape alone. With a budget per layer, the method decides the shape.
        """
        if self.per_layer_budget:
            return self.made_by(self.conversion.before_uptraining, 0.0)
        return self.shape

    @property
    def groups_decoder_evenly(self) -> bool:
        """Return whether the decoder has one number of KV heads, and the encoder all of them."""
        encoder_is_multi_head = self.num_kv_heads_encoder == self.num_heads
        return encoder_is_multi_head and self.num_kv_heads_cross_attention == self.num_kv_heads

    @property
    def parent(self) -> "Variant":
        """The multi-head network that this variant was converted from, or is compared with."""
        heads: dict[str, Any] = dict.fromkeys(KV_HEADS, self.num_heads)
        return dataclasses.replace(self.shape, **heads)

    @property
    def order(self) -> tuple[Any, ...]:
        """A key that sorts variants of one size: most KV heads first, then method, then alpha."""
        # Numbers sort ascending, so counts that should descend are negative.
        counts = (self.num_heads, *(getattr(self, name) for name in KV_HEADS))
        return *(-count for count in counts), self.method_label, self.alpha

    def made_by(self, conversion: Conversion, alpha: float) -> "Variant":
        """Return the network of this shape with weights that were reached in another way."""
        return dataclasses.replace(self, **dataclasses.asdict(conversion), alpha=alpha)

    def at(self, alpha: float) -> "Variant":
        """Return the same network after another amount of uptraining."""
        return dataclasses.replace(self, alpha=alpha)


KV_HEADS = ("num_kv_heads", "num_kv_heads_cross_attention", "num_kv_heads_encoder")
