"""T5 with grouped-query attention for Hugging Face Transformers.

`python -m gqa export` copies this file beside the weights of a grouped network, where Transformers
loads it:

    model = AutoModelForSeq2SeqLM.from_pretrained(FOLDER, trust_remote_code=True)

The model is Transformers' own T5 with other attentions, whose keys and values have fewer heads than
the queries. Query head n reads KV head n // (num_heads / KV heads). The cache holds every key and
value once.

The file stands alone: it imports torch and Transformers, which the rest of the project does not
need, and nothing of the project imports it.

B batch, T query length, S key length, N query heads, K KV heads, G = N / K, H head dim.
"""

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack


class T5GQAConfig(T5Config):
    """T5's configuration with the number of KV heads of each attention.

    Attributes:
        num_key_value_heads: of the decoder's self-attention: one number, or a list with a number
            for each decoder layer. None stands for `num_heads`, here and below.
        cross_num_key_value_heads: of cross-attention, likewise.
        encoder_num_key_value_heads: of every layer of the encoder.
        position_bias_per_layer: whether each layer has a table of relative positions, as in umT5.
    """

    model_type = "t5_gqa"

    num_key_value_heads: int | list[int] | None = None
    cross_num_key_value_heads: int | list[int] | None = None
    encoder_num_key_value_heads: int | list[int] | None = None
    position_bias_per_layer: bool = False

    def kv_heads(self, name: str, layers: int) -> list[int]:
        """Return the numbers of KV heads of `layers` layers, from the attribute `name`.

        Raises:
            ValueError: if there is not one number for each layer, or one does not divide num_heads.
        """
        value = getattr(self, name)
        numbers = value if isinstance(value, list) else [value or self.num_heads] * layers
        if len(numbers) != layers or any(self.num_heads % number for number in numbers):
            raise ValueError(
                f"{name}={value} must be a divisor of num_heads={self.num_heads}, "
                f"or a list with one for each of the {layers} layers"
            )
        return numbers


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **_kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, T, N, H] and weights [B, N, T, S] of grouped-query attention.

    Args:
        query: [B, N, T, H]
        key, value: [B, K, S, H]
        attention_mask: added to the logits [B, N, T, S], as is `position_bias`.
    """
    B, N, T, H = query.shape
    K = key.shape[1]

    # The G query heads of a KV head lie next to each other. As rows of one matrix [G * T, H] they
    # meet their keys in one product, without a copy of the keys for each.
    logits = torch.matmul(query.reshape(B, K, -1, H), key.transpose(2, 3)).view(B, N, T, -1)
    logits = logits * scaling
    for bias in (position_bias, attention_mask):
        logits = logits if bias is None else logits + bias

    weights = nn.functional.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    outputs = torch.matmul(weights.view(B, K, N // K * T, -1), value).view(B, N, T, H)
    return outputs.transpose(1, 2), weights


class T5GroupedAttention(T5Attention):
    """T5's attention with `num_kv_heads` heads of keys and values.

    Other arguments are those of T5Attention.
    """

    def __init__(self, config: T5GQAConfig, num_kv_heads: int, **options):
        super().__init__(config, **options)
        self.num_key_value_groups = self.n_heads // num_kv_heads  # read by Transformers' SDPA
        width = num_kv_heads * self.key_value_proj_dim
        self.k = nn.Linear(self.d_model, width, bias=False)
        self.v = nn.Linear(self.d_model, width, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return outputs [B, T, D], the position bias for the layers above, and weights or None.

        Args:
            hidden_states: [B, T, D], where queries come from, and the keys of self-attention.
            key_value_states: [B, S, D], where the keys of cross-attention come from.
            position_bias: of the layer below, [1, N, T, S]. The first layer has the table, or each
                layer has one.
        """
        # Copied, because a cache of fixed size counts on in place.
        seen = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        seen = seen.clone() if isinstance(seen, torch.Tensor) else seen

        query = self._split_heads(self.q(hidden_states))
        key, value = self._keys_and_values(hidden_states, key_value_states, past_key_values)
        has_own = self.has_relative_attention_bias
        if has_own and (position_bias is None or self.config.position_bias_per_layer):
            position_bias = self.compute_bias(
                query.shape[2], key.shape[2], device=query.device, past_seen_tokens=seen
            )

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        outputs, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        return self.o(outputs.flatten(2)), position_bias, weights

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """Turn [B, T, heads * H] into [B, heads, T, H]."""
        return states.unflatten(2, (-1, self.key_value_proj_dim)).transpose(1, 2)

    def _keys_and_values(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [B, K, S, H] of all positions so far, and cache the new ones."""
        is_cross = key_value_states is not None
        cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = (
                past_key_values.cross_attention_cache
                if is_cross
                else past_key_values.self_attention_cache
            )
            # Those of cross-attention are the same in every step, so they are computed once.
            if is_cross and past_key_values.is_updated.get(self.layer_idx):
                layer = cache.layers[self.layer_idx]
                return layer.keys, layer.values

        states = key_value_states if is_cross else hidden_states
        key, value = self._split_heads(self.k(states)), self._split_heads(self.v(states))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if is_cross and isinstance(past_key_values, EncoderDecoderCache):
            past_key_values.is_updated[self.layer_idx] = True
        return key, value


class T5GQAForConditionalGeneration(T5ForConditionalGeneration):
    """T5 with a language-modelling head and grouped-query attention."""

    config: T5GQAConfig
    config_class = T5GQAConfig
    # Flex attention has not been tested with this class.
    _supports_flex_attn = False

    def __init__(self, config: T5GQAConfig):
        super().__init__(config)
        encoder, decoder = self.encoder, self.decoder
        per_layer = config.position_bias_per_layer

        heads = config.kv_heads("encoder_num_key_value_heads", len(encoder.block))
        for i, block in enumerate(encoder.block):
            block.layer[0].SelfAttention = self._attention(
                encoder, heads[i], i, has_relative_attention_bias=i == 0 or per_layer
            )

        heads = config.kv_heads("num_key_value_heads", len(decoder.block))
        cross_heads = config.kv_heads("cross_num_key_value_heads", len(decoder.block))
        for i, block in enumerate(decoder.block):
            block.layer[0].SelfAttention = self._attention(
                decoder,
                heads[i],
                i,
                has_relative_attention_bias=i == 0 or per_layer,
                is_causal=True,
            )
            block.layer[1].EncDecAttention = self._attention(decoder, cross_heads[i], i)

    def _attention(
        self, stack: T5Stack, num_kv_heads: int, layer_idx: int, **options
    ) -> T5GroupedAttention:
        """Return an attention with random weights for a layer of `stack`."""
        attention = T5GroupedAttention(stack.config, num_kv_heads, layer_idx=layer_idx, **options)
        # By T5's rule, with which the constructor above has filled all other weights.
        self._init_weights(attention)
        return attention


__all__ = ["T5GQAConfig", "T5GQAForConditionalGeneration"]
