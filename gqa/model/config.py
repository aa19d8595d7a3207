"""The numbers and names that shape a T5: sizes, KV heads of each attention, activation, dtype.

`Config` checks itself. It raises a ConfigError that names the field; the pipeline adds the key of
its own configs. What is built from a config is in `transformer.py`.
"""

import dataclasses
from typing import Any

import jax

from gqa.model import activations
from gqa.model.activations import GATED_GELU
from gqa.model.special_tokens import SpecialTokens
from gqa.runtime.checks import check_choice, check_whole_number
from gqa.runtime.errors import ConfigError
from gqa.runtime.mesh import divisors

# What a backward pass keeps of the forward pass. "none" keeps everything (no rematerialisation),
# "minimal" keeps the products with weights and recomputes the rest, "full" recomputes everything.
REMAT = {
    "none": None,
    "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that shapes the network. The defaults are T5 1.1's.

    T5 1.0 is `activation="relu", tied_logits=True`, umT5 is `position_bias_per_layer=True`. The KV
    heads of a decoder attention are one number for all layers, or a number for each decoder layer.
    The last three fields are tokens: padding, the end of a text, and the decoder's first input.

    Raises:
        ConfigError: for a field that cannot be used.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    head_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_kv_heads_encoder: int
    num_kv_heads_self_attention: int | tuple[int, ...]
    num_kv_heads_cross_attention: int | tuple[int, ...]
    activation: str = GATED_GELU
    tied_logits: bool = False
    position_bias_per_layer: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        # Fields are checked in the order of their declaration: num_heads comes before the numbers
        # of KV heads, which must divide num_heads. A frozen dataclass sets a field only in this
        # way.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("num_kv_heads"):
                object.__setattr__(self, field.name, self._checked_heads(field.name, value))
            elif field.name.endswith("_token_id"):
                check_whole_number(field.name, value, 0)
            else:
                _check_type(field.name, value, field.type)

        if self.activation.removeprefix(activations.GATED) not in activations.FUNCTIONS:
            names = ", ".join(activations.FUNCTIONS)
            advice = f"use one of {names}, or one of these behind {activations.GATED!r}"
            raise ConfigError("activation", self.activation, advice)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("remat", self.remat, tuple(REMAT))

        if not 0 <= self.dropout_rate < 1:
            raise ConfigError("dropout_rate", self.dropout_rate, "use a value in [0, 1)")
        if self.num_buckets < 4:
            raise ConfigError("num_buckets", self.num_buckets, "use 4 or more")
        if self.max_distance <= self.num_buckets // 2:
            advice = f"use more than half of num_buckets={self.num_buckets}"
            raise ConfigError("max_distance", self.max_distance, advice)
        if self.vocab_size <= max(self.special_tokens):
            advice = f"use more than {max(self.special_tokens)}, the largest special token"
            raise ConfigError("vocab_size", self.vocab_size, advice)
        if self.eos_token_id == self.pad_token_id:
            advice = f"use another than pad_token_id={self.pad_token_id}, which is never predicted"
            raise ConfigError("eos_token_id", self.eos_token_id, advice)

    def _checked_heads(self, field: str, value: Any) -> int | tuple[int, ...]:
        """Check a field's numbers of KV heads; returns one number if all layers have the same."""
        if field == "num_kv_heads_encoder" or not isinstance(value, tuple | list):
            check_kv_heads(field, value, self.num_heads)
            return value
        if len(value) != self.num_decoder_layers:
            raise ConfigError(
                field,
                value,
                "use one number, or one for each layer",
                f"has {len(value)} numbers for {self.num_decoder_layers} decoder layers",
            )
        for num_kv_heads in value:
            check_kv_heads(field, num_kv_heads, self.num_heads)
        return tuple(value) if len(set(value)) > 1 else value[0]

    def kv_heads(self, name: str) -> tuple[int, ...]:
        """Return the number of KV heads of each layer of an attention.

        `name` is "encoder", "self_attention" or "cross_attention".
        """
        layers = self.num_encoder_layers if name == "encoder" else self.num_decoder_layers
        value = getattr(self, f"num_kv_heads_{name}")
        return value if isinstance(value, tuple) else (value,) * layers

    def at_layer(self, index: int) -> "Config":
        """Return the config as decoder layer `index` has it: with one number for each attention."""
        heads = {name: self.kv_heads(name)[index] for name in ("self_attention", "cross_attention")}
        return dataclasses.replace(
            self,
            num_kv_heads_self_attention=heads["self_attention"],
            num_kv_heads_cross_attention=heads["cross_attention"],
        )

    def layer_kv_heads(self, name: str) -> int:
        """Return the number of KV heads of an attention, in a config whose layers all have it.

        The configs of `at_layer` are of this kind. `name` is as in `kv_heads`.
        """
        value = getattr(self, f"num_kv_heads_{name}")
        assert isinstance(value, int), f"the layers have different numbers of KV heads: {value}"
        return value

    @property
    def special_tokens(self) -> SpecialTokens:
        """The ids of padding, of the end of a text and of the decoder's first input."""
        return SpecialTokens(self.pad_token_id, self.eos_token_id, self.decoder_start_token_id)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a second input kernel, wi_1."""
        return activations.is_gated(self.activation)

    @property
    def layer_groups(self) -> dict[int, int]:
        """The layer groups: consecutive decoder layers with equal KV heads, scanned together.

        Each is the index of its first layer -> its number of layers. KV heads (4, 4, 1) give
        {0: 2, 2: 1}. There is a single group unless KV heads are given for each layer.
        """
        if isinstance(self.num_kv_heads_self_attention, int) and isinstance(
            self.num_kv_heads_cross_attention, int
        ):
            return {0: self.num_decoder_layers}
        heads = list(
            zip(self.kv_heads("self_attention"), self.kv_heads("cross_attention"), strict=True)
        )

        # A group starts at the first layer, and wherever a layer differs from the layer before it.
        starts = [i for i, K in enumerate(heads) if i == 0 or heads[i - 1] != K]
        ends = [*starts[1:], len(heads)]
        return {first: end - first for first, end in zip(starts, ends, strict=True)}


def _check_type(field: str, value: Any, expected: Any) -> None:
    """Raise a ConfigError unless the value has the field's type; JSON may hold anything.

    Whole numbers are sizes: 1 or more, and small enough for XLA's indices.
    """
    if expected is int:
        check_whole_number(field, value)
        return
    kinds = (int, float) if expected is float else expected
    if not isinstance(value, kinds) or (isinstance(value, bool) and expected is not bool):
        names = {float: "a number", bool: "true or false", str: "a name"}
        raise ConfigError(field, value, f"use {names[expected]}")


def check_kv_heads(
    field: str, num_kv_heads: int, num_heads: int, num_heads_field: str = "num_heads"
) -> None:
    """Raise a ConfigError with the possible values unless `num_kv_heads` divides `num_heads`.

    `field` and `num_heads_field` are the names under which the user knows the two numbers.
    """
    fit = divisors(num_heads)
    if type(num_kv_heads) is not int or num_kv_heads not in fit:
        advice = f"use one of {', '.join(map(str, fit))}"
        reason = f"does not divide {num_heads_field}={num_heads}"
        raise ConfigError(field, num_kv_heads, advice, reason)
