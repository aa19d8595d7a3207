"""T5 with any number of KV heads in each attention. Letters are those of `gqa/model/attention.py`.

This file puts the parts of `layers.py` together: layers, stacks of layers, the network, and its
parameters as a tree. Training runs scanned layers: every layer parameter has a leading axis L. So
the compiler sees one layer instead of L, and converting a checkpoint is one reshape for all layers.
For example, the keys of a decoder are params["decoder"]["layers"]["self_attention"]["key"], an
array [L, D, K, H].

`decoder_layer` is the order of a decoder layer's parts. Training and `gqa/inference/step.py`, which
generates a token at a time, both call it.
"""

from collections.abc import Callable, Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, variance_scaling
from jaxtyping import Array, Float, Int

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
    """An encoder layer: self-attention and MLP, each normed and added to x."""

    config: Config
    train: bool

    def setup(self):
        c = self.config
        if c.position_bias_per_layer:
            self.position_bias = _position_bias(c, bidirectional=True)
        self.attention_norm, self.mlp_norm = _norm(c), _norm(c)
        self.attention = _attention(c, c.num_kv_heads_encoder)
        self.mlp = _mlp(c)
        self.dropout = _dropout(c)

    def __call__(
        self, x: Array, position_bias: Array | None, segments: Segments
    ) -> tuple[Array, None]:
        """Return x [B, S, D] after this layer, and None, which `nn.scan` asks for.

        position_bias is [1, N, S, S], or None if each layer has its own.
        """
        if self.config.position_bias_per_layer:
            position_bias = self.position_bias(x.shape[1], x.shape[1])

        # T5 norms what a part reads and adds what the part computes to the unnormed x ("pre-norm").
        h = self.attention_norm(x)
        h = self.attention(h, h, position_bias, segments, self.train)
        x += self.dropout(h, deterministic=not self.train)

        h = self.mlp(self.mlp_norm(x), self.train)
        x += self.dropout(h, deterministic=not self.train)
        return constrain(x, "batch", None, None), None


def decoder_layer(
    x: Array,
    norms: tuple[Callable[[Array], Array], Callable[[Array], Array], Callable[[Array], Array]],
    self_attention: Callable[[Array], Array],
    cross_attention: Callable[[Array], Array],
    mlp: Callable[[Array], Array],
) -> Array:
    """Run a decoder layer: self-attention, cross-attention and MLP, each normed and added to x.

    Args:
        x: [B, T, D] in training; [B, R, D], one position of R beams, in a decoding step.
        norms: the norms before self-attention, before cross-attention and before the MLP.
        self_attention, cross_attention, mlp: take the normed x and return what is added to x.
    """
    # T5 norms what a part reads and adds what the part computes to the unnormed x ("pre-norm").
    self_attention_norm, cross_attention_norm, mlp_norm = norms
    x += self_attention(self_attention_norm(x))
    x += cross_attention(cross_attention_norm(x))
    x += mlp(mlp_norm(x))
    return x


class DecoderLayer(nn.Module):
    """A decoder layer as it is trained: `decoder_layer` over whole targets, with dropout."""

    config: Config
    train: bool

    def setup(self):
        c = self.config
        if c.position_bias_per_layer:
            self.position_bias = _position_bias(c, bidirectional=False)
        self.self_attention_norm, self.cross_attention_norm = _norm(c), _norm(c)
        self.mlp_norm = _norm(c)
        self.self_attention = _attention(c, c.layer_kv_heads("self_attention"), causal=True)
        self.cross_attention = _attention(c, c.layer_kv_heads("cross_attention"))
        self.mlp = _mlp(c)
        self.dropout = _dropout(c)

    def __call__(
        self,
        x: Array,
        encoded: Array,
        position_bias: Array | None,
        segments: Segments | None,
        cross_segments: Segments,
    ) -> tuple[Array, None]:
        """Return x [B, T, D] after this layer, and None, which `nn.scan` asks for.

        Args:
            x: [B, T, D].
            encoded: the encoder's output [B, S, D].
            position_bias: [1, N, T, T], or None if each layer has its own.
            segments: which targets attend to each other; None limits nothing but causality.
            cross_segments: which targets attend to which inputs.
        """
        if self.config.position_bias_per_layer:
            position_bias = self.position_bias(x.shape[1], x.shape[1])

        # Dropout is part of training alone, so it is wrapped around the parts here and not written
        # into `decoder_layer`, which generation shares.
        def drop(h: Array) -> Array:
            return self.dropout(h, deterministic=not self.train)

        def self_attention(h: Array) -> Array:
            return drop(self.self_attention(h, h, position_bias, segments, self.train))

        def cross_attention(h: Array) -> Array:
            return drop(self.cross_attention(h, encoded, None, cross_segments, self.train))

        def mlp(h: Array) -> Array:
            return drop(self.mlp(h, self.train))

        norms = self.self_attention_norm, self.cross_attention_norm, self.mlp_norm
        x = decoder_layer(x, norms, self_attention, cross_attention, mlp)
        return constrain(x, "batch", None, None), None


def _layers(
    layer: type[nn.Module], config: Config, train: bool, length: int, name: str = "layers"
) -> nn.Module:
    """Return `length` layers as one scan: x is carried, all layers share the other arguments.

    Each parameter of `layer` gets a leading axis of `length`, and each layer its own dropout key.
    """
    if REMAT[config.remat] is not None:
        # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barriers
        # that `prevent_cse` would add are not needed.
        layer = nn.remat(layer, policy=REMAT[config.remat], prevent_cse=False)

    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=length,
        # On a CPU, a loop would copy every parameter and activation that its body slices.
        unroll=length if fused_attention.platform() == "cpu" else 1,
    )
    return scanned(config, train, name=name)


class LayerGroups(nn.Module):
    """Decoder layers that differ in their numbers of KV heads, as one scan for each layer group."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, x: Array, *shared) -> tuple[Array, None]:
        c = self.config
        for first, length in c.layer_groups.items():
            group = _layers(DecoderLayer, c.at_layer(first), self.train, length, str(first))
            x, _ = group(x, *shared)
        return x, None


class Encoder(nn.Module):
    """Embedded inputs [B, S, D] -> the encoder's output [B, S, D]."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, segments: Segments, train: bool) -> Array:
        c, S = self.config, x.shape[1]
        position_bias = None
        if not c.position_bias_per_layer:
            position_bias = _position_bias(c, bidirectional=True, name="position_bias")(S, S)

        # The last dropout, behind the norm, draws for each position; the others draw once for all
        # positions.
        x = _dropout(c)(x, deterministic=not train)
        x, _ = _layers(EncoderLayer, c, train, c.num_encoder_layers)(x, position_bias, segments)
        return _dropout(c, broadcast_dims=())(_norm(c, name="norm")(x), deterministic=not train)


class Decoder(nn.Module):
    """Embedded targets [B, T, D] and the encoder's output [B, S, D] -> [B, T, D]."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Array,
        encoded: Array,
        segments: Segments | None,
        cross_segments: Segments,
        train: bool,
    ) -> Array:
        c, T = self.config, x.shape[1]
        position_bias = None
        if not c.position_bias_per_layer:
            position_bias = _position_bias(c, bidirectional=False, name="position_bias")(T, T)
        x = _dropout(c)(x, deterministic=not train)

        # Layers with different numbers of KV heads have arrays of different shapes, which one scan
        # cannot stack.
        if len(c.layer_groups) == 1:
            layers = _layers(DecoderLayer, c, train, c.num_decoder_layers)
        else:
            layers = LayerGroups(c, train, name="layers")
        x, _ = layers(x, encoded, position_bias, segments, cross_segments)
        return _dropout(c)(_norm(c, name="norm")(x), deterministic=not train)


class Transformer(nn.Module):
    """The whole network.

    A batch is a dict of int32 arrays: inputs [B, S] and targets [B, T], padded with the config's
    `pad_token_id`. If a row holds several examples (packing), there are also inputs_segments and
    targets_segments, which number the examples of a row from 1 and are 0 where there is padding,
    and targets_positions, all of the same shapes.
    """

    config: Config

    def setup(self):
        c = self.config
        # Inputs and targets share one table of embeddings. T5 1.0 also uses it for the logits.
        self.embedding = self.param("embedding", normal(1.0), (c.vocab_size, c.d_model))
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        if not c.tied_logits:
            init = variance_scaling(1.0, "fan_in", "truncated_normal")
            self.logits = self.param("logits", init, (c.d_model, c.vocab_size))

    def __call__(self, batch: dict[str, Array], train: bool = False) -> Array:
        """Return the teacher-forced logits [B, T, V] of batch["targets"], in float32."""
        inputs, targets, special = batch["inputs"], batch["targets"], self.config.special_tokens
        packed = "targets_segments" in batch
        if packed:
            source, target = batch["inputs_segments"], batch["targets_segments"]
            segments = Segments(target, target, packed)
        else:
            source, target = (inputs != special.pad).astype(jnp.int32), jnp.ones_like(targets)
            # Causality is enough: a target sees only targets before it, and the padding behind
            # the end of a text is not scored.
            segments = None

        x = self.encoder(self.embed(inputs), Segments(source, source, packed), train)
        cross = Segments(target, source, packed)
        previous = shift_right(targets, special.start, batch.get("targets_positions"))
        return self.to_logits(self.decoder(self.embed(previous), x, segments, cross, train))

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up the embeddings of tokens."""
        # Split the looked-up rows by the batch. With fsdp the mesh axis "data" splits the table
        # along D, and the table is gathered first.
        table = constrain(self.embedding, "vocab", None)
        return constrain(table[tokens].astype(self.config.dtype), "batch", None, None)

    def to_logits(self, x: Array) -> Array:
        """Return float32 logits [..., V] of the decoder's output [..., D]."""
        x = x.astype(jnp.float32)
        if self.config.tied_logits:
            # The embedding has unit variance, so a product over D is divided by sqrt(D).
            logits = x * self.config.d_model**-0.5 @ self.embedding.T
        else:
            logits = linear(x, self.logits)
        return constrain(logits, "batch", None, "vocab")


def shift_right(
    targets: Int[Array, "B T"], start: int, positions: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Return the decoder's inputs: the targets one position later, behind the token `start`.

    In a packed row every example starts with this token, wherever `positions` is 0. Example: start
    0 and targets 7 8 1 | 9 1 with positions 0 1 2 | 0 1 give 0 7 8 | 0 9.
    """
    shifted = jnp.pad(targets, ((0, 0), (1, 0)), constant_values=start)[:, :-1]
    return shifted if positions is None else jnp.where(positions == 0, start, shifted)


def cut(tree: dict, config: Config) -> dict:
    """Cut the decoder's one stack of layers into a stack for each layer group of `config`.

    The tree is one of parameters, or one of the same structure (an optimizer's state). For a config
    with a single layer group the tree is returned as it is. Example: layer groups {0: 2, 2: 1} turn
    the arrays [3, ...] of "layers" into {"0": arrays [2, ...], "2": arrays [1, ...]}.
    """
    if len(config.layer_groups) == 1:
        return tree

    def part(first: int, length: int) -> dict:
        return jax.tree.map(lambda x: x[first : first + length], tree["decoder"]["layers"])

    groups = {str(first): part(first, length) for first, length in config.layer_groups.items()}
    return tree | {"decoder": tree["decoder"] | {"layers": groups}}


def each_layer(stack: dict) -> Iterator[dict]:
    """Yield each layer's parameters of a stack, `params["encoder"]` or `params["decoder"]`."""
    # A stack of several layer groups has their first layers as keys ("0", "2"), other stacks have
    # the parts of a layer ("mlp", ...).
    layers = stack["layers"]
    groups = [layers] if "mlp" in layers else [layers[i] for i in sorted(layers, key=int)]
    for group in groups:
        for i in range(len(group["mlp"]["wo"])):
            yield jax.tree.map(lambda x, i=i: x[i], group)


@partial(jax.jit, static_argnums=0)
def init_params(config: Config, seed: int) -> dict:
    """Draw random parameters from T5's initialisers; the same seed gives the same parameters."""
    # The shapes of parameters depend on the config alone, so the shortest batch does.
    batch = {name: jnp.zeros((1, 1), jnp.int32) for name in ("inputs", "targets")}
    return Transformer(config).init(jax.random.key(seed), batch)["params"]


def count_params(config: Config) -> int:
    """Return the number of parameters, from shapes alone."""
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
