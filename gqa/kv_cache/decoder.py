"""The sizes that decide how large a decoder's KV cache is, and the bytes that follow from them.

`model_types.py` and `config_json.py` read the sizes from a config.json, `presets.py` has the sizes
of well-known models, `command.py` prints the tables.
"""

from collections.abc import Iterable
from typing import NamedTuple


class CachedLayer(NamedTuple):
    """The keys and values that the attention of one layer keeps for each position.

    Attributes:
        kv_heads: KV heads.
        key_dim, value_dim: numbers of a key and of a value, for each KV head.
        window: the most positions that the layer keeps; 0 if it keeps all.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0

    def numbers(self, positions: int) -> int:
        """Return how many numbers the layer keeps for a sequence of `positions`."""
        kept = min(positions, self.window or positions)
        return self.kv_heads * (self.key_dim + self.value_dim) * kept


class Decoder(NamedTuple):
    """The attentions of a decoder that keep keys and values.

    Attributes:
        layers: the number of layers, including layers without a cache.
        heads: query heads.
        self_attention: an entry for each layer whose self-attention has a cache.
        cross_attention: an entry for each layer that caches an encoder's output.
        encoder_length: positions of the encoder, where the model fixes them; 0 if the user chooses.
        expanded: for latent attention, the keys and values of all heads, which a layer would keep
            if it did not keep the latent instead; None for every other attention.
        note: a sentence on memory that the table does not count.
    """

    layers: int
    heads: int
    self_attention: tuple[CachedLayer, ...]
    cross_attention: tuple[CachedLayer, ...] = ()
    encoder_length: int = 0
    expanded: CachedLayer | None = None
    note: str = ""

    @property
    def attentions(self) -> tuple[CachedLayer, ...]:
        """All attentions that keep keys and values."""
        return self.self_attention + self.cross_attention

    @property
    def kv_heads(self) -> int:
        """The number of KV heads of every attention; 0 where they differ."""
        numbers = {layer.kv_heads for layer in self.attentions}
        return numbers.pop() if len(numbers) == 1 else 0

    def with_kv_heads(self, kv_heads: int) -> "Decoder":
        """Return the same decoder with `kv_heads` KV heads in every attention."""

        def replaced(layers: Iterable[CachedLayer]) -> tuple[CachedLayer, ...]:
            return tuple(layer._replace(kv_heads=kv_heads) for layer in layers)

        return self._replace(
            self_attention=replaced(self.self_attention),
            cross_attention=replaced(self.cross_attention),
        )

    def cache_bytes(self, length: int, inputs: int, itemsize: int) -> int:
        """Return the bytes of keys and values for one sequence.

        Args:
            length: positions of the decoder.
            inputs: positions of the encoder, if there is one.
            itemsize: bytes of a number.
        """
        # Whisper's encoder, for example, always has 1500 positions, whatever the user says.
        inputs = self.encoder_length or inputs

        numbers = sum(layer.numbers(length) for layer in self.self_attention)
        numbers += sum(layer.numbers(inputs) for layer in self.cross_attention)

        return numbers * itemsize
