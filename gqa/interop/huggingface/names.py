"""Names and shapes of Transformers' T5 tensors, and where they lie in our parameters.

Transformers keeps the weight of a linear layer as [outputs, inputs] with flattened heads, one
tensor for each layer. Ours is [inputs, outputs] with a head axis, and one array holds all layers of
a stack. This file reads nothing; reading.py and writing.py do.
"""

import math

from gqa.model.config import Config

# Our names, and theirs without the prefix, such as "decoder.block.3.", and the ending ".weight".
POSITION_BIAS = "layer.0.SelfAttention.relative_attention_bias"
ENCODER_LAYER = {
    "position_bias/table": POSITION_BIAS,  # of umT5, whose layers have a table each
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
    "position_bias/table": POSITION_BIAS,
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
    "encoder/position_bias/table": f"encoder.block.0.{POSITION_BIAS}",
    "encoder/norm/scale": "encoder.final_layer_norm",
    "decoder/position_bias/table": f"decoder.block.0.{POSITION_BIAS}",
    "decoder/norm/scale": "decoder.final_layer_norm",
    "logits": "lm_head",
}
NOT_TRANSPOSED = ("embedding", "table")  # the last parts of names

EMBEDDING, LOGITS = "shared.weight", "lm_head.weight"
# Names under which a file may repeat the embedding, or have it instead of EMBEDDING; LOGITS only if
# the logits are tied.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", LOGITS)
# A tensor that shows how many KV heads an attention has, by the key of config.json that says so.
KV_HEADS_IN = {
    "cross_num_key_value_heads": "decoder.block.0.layer.1.EncDecAttention.k.weight",
    "encoder_num_key_value_heads": "encoder.block.0.layer.0.SelfAttention.k.weight",
}
# A tensor of the first T5 files that nothing reads: cross-attention has no position bias.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def theirs(name: str, shape: tuple[int, ...], config: Config) -> list[str]:
    """Return the tensors that make up one of our parameters: one, or one for each layer."""
    stack, _, rest = name.partition("/layers/")
    if not rest:
        return [f"{OUTSIDE_LAYERS[name]}.weight"]

    # Decoder layers that differ in KV heads are in groups, named by their first layer:
    # ".../layers/4/mlp/wo" holds layer 4 and those after it. Without groups the first layer is 0.
    run, _, of_run = rest.partition("/")
    first, rest = (int(run), of_run) if run.isdecimal() else (0, rest)

    # An MLP without a gate has one input matrix. Transformers calls it "wi", and a gated MLP's two
    # "wi_0" and "wi_1".
    tensor = LAYERS[stack][rest]
    if not config.is_gated:
        tensor = tensor.replace("wi_0", "wi")
    return [f"{stack}.block.{first + i}.{tensor}.weight" for i in range(shape[0])]


def is_stacked(name: str) -> bool:
    """Return whether the first axis of a parameter is that of layers."""
    return "/layers/" in name


def is_transposed(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether the tensor of one layer is the transpose of our layer of shape `shape`."""
    return len(shape) > 1 and name.rpartition("/")[2] not in NOT_TRANSPOSED


def their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the tensor that holds one layer of our shape `shape`."""
    if not is_transposed(name, shape):
        return shape

    # A query [D, N, H] has one axis of inputs; the output projection [N, H, D] has two.
    inputs = len(shape) - 1 if name.endswith("/out") else 1
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def rows(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the axis of our layer that the tensor's rows run along, and rows for each index."""
    if not is_transposed(name, shape):
        return 0, 1

    # Rows of the tensor are outputs: D of the output projection, one row each. A query [D, N, H]
    # has N heads of H rows each.
    if name.endswith("/out"):
        return len(shape) - 1, 1
    return 1, math.prod(shape[2:])
