"""What the report puts in one row: a network, how it was converted and how long it was uptrained.

`experiments.stages.variant` says what a result record holds about a network. Here the seed is left
out, because the report averages over seeds, and the settings of the conversion are one value, a
`Method`, because many tables and figures compare methods.
"""

from typing import Any, NamedTuple

from experiments.stages.variant import NOT_CONVERTED, method_label
from gqa import conversion
from gqa.conversion import calibration


class Method(NamedTuple):
    """How a network was made from its multi-head parent, setting by setting.

    The fields are those of a result record's `variant`; None or False where a setting makes no
    difference. A network that was not converted has the method `TRAINED_AS_IT_IS`.
    """

    method: str
    space: str | None = None
    grouping: str | None = None
    renorm: bool = False
    shrinkage: float | None = None
    calibration_tokens: int | None = None
    sequential: bool = False
    per_layer_budget: bool = False
    beta: float = 0.0

    @property
    def label(self) -> str:
        """The method's name in tables and figures: `svd-logit`, `mean-kl1`."""
        return method_label(self._asdict())

    @property
    def before_uptraining(self) -> "Method":
        """The conversion alone: beta weighs a loss of uptraining."""
        return self._replace(beta=0.0)

    @property
    def is_usual(self) -> bool:
        """Whether every setting but the method, the space and `renorm` has its default value."""
        return (
            self.grouping in (None, "contiguous")
            and self.shrinkage in (None, conversion.SHRINKAGE)
            and self.calibration_tokens in (None, calibration.TOKENS)
            and not (self.sequential or self.per_layer_budget or self.beta)
        )


TRAINED_AS_IT_IS = Method(NOT_CONVERTED)


class Variant(NamedTuple):
    """One row of the report. Results that differ in nothing but the seed share a row."""

    size: str
    num_heads: int
    num_kv_heads: int
    num_kv_heads_cross_attention: int
    num_kv_heads_encoder: int
    method: Method
    alpha: float

    @property
    def is_converted(self) -> bool:
        """Whether the weights are not simply those of a training with the ordinary loss."""
        return self.method != TRAINED_AS_IT_IS

    @property
    def label(self) -> str:
        """Name the variant as the paper does, and how it was reached: `GQA-8 mean, alpha 0.05`."""
        name = self.network
        if self.is_converted:
            name += f" {self.method.label}"
        elif self.parent != self._replace(alpha=0.0):
            name += " from scratch"
        return f"{name}, alpha {self.alpha:g}" if self.is_converted or self.alpha else name

    @property
    def network(self) -> str:
        """Name the network alone, however its weights were reached: `GQA-8`."""
        name = {self.num_heads: "MHA", 1: "MQA"}.get(self.num_kv_heads, f"GQA-{self.num_kv_heads}")
        if self.num_kv_heads_cross_attention != self.num_kv_heads:
            name += f" cross-{self.num_kv_heads_cross_attention}"
        if self.num_kv_heads_encoder != self.num_heads:
            name += f" encoder-{self.num_kv_heads_encoder}"
        return name

    @property
    def shape(self) -> "Variant":
        """The network alone, however its weights were reached."""
        return self._replace(method=TRAINED_AS_IT_IS, alpha=0.0)

    @property
    def timed(self) -> "Variant":
        """The variant under which the timings of this one are kept.

        Times depend on the shape alone. With a budget per layer, the method decides the shape.
        """
        if self.method.per_layer_budget:
            return self.shape._replace(method=self.method.before_uptraining)
        return self.shape

    @property
    def groups_decoder_evenly(self) -> bool:
        """Whether self- and cross-attention have equally many KV heads, and the encoder all."""
        encoder_is_multi_head = self.num_kv_heads_encoder == self.num_heads
        return encoder_is_multi_head and self.num_kv_heads_cross_attention == self.num_kv_heads

    @property
    def parent(self) -> "Variant":
        """The multi-head network that this variant was converted from, or is compared with."""
        heads = self.num_heads
        return Variant(self.size, heads, heads, heads, heads, TRAINED_AS_IT_IS, 0.0)

    @property
    def order(self) -> tuple:
        """A key that sorts variants of one size: most KV heads first, then method, then alpha."""
        kv_heads = self[1:5]
        return *(-count for count in kv_heads), self.method.label, self.alpha


def variant_of(record: dict[str, Any]) -> Variant:
    """Return the variant that a result record is about; one conversion serves every alpha."""
    settings = record["variant"]
    method = Method(**{name: settings[name] for name in Method._fields})
    shape = {name: settings[name] for name in ("size", *KV_HEADS)}
    alpha = 0.0 if record["stage"] == "convert" else settings["alpha"]
    return Variant(**shape, method=method, alpha=alpha)


KV_HEADS = ("num_heads", "num_kv_heads", "num_kv_heads_cross_attention", "num_kv_heads_encoder")
