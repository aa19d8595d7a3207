"""T5 with any number of KV heads per attention. The letters are those of `gqa/attention.py`.

Training runs scanned layers: every layer parameter has a leading axis L, so converting a checkpoint
is one reshape. `gqa/inference` runs the same layers to generate.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import normal, variance_scaling

from gqa import kernels
from gqa.attention import Segments, linear
from gqa.errors import UserError
from gqa.layers import GATED_GELU, MLP, RELU, Attention, RelativePositionBias, RMSNorm
from gqa.sharding import constrain, divisors

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
    num_kv_heads_decoder: int | tuple[int, ...]
    num_kv_heads_cross: int | tuple[int, ...]
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
        heads = {name: self.kv_heads(name)[index] for name in ("decoder", "cross")}
        return dataclasses.replace(self, **{f"num_kv_heads_{n}": K for n, K in heads.items()})

    @property
    def runs(self) -> dict[int, int]:
        """Decoder layers in a row that are alike, and scanned: the first of each run, and how many.

        There is one run unless KV heads are given a layer.
        """
        if isinstance(self.num_kv_heads_decoder, int) and isinstance(self.num_kv_heads_cross, int):
            return {0: self.num_decoder_layers}
        heads = list(zip(self.kv_heads("decoder"), self.kv_heads("cross"), strict=True))
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


def _attention(config: Config, num_kv_heads: int, causal: bool = False) -> Attention:
    return Attention(
        d_model=config.d_model,
        num_heads=config.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.head_dim,
        causal=causal,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.dtype),
    )


def _dropout(config: Config, **kwargs) -> nn.Dropout:
    # T5 draws one mask for all positions; only the encoder's last dropout has one per position.
    return nn.Dropout(config.dropout_rate, **({"broadcast_dims": (-2,)} | kwargs))


def _mlp(config: Config) -> MLP:
    return MLP(config.d_ff, config.activation, partial(_dropout, config), jnp.dtype(config.dtype))


def _norm(config: Config, **kwargs) -> RMSNorm:
    return RMSNorm(jnp.dtype(config.dtype), **kwargs)


def _position_bias(config: Config, bidirectional: bool, **kwargs) -> RelativePositionBias:
    c = config
    return RelativePositionBias(c.num_heads, c.num_buckets, c.max_distance, bidirectional, **kwargs)


class EncoderLayer(nn.Module):
    config: Config
    train: bool

    def setup(self):
        c = self.config
        self.attention_norm, self.mlp_norm = _norm(c), _norm(c)
        self.attention = _attention(c, c.num_kv_heads_encoder)
        self.mlp = _mlp(c)
        self.dropout = _dropout(c)

    def __call__(self, x: Array, position_bias: Array, segments: Segments) -> tuple[Array, None]:
        """x [B, S, D], position_bias [1, N, S, S]."""
        h = self.attention_norm(x)
        h = self.attention(h, h, position_bias, segments, self.train)
        x += self.dropout(h, deterministic=not self.train)
        h = self.mlp(self.mlp_norm(x), self.train)
        x += self.dropout(h, deterministic=not self.train)
        return constrain(x, "batch", None, None), None


class DecoderLayer(nn.Module):
    config: Config
    train: bool

    def setup(self):
        c = self.config
        self.self_attention_norm, self.cross_attention_norm = _norm(c), _norm(c)
        self.mlp_norm = _norm(c)
        self.self_attention = _attention(c, c.num_kv_heads_decoder, causal=True)
        self.cross_attention = _attention(c, c.num_kv_heads_cross)
        self.mlp = _mlp(c)
        self.dropout = _dropout(c)

    def __call__(self, x, encoded, position_bias, segments, cross_segments) -> tuple[Array, None]:
        """x [B, T, D], encoded [B, S, D], position_bias [1, N, T, T]; segments may be None."""
        h = self.self_attention_norm(x)
        h = self.self_attention(h, h, position_bias, segments, self.train)
        x += self.dropout(h, deterministic=not self.train)
        h = self.cross_attention_norm(x)
        h = self.cross_attention(h, encoded, None, cross_segments, self.train)
        x += self.dropout(h, deterministic=not self.train)
        h = self.mlp(self.mlp_norm(x), self.train)
        x += self.dropout(h, deterministic=not self.train)
        return constrain(x, "batch", None, None), None


def _layers(
    layer: type[nn.Module], config: Config, train: bool, length: int, name: str = "layers"
) -> nn.Module:
    """`length` layers as one scan: x is carried, other arguments are shared by all layers."""
    if REMAT[config.remat] is not None:
        layer = nn.remat(layer, policy=REMAT[config.remat], prevent_cse=False)
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=length,
        # A loop on a CPU copies every parameter and activation that its body slices.
        unroll=length if kernels.platform() == "cpu" else 1,
    )
    return scanned(config, train, name=name)


class Runs(nn.Module):
    """Decoder layers whose KV heads differ: a scan for each run of equal ones."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, x: Array, *shared) -> tuple[Array, None]:
        c = self.config
        for first, length in c.runs.items():
            run = _layers(DecoderLayer, c.at_layer(first), self.train, length, str(first))
            x, _ = run(x, *shared)
        return x, None


class Encoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Array, segments: Segments, train: bool) -> Array:
        c, S = self.config, x.shape[1]
        position_bias = _position_bias(c, bidirectional=True, name="position_bias")(S, S)
        x = _dropout(c)(x, deterministic=not train)
        x, _ = _layers(EncoderLayer, c, train, c.num_encoder_layers)(x, position_bias, segments)
        return _dropout(c, broadcast_dims=())(_norm(c, name="norm")(x), deterministic=not train)


class Decoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, encoded, segments, cross_segments, train: bool) -> Array:
        c, T = self.config, x.shape[1]
        position_bias = _position_bias(c, bidirectional=False, name="position_bias")(T, T)
        x = _dropout(c)(x, deterministic=not train)
        if len(c.runs) == 1:
            layers = _layers(DecoderLayer, c, train, c.num_decoder_layers)
        else:
            layers = Runs(c, train, name="layers")
        x, _ = layers(x, encoded, position_bias, segments, cross_segments)
        return _dropout(c)(_norm(c, name="norm")(x), deterministic=not train)


class Transformer(nn.Module):
    """The whole network. A batch is a dict of int32 arrays, 0 being padding:

    inputs [B, S], targets [B, T] and, if packed, inputs_segments, targets_segments (from 1) and
    targets_positions of the same shapes.
    """

    config: Config

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", normal(1.0), (c.vocab_size, c.d_model))
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        if not c.tied_logits:
            init = variance_scaling(1.0, "fan_in", "truncated_normal")
            self.logits = self.param("logits", init, (c.d_model, c.vocab_size))

    def __call__(self, batch: dict[str, Array], train: bool = False) -> Array:
        """Teacher-forced logits [B, T, V] of batch["targets"], in float32."""
        inputs, targets = batch["inputs"], batch["targets"]
        packed = "targets_segments" in batch
        if packed:
            source, target = batch["inputs_segments"], batch["targets_segments"]
            segments = Segments(target, target, packed)
        else:
            source, target = (inputs > 0).astype(jnp.int32), jnp.ones_like(targets)
            segments = None  # a position sees all before it; what is behind the end is not scored
        x = self.encoder(self.embed(inputs), Segments(source, source, packed), train)
        cross = Segments(target, source, packed)
        previous = shift_right(targets, batch.get("targets_positions"))
        return self.to_logits(self.decoder(self.embed(previous), x, segments, cross, train))

    def embed(self, tokens: Array) -> Array:
        # The few rows are cut by the batch; a table that "data" splits is gathered for them.
        table = constrain(self.embedding, "vocab", None)
        return constrain(table[tokens].astype(self.config.dtype), "batch", None, None)

    def to_logits(self, x: Array) -> Array:
        """Logits [..., V] of decoder output [..., D]; this product is in float32."""
        x = x.astype(jnp.float32)
        if self.config.tied_logits:
            logits = x * self.config.d_model**-0.5 @ self.embedding.T
        else:
            logits = linear(x, self.logits)
        return constrain(logits, "batch", None, "vocab")


def shift_right(targets: Array, positions: Array | None = None) -> Array:
    """Decoder inputs [B, T]: each example starts with 0 (T5's start token is its padding)."""
    shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return shifted if positions is None else jnp.where(positions == 0, 0, shifted)


def cut(tree: dict, config: Config) -> dict:
    """A tree like parameters whose decoder layers are one stack, with one for each of its runs."""
    if len(config.runs) == 1:
        return tree

    def part(first: int, length: int) -> dict:
        return jax.tree.map(lambda x: x[first : first + length], tree["decoder"]["layers"])

    runs = {str(first): part(first, length) for first, length in config.runs.items()}
    return tree | {"decoder": tree["decoder"] | {"layers": runs}}


def each_layer(stack: dict) -> Iterator[dict]:
    """Each layer's parameters of a stack: `params["encoder"]` or `params["decoder"]`."""
    layers = stack["layers"]
    for run in [layers] if "mlp" in layers else [layers[i] for i in sorted(layers, key=int)]:
        for i in range(len(run["mlp"]["wo"])):
            yield jax.tree.map(lambda x, i=i: x[i], run)


@partial(jax.jit, static_argnums=0)
def init_params(config: Config, seed: int) -> dict:
    """Random parameters, drawn from T5's initialisers."""
    batch = {name: jnp.zeros((1, 1), jnp.int32) for name in ("inputs", "targets")}
    return Transformer(config).init(jax.random.key(seed), batch)["params"]


def count_params(config: Config) -> int:
    """Number of parameters, from shapes alone."""
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
