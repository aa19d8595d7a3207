"""T5 with any number of KV heads per attention. The letters are those of `gqa/model/attention.py`.

Training runs scanned layers: every layer parameter has a leading axis L, so converting a checkpoint
is one reshape. `gqa/inference` runs the same layers to generate.
"""

from collections.abc import Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import normal, variance_scaling

from gqa.model import fused_attention
from gqa.model.attention import Segments
from gqa.model.config import REMAT, Config
from gqa.model.layers import MLP, Attention, RelativePositionBias, RMSNorm
from gqa.model.linear import linear
from gqa.runtime.sharding import constrain


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
        self.self_attention = _attention(c, c.num_kv_heads_self_attention, causal=True)
        self.cross_attention = _attention(c, c.num_kv_heads_cross_attention)
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
        unroll=length if fused_attention.platform() == "cpu" else 1,
    )
    return scanned(config, train, name=name)


class LayerGroups(nn.Module):
    """Decoder layers whose KV heads differ: a scan for each run of equal ones."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, x: Array, *shared) -> tuple[Array, None]:
        c = self.config
        for first, length in c.layer_groups.items():
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
        if len(c.layer_groups) == 1:
            layers = _layers(DecoderLayer, c, train, c.num_decoder_layers)
        else:
            layers = LayerGroups(c, train, name="layers")
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
    if len(config.layer_groups) == 1:
        return tree

    def part(first: int, length: int) -> dict:
        return jax.tree.map(lambda x: x[first : first + length], tree["decoder"]["layers"])

    runs = {str(first): part(first, length) for first, length in config.layer_groups.items()}
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
