"""The interface that both layouts of decoding implement: how weights and caches lie in memory.

`step.py` computes a decoding step through this interface alone. `cpu_layout.py` implements it for
one CPU, `accelerator_layout.py` for everything else. There are two implementations, because the
speed of a step is the speed at which it reads weights and caches, and XLA reads different layouts
fast on different backends (docs/speed.md has the measurements).

A `DecoderLayout` is not a `gqa.runtime.mesh.Layout`: the latter says how arrays are split over
the devices of a mesh.

Letters are those of `gqa/model/attention.py`. R is the number of beams of an example, and S is the
number of positions of a cache or of the inputs.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from gqa.model.config import Config

# The keys and the values of one attention of one layer; a layout decides their shapes.
KeysValues = tuple[Array, Array]


@runtime_checkable  # so that the tests' type checks accept it
class DecoderLayout(Protocol):
    """Memory layout of the weights and caches of one decoder layer. All methods are pure."""

    @property
    def config(self) -> Config:
        """The config of `Config.at_layer`: a single number of KV heads for each attention."""

    def prepare_layer(self, params: dict) -> dict:
        """Rearrange the parameters of one decoder layer. Called once for a checkpoint."""

    def prepare_logits(self, kernel: Float[Array, "D V"]) -> Array:
        """Rearrange the kernel of the logits. Called once for a checkpoint."""

    def padding(self, length: int, num_query_rows: int) -> int:
        """Return how many positions of padding the layout needs behind `length` keys.

        `num_query_rows` is the number of query rows that read a KV head in one product.
        """

    def cross_attention_cache(
        self, weights: dict, encoded: Float[Array, "B S D"], num_query_rows: int
    ) -> KeysValues:
        """Project the encoder's output to the keys and values of cross-attention."""

    def empty_cache(self, num_rows: int, length: int, dtype: str) -> KeysValues:
        """Return zero keys and values of self-attention, for `num_rows` = B * R texts.

        The cache has a capacity of `length` positions or, in a layout of blocks, up to one block
        more.
        """

    def num_rows(self, cache: KeysValues) -> int:
        """Return the number of texts, B * R, that a self-attention cache was made for."""

    def capacity(self, cache: KeysValues) -> int:
        """Return the number of positions that a self-attention cache can hold."""

    def grow(self, old: Array, empty: Array) -> Array:
        """Copy the keys or the values `old` into `empty`, zeros with a greater capacity."""

    def update_cache(
        self,
        cache: KeysValues,
        k: Float[Array, "B R K H"],
        v: Float[Array, "B R K H"],
        index: Int[Array, ""] | int,
    ) -> KeysValues:
        """Write the keys and values of position `index` into a self-attention cache."""

    def self_attention_heads(
        self, weights: dict, x: Float[Array, "B R D"]
    ) -> tuple[Float[Array, "B R N H"], Float[Array, "B R K H"], Float[Array, "B R K H"]]:
        """Project x to the queries, keys and values of self-attention."""

    def cross_attention_queries(
        self, weights: dict, x: Float[Array, "B R D"]
    ) -> Float[Array, "B R N H"]:
        """Project x to the queries of cross-attention."""

    def self_attention(
        self, q: Float[Array, "B R N H"], cache: KeysValues, bias: Float[Array, "1 N 1 S"]
    ) -> Float[Array, "B R N H"]:
        """Attend from each of the B * R texts to the cache of this text.

        Equals `grouped_query_attention`.
        """

    def cross_attention(
        self, q: Float[Array, "B R N H"], cache: KeysValues, mask: Float[Array, "B 1 1 S"]
    ) -> Float[Array, "B R N H"]:
        """Attend from all R beams of an example to the keys of the example's input.

        Equals `grouped_query_attention`.
        """

    def project_out(self, kernel: Array, x: Float[Array, "B R N H"]) -> Float[Array, "B R D"]:
        """Apply the output projection of either attention."""

    def mlp(self, weights: dict, x: Float[Array, "B R D"]) -> Float[Array, "B R D"]:
        """Apply the MLP of `gqa.model.layers.MLP`."""

    def logits(self, x: Float[Array, "B R D"], kernel: Array) -> Float[Array, "B R V"]:
        """Multiply by a kernel of logits that `prepare_logits` rearranged."""
