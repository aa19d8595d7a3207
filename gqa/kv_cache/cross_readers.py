"""Readers of decoders that attend to an encoder's output, as `readers.py` has for all others."""

from gqa.kv_cache.decoder import CachedLayer, Decoder
from gqa.kv_cache.fields import Fields
from gqa.kv_cache.readers import causal, every
from gqa.model.config import check_kv_heads
from gqa.runtime.checks import check_whole_number
from gqa.runtime.errors import ConfigError


def t5gemma_decoder(fields: Fields) -> Decoder:
    """Read T5Gemma's decoder: Gemma 2 with cross-attention of the same heads in every layer."""
    decoder = causal(every(2))(fields)
    # Cross-attention reads the whole input in every layer, also where self-attention has a window.
    cross = tuple(layer._replace(window=0) for layer in decoder.self_attention)
    return decoder._replace(cross_attention=cross)


def encoder_decoder(fields: Fields) -> Decoder:
    """Read BART's family: the decoder's sizes have names of their own."""
    layers, heads = fields.size("decoder_layers"), fields.size("decoder_attention_heads")
    size = fields.shared_width(heads)
    attentions = (CachedLayer(heads, size, size),) * layers
    # Only Whisper's type has this field: its encoder always sees 30 seconds of audio.
    length = fields.size("max_source_positions") if "max_source_positions" in fields else 0
    return Decoder(layers, heads, attentions, attentions, length)


def t5(fields: Fields) -> Decoder:
    """Read T5's family; `gqa.interop.huggingface` writes the fields of grouped heads."""
    layers = fields.size_or(fields.layers, "num_decoder_layers")
    size = fields.size("d_kv")

    def attentions(name: str) -> tuple[CachedLayer, ...]:
        value = fields[name]
        # One number holds for all layers; null stands for multi-head attention.
        numbers = value if isinstance(value, list) else [value] * layers
        if len(numbers) != layers:
            raise ConfigError(name, value, f"use one number for each of the {layers} layers")
        heads = [fields.heads if number is None else number for number in numbers]
        for number in heads:
            check_kv_heads(name, check_whole_number(name, number), fields.heads)
        return tuple(CachedLayer(number, size, size) for number in heads)

    self_attention = attentions("num_key_value_heads")
    return Decoder(layers, fields.heads, self_attention, attentions("cross_num_key_value_heads"))


def mllama(fields: Fields) -> Decoder:
    """Read Llama 3.2 Vision: some layers attend to the image instead of the text."""
    kv_heads, size = fields.size("num_key_value_heads"), fields.shared_width(fields.heads)
    check_kv_heads("num_key_value_heads", kv_heads, fields.heads)

    # Without the field, these are the layers of Transformers' class.
    crossed = set(range(3, 40, 5))
    if fields["cross_attention_layers"] is not None:
        crossed = set(fields.indices("cross_attention_layers"))
    crossed &= set(range(fields.layers))
    if len(crossed) == fields.layers:
        raise ConfigError("cross_attention_layers", sorted(crossed), "leave layers for the text")

    layer = CachedLayer(kv_heads, size, size)
    note = (
        "the input is one image in all of its tiles; a text without an image keeps nothing for it"
    )
    return Decoder(
        fields.layers,
        fields.heads,
        (layer,) * (fields.layers - len(crossed)),
        (layer,) * len(crossed),
        note=note,
    )
