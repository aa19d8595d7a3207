"""The numbers and names that shape a T5: sizes, KV heads of each attention, activation, dtype."""

import dataclasses

import jax

from gqa.model.layers import GATED_GELU, RELU
from gqa.runtime.errors import UserError
from gqa.runtime.sharding import divisors

# What a backward pass keeps of the forward pass; "minimal" recomputes all but the weight products.
REMAT = {
    "none": None,
    "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that shapes the network. The defaults are T5 1.1's.

    T5 1.0 is `activation="relu", tied_logits=True`. The KV heads of a decoder attention are one
    number, or a number for each of its layers.
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
    num_buckets: int = 32
    max_distance: int = 128
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        for field in dataclasses.fields(self):  # num_heads before those that divide it
            value = getattr(self, field.name)
            if field.name.startswith("num_kv_heads"):
                object.__setattr__(self, field.name, self._checked_heads(field.name, value))
            else:
                _check_type(field.name, value, field.type)
        _check_choice("activation", self.activation, (GATED_GELU, RELU))
        _check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        _check_choice("remat", self.remat, tuple(REMAT))
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"model.dropout_rate={self.dropout_rate}; use a value in [0, 1)")
        if self.num_buckets < 4:
            raise UserError(f"model.num_buckets={self.num_buckets}; use 4 or more")
        if self.max_distance <= self.num_buckets // 2:
            raise UserError(
                f"model.max_distance={self.max_distance}; use more than half of "
                f"num_buckets={self.num_buckets}"
            )

    def _checked_heads(self, field: str, value) -> int | tuple[int, ...]:
        """The field's value; equal numbers for all layers are one number."""
        name = f"model.{field}"
        if field == "num_kv_heads_encoder" or not isinstance(value, tuple | list):
            check_kv_heads(name, value, self.num_heads)
            return value
        if len(value) != self.num_decoder_layers:
            raise UserError(
                f"{name} has {len(value)} numbers for {self.num_decoder_layers} decoder layers; "
                "use one number, or one for each layer"
            )
        for each in value:
            check_kv_heads(name, each, self.num_heads)
        return tuple(value) if len(set(value)) > 1 else value[0]

    def kv_heads(self, name: str) -> tuple[int, ...]:
        """The KV heads of each layer of attention `name`: encoder, decoder or cross."""
        layers = self.num_encoder_layers if name == "encoder" else self.num_decoder_layers
        value = getattr(self, f"num_kv_heads_{name}")
        return value if isinstance(value, tuple) else (value,) * layers

    def at_layer(self, index: int) -> "Config":
        """The config as decoder layer `index` has it: with one number for each attention."""
        heads = {name: self.kv_heads(name)[index] for name in ("self_attention", "cross_attention")}
        return dataclasses.replace(self, **{f"num_kv_heads_{n}": K for n, K in heads.items()})

    @property
    def layer_groups(self) -> dict[int, int]:
        """Decoder layers in a row that are alike, and scanned: the first of each run, and how many.

        There is one run unless KV heads are given a layer.
        """
        if isinstance(self.num_kv_heads_self_attention, int) and isinstance(
            self.num_kv_heads_cross_attention, int
        ):
            return {0: self.num_decoder_layers}
        heads = list(
            zip(self.kv_heads("self_attention"), self.kv_heads("cross_attention"), strict=True)
        )
        starts = [i for i, K in enumerate(heads) if i == 0 or heads[i - 1] != K]
        ends = [*starts[1:], len(heads)]
        return {first: end - first for first, end in zip(starts, ends, strict=True)}


def _check_type(name: str, value, expected: type) -> None:
    """The field's type; sizes are 1 or more and fit XLA's indices. JSON may hold anything."""
    kinds = (int, float) if expected is float else expected
    if not isinstance(value, kinds) or (isinstance(value, bool) and expected is not bool):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
        raise UserError(f"model.{name}={value!r}; use {kind[expected]}")
    if expected is int and not 1 <= value < 2**31:
        raise UserError(f"model.{name} is not a size; use 1 or more, and less than 2^31")


def check_kv_heads(name: str, num_kv_heads: int, num_heads: int) -> None:
    """Raise a UserError with the possible values unless `num_kv_heads` divides `num_heads`."""
    fit = divisors(num_heads)
    if type(num_kv_heads) is not int or num_kv_heads not in fit:
        raise UserError(
            f"{name}={num_kv_heads} does not divide the {num_heads} heads there are (num_heads); "
            f"use one of {', '.join(map(str, fit))}"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"model.{name}={value!r}; use one of {', '.join(choices)}")
