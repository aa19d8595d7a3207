"""Write a network as a folder of CTranslate2, which runs encoder-decoders fast on CPUs and GPUs.

CTranslate2's own converter of T5 knows multi-head attention alone, but its engine has a number of
KV heads for each attention, cross-attention too. This file fills its specification of a Transformer
from our parameters, so that caches are as small as ours. The package `ctranslate2` is needed for
writing; it is optional and imported when a folder is written.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gqa.interop import huggingface
from gqa.interop.huggingface import tokenizer_files
from gqa.model.config import Config
from gqa.model.special_tokens import T5_TOKENS
from gqa.runtime.errors import CheckpointError, UserError

# Ids of the tokens that `register` names, as T5 has them.
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}

State = dict[str, np.ndarray]  # Transformers' names: tensors

# feed_forward_proj of config.json: CTranslate2's name of the activation, and whether it is gated.
ACTIVATIONS = {
    "relu": ("RELU", False),
    "gated-gelu": ("GELUTanh", True),
    "gated-silu": ("SWISH", True),
}


def save(
    params: dict, config: Config, folder: str | os.PathLike, vocabulary: str | os.PathLike
) -> None:
    """Write a new folder with model.bin and the vocabulary, in float32.

    CTranslate2 takes and returns tokens. Their names are those of the tokenizer.json in the folder.

    Raises:
        UserError: if the folder has files already, if the network has other special tokens than
            T5, if the vocabulary cannot be written as tokenizer.json, or if ctranslate2 is not
            installed.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already; name a new folder")
    if config.special_tokens != T5_TOKENS:
        raise CheckpointError(
            f"the network's padding, end and start are {tuple(config.special_tokens)}; folders of "
            f"CTranslate2 are written with T5's {tuple(T5_TOKENS)} alone"
        )

    if Path(vocabulary).is_dir():
        raise CheckpointError(f"{vocabulary}: is a folder; name a SentencePiece file")

    model = specification(params, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as name:
            unfinished = Path(name) / "model"
            unfinished.mkdir()
            tokenizer_files.write(Path(vocabulary), unfinished)
            known = Tokenizer.from_file(str(unfinished / tokenizer_files.TOKENIZER))

            # Rows of the embedding behind the last token have no name; nothing gives them.
            words = [known.id_to_token(i) or f"<row {i}>" for i in range(config.vocab_size)]
            register(model, words)
            model.save(str(unfinished))
            unfinished.rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: {error.strerror}; name a folder that can be written"
        ) from error


def register(model: Any, words: list[str]) -> None:
    """Name the tokens of a specification; token 0 begins and pads a text, 1 ends it, 2 is unknown.

    CTranslate2 checks the shapes and shares equal tensors here.
    """
    model.register_source_vocabulary(words)
    model.register_target_vocabulary(words)
    model.config.decoder_start_token = model.config.bos_token = words[0]
    model.config.eos_token, model.config.unk_token = words[1], words[2]
    model.validate()
    model.optimize(quantization="float32")


def specification(params: dict, config: Config) -> Any:
    """Return CTranslate2's TransformerSpec of a network, without the names of its tokens.

    Raises:
        UserError: for an activation or special tokens that it cannot have, and if ctranslate2 is
            not installed.
    """
    try:
        from ctranslate2.specs import common_spec, transformer_spec
    except ImportError as error:
        raise UserError("ctranslate2 is not installed; pip install ctranslate2") from error

    values = huggingface.from_config(config)
    for key, value in TOKENS.items():
        if values[key] != value:
            raise CheckpointError(f"{key}={values[key]} is not supported; use {value}")
    name = values["feed_forward_proj"]
    if name not in ACTIVATIONS:
        raise CheckpointError(f"CTranslate2 has T5 with {', '.join(ACTIVATIONS)}, not with {name}")
    activation, gated = ACTIVATIONS[name]
    options = {
        "activation": common_spec.Activation[activation],
        "ffn_glu": gated,
        "rms_norm": True,
        "relative_attention_bias": True,
        "head_dim": config.head_dim,
        # A value for each attention replaces this one.
        "num_heads_kv": config.num_heads,
    }
    encoder = transformer_spec.TransformerEncoderSpec(
        config.num_encoder_layers, config.num_heads, **options
    )
    decoder = transformer_spec.TransformerDecoderSpec(
        config.num_decoder_layers, config.num_heads, **options
    )
    model = transformer_spec.TransformerSpec(encoder, decoder)
    model.config.layer_norm_epsilon = 1e-6

    state = huggingface.state_dict(params, config)
    _fill_stack(encoder, encoder.embeddings[0], state, "encoder", config)
    _fill_stack(decoder, decoder.embeddings, state, "decoder", config)
    decoder.projection.weight = state.get("lm_head.weight", state["shared.weight"])
    if config.tied_logits:
        decoder.scale_outputs = np.float32(config.d_model**-0.5)
    return model


def _fill_stack(spec: Any, embeddings: Any, state: State, stack: str, config: Config) -> None:
    """Fill the specification of the encoder or the decoder."""
    spec.scale_embeddings = False
    embeddings.weight = state["shared.weight"]
    spec.layer_norm.gamma = state[f"{stack}.final_layer_norm.weight"]

    is_decoder = stack == "decoder"
    self_heads = config.kv_heads("self_attention" if is_decoder else "encoder")
    bias = None
    for i, layer in enumerate(spec.layer):
        block = f"{stack}.block.{i}.layer"
        attention = layer.self_attention
        _fill_attention(attention, state, f"{block}.0.SelfAttention", self_heads[i])
        attention.layer_norm.gamma = state[f"{block}.0.layer_norm.weight"]

        # T5 has one table, which the first layer holds; CTranslate2 reads one in each layer.
        bias = state.get(f"{block}.0.SelfAttention.relative_attention_bias.weight", bias)
        attention.relative_attention_bias = bias
        attention.relative_attention_max_distance = np.int32(config.max_distance)

        if is_decoder:
            cross_heads = config.kv_heads("cross_attention")[i]
            _fill_attention(layer.attention, state, f"{block}.1.EncDecAttention", cross_heads)
            layer.attention.layer_norm.gamma = state[f"{block}.1.layer_norm.weight"]
        _fill_mlp(layer.ffn, state, f"{block}.{1 + is_decoder}")


def _fill_attention(spec: Any, state: State, name: str, num_kv_heads: int) -> None:
    query, key, value, out = (state[f"{name}.{x}.weight"] for x in "qkvo")
    # Self-attention computes queries, keys and values in one product, cross-attention in two.
    products = [[query, key, value]] if len(spec.linear) == 2 else [[query], [key, value]]
    for linear, weights in zip(spec.linear, [*products, [out]], strict=True):
        linear.weight = np.concatenate(weights)

    spec.num_heads_kv = np.int32(num_kv_heads)
    spec.queries_scale = np.float32(1.0)  # T5's initial weights have the factor


def _fill_mlp(spec: Any, state: State, name: str) -> None:
    dense = f"{name}.DenseReluDense"
    is_gated = f"{dense}.wi_0.weight" in state
    spec.linear_0.weight = state[f"{dense}.wi_0.weight" if is_gated else f"{dense}.wi.weight"]
    if is_gated:
        spec.linear_0_noact.weight = state[f"{dense}.wi_1.weight"]
    spec.linear_1.weight = state[f"{dense}.wo.weight"]
    spec.layer_norm.gamma = state[f"{name}.layer_norm.weight"]
