"""T5 checkpoints of Hugging Face Transformers: T5 1.0 (ReLU, tied and scaled logits) and 1.1.

`load` reads a folder; `state_dict` and `from_config` give what Transformers' own model takes.

Their linear layers keep weights as [outputs, inputs] with heads flattened, one tensor a layer; ours
are [inputs, outputs] with a head axis, and the layers of a stack share one array.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gqa.errors import UserError
from gqa.layers import GATED_GELU, RELU
from gqa.model import Config, Transformer

ACTIVATIONS = {"relu": RELU, "gated-gelu": GATED_GELU}

# What our network has as a constant: a file that says otherwise is refused.
FIXED = {
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

# Our name: theirs.
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "d_ff": "d_ff",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_layers",
}

# Our name: theirs, which "decoder.block.3." or the like precedes and ".weight" ends.
ENCODER_LAYER = {
    "attention_norm/scale": "layer.0.layer_norm",
    "attention/query": "layer.0.SelfAttention.q",
    "attention/key": "layer.0.SelfAttention.k",
    "attention/value": "layer.0.SelfAttention.v",
    "attention/out": "layer.0.SelfAttention.o",
    "mlp_norm/scale": "layer.1.layer_norm",
    "mlp/wi_0": "layer.1.DenseReluDense.wi_0",
    "mlp/wi_1": "layer.1.DenseReluDense.wi_1",
    "mlp/wo": "layer.1.DenseReluDense.wo",
}
DECODER_LAYER = {
    "self_attention_norm/scale": "layer.0.layer_norm",
    "self_attention/query": "layer.0.SelfAttention.q",
    "self_attention/key": "layer.0.SelfAttention.k",
    "self_attention/value": "layer.0.SelfAttention.v",
    "self_attention/out": "layer.0.SelfAttention.o",
    "cross_attention_norm/scale": "layer.1.layer_norm",
    "cross_attention/query": "layer.1.EncDecAttention.q",
    "cross_attention/key": "layer.1.EncDecAttention.k",
    "cross_attention/value": "layer.1.EncDecAttention.v",
    "cross_attention/out": "layer.1.EncDecAttention.o",
    "mlp_norm/scale": "layer.2.layer_norm",
    "mlp/wi_0": "layer.2.DenseReluDense.wi_0",
    "mlp/wi_1": "layer.2.DenseReluDense.wi_1",
    "mlp/wo": "layer.2.DenseReluDense.wo",
}
LAYERS = {"encoder": ENCODER_LAYER, "decoder": DECODER_LAYER}
OUTSIDE_LAYERS = {
    "embedding": "shared",
    "encoder/position_bias/table": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "encoder/norm/scale": "encoder.final_layer_norm",
    "decoder/position_bias/table": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder/norm/scale": "decoder.final_layer_norm",
    "logits": "lm_head",
}
NOT_TRANSPOSED = ("embedding", "encoder/position_bias/table", "decoder/position_bias/table")

# A file may repeat the embedding under these names; the last one only if the logits are tied.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
# In the first T5 files, and read by nothing: cross-attention has no position bias.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def load(folder: str | os.PathLike) -> tuple[dict, Config]:
    """Parameters and config of the folder's config.json and model.safetensors.

    Raises:
        UserError: if a file cannot be read, or for what `from_state_dict` refuses.
    """
    config_file, tensors_file = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    hf_config = _read(config_file, lambda path: json.loads(path.read_bytes()))
    try:
        to_config(hf_config)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error
    state = _read(tensors_file, load_file)
    try:
        return from_state_dict(state, hf_config)
    except UserError as error:
        raise UserError(f"{tensors_file}: {error}") from error


def _read(path: Path, read: Callable[[Path], dict]) -> dict:
    """What a file holds; safetensors checks sizes against the file's before it takes memory."""
    try:
        return read(path)
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply") from error
    # The last is safetensors for a dtype that NumPy lacks.
    except (OSError, ValueError, SafetensorError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: {reason}") from error


def from_state_dict(state: Mapping[str, np.ndarray], hf_config: dict) -> tuple[dict, Config]:
    """Parameters in float32, and their config, from a state dict and its config.json.

    The vocabulary has the rows of the file. Dropout is left at our default: it belongs to training.

    Raises:
        UserError: for another model than T5, and for a tensor that is missing, not expected, or of
            another shape than hf_config says.
    """
    config = to_config(hf_config)
    layers = config.num_encoder_layers + config.num_decoder_layers
    if layers > len(state):  # before tracing so many
        raise UserError(f"{len(state)} tensors are too few for the {layers} layers of config.json")
    batch = {name: jnp.zeros((1, 1), jnp.int32) for name in ("inputs", "targets")}
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), batch)["params"]
    shapes = {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}
    names = {name: _their_names(name, shape, config) for name, shape in shapes.items()}
    _check_names(state, {theirs for group in names.values() for theirs in group})
    params = {
        name: jnp.asarray(_convert(state, names[name], name, shape))
        for name, shape in shapes.items()
    }
    return unflatten_dict(params, sep="/"), config


def to_config(hf_config: dict) -> Config:
    """Our config of a config.json; keys that older files lack have Transformers' defaults."""
    if not isinstance(hf_config, dict):
        raise UserError("not a JSON object with a model's settings")
    if hf_config.get("model_type") != "t5":
        raise UserError(f"model_type={hf_config.get('model_type')!r} is not supported; use t5")
    for key, ours in FIXED.items():
        if hf_config.get(key, ours) not in (ours, None):
            raise UserError(f"{key}={hf_config[key]!r} is not supported; use {ours}")
    activation = hf_config.get("feed_forward_proj", "relu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        supported = ", ".join(ACTIVATIONS)
        raise UserError(
            f"feed_forward_proj={activation!r} is not supported; use one of {supported}"
        )
    sizes = {ours: _size(hf_config, key) for ours, key in SIZES.items()}
    if hf_config.get("num_decoder_layers") is not None:
        sizes["num_decoder_layers"] = _size(hf_config, "num_decoder_layers")
    kv_heads = {
        f"num_kv_heads_{name}": sizes["num_heads"] for name in ("encoder", "decoder", "cross")
    }
    # Transformers 5 writes tie_word_embeddings=true for every T5 and this key for the scale.
    tied = _flag(hf_config, "tie_word_embeddings", True)
    return Config(
        **sizes,
        **kv_heads,
        activation=ACTIVATIONS[activation],
        tied_logits=_flag(hf_config, "scale_decoder_outputs", tied),
        num_buckets=_size(hf_config, "relative_attention_num_buckets", 32),
        max_distance=_size(hf_config, "relative_attention_max_distance", 128),
    )


def _size(hf_config: dict, key: str, default: int | None = None) -> int:
    value = hf_config.get(key, default)
    if value is None:
        raise UserError(f"config.json has no {key}")
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"{key}={value!r}; use a whole number, 1 or more and less than 2^31")
    return value


def _flag(hf_config: dict, key: str, default: bool) -> bool:
    value = hf_config.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{key}={value!r}; use true or false")
    return value


def state_dict(params: dict, config: Config) -> dict[str, np.ndarray]:
    """The parameters in float32 under Transformers' names; `from_state_dict` is the way back.

    Raises:
        UserError: for fewer KV heads than heads, which Transformers' T5 does not have.
    """
    for name in ("num_kv_heads_encoder", "num_kv_heads_decoder", "num_kv_heads_cross"):
        if getattr(config, name) != config.num_heads:
            raise UserError(
                f"{name}={getattr(config, name)}: Transformers' T5 is multi-head only; "
                f"use {config.num_heads}"
            )
    state = {}
    for ours, leaf in flatten_dict(params, sep="/").items():
        names = _their_names(ours, leaf.shape, config)
        leaf = np.asarray(leaf, np.float32)
        for name, layer in zip(names, leaf if "/layers/" in ours else (leaf,), strict=True):
            theirs = _their_shape(ours, layer.shape)
            stored = layer if ours in NOT_TRANSPOSED else layer.reshape(theirs[::-1]).T
            state[name] = np.ascontiguousarray(stored)
    return state


def from_config(config: Config) -> dict:
    """What a config.json says of a multi-head `config`; `to_config` is the way back."""
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return FIXED | {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": activations[config.activation],
        "tie_word_embeddings": config.tied_logits,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout_rate,
    }


def _their_names(name: str, shape: tuple[int, ...], config: Config) -> list[str]:
    """The tensors that one of our parameters is made of: one, or one a layer."""
    stack, _, rest = name.partition("/layers/")
    if not rest:
        return [f"{OUTSIDE_LAYERS[name]}.weight"]
    theirs = LAYERS[stack][rest]
    if config.activation == RELU:
        theirs = theirs.replace("wi_0", "wi")
    return [f"{stack}.block.{i}.{theirs}.weight" for i in range(shape[0])]


def _check_names(state: Mapping[str, np.ndarray], expected: set[str]) -> None:
    if missing := sorted(expected - state.keys()):
        raise UserError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(state.keys() - expected - {*COPIES, UNUSED}):
        raise UserError(f"tensor {extra[0]} is not one of T5's ({len(extra)} in all)")
    for name in COPIES:
        if name in state.keys() - expected and not np.array_equal(
            state[name], state["shared.weight"]
        ):
            raise UserError(f"tensor {name} differs from shared.weight, which it should repeat")


def _convert(
    state: Mapping[str, np.ndarray], theirs: list[str], ours: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Our parameter of `shape` from the tensors `theirs`."""
    stacked = "/layers/" in ours
    inner = shape[1:] if stacked else shape
    expected = _their_shape(ours, inner)
    layers = []
    for name in theirs:
        if state[name].shape != expected:
            raise UserError(f"tensor {name} has shape {state[name].shape}, expected {expected}")
        if not jnp.issubdtype(state[name].dtype, jnp.floating):
            raise UserError(f"tensor {name} has dtype {state[name].dtype}; use a floating one")
        layer = np.asarray(state[name], np.float32)
        layers.append((layer if ours in NOT_TRANSPOSED else layer.T).reshape(inner))
    return np.stack(layers) if stacked else layers[0]


def _their_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 1 or ours in NOT_TRANSPOSED:
        return shape
    inputs = len(shape) - 1 if ours.endswith("/out") else 1
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])
