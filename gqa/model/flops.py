"""Model FLOPs of the network, counted by formula, in the letters of `gqa/model/attention.py`.

A product of [M, N] by [N, K] is 2 M N K FLOPs. Only matrix products count: no embedding look-ups,
norms, softmax, masks or optimizer, and nothing that rematerialisation computes a second time.
Padding counts. The two products of attention count in full, although a causal mask hides half of
them. This is the convention of PaLM's model FLOPs utilization (Chowdhery et al., 2022, appendix B).
"""

from gqa.model.config import Config


def train_flops(config: Config, batch_size: int, inputs_length: int, targets_length: int) -> float:
    """Return the FLOPs of one training step.

    The backward pass has two products for each product of the forward pass.
    """
    return 3 * forward_flops(config, batch_size, inputs_length, targets_length)


def forward_flops(
    config: Config, batch_size: int, inputs_length: int, targets_length: int
) -> float:
    """Return the FLOPs of teacher-forced logits [B, T, V], for inputs [B, S] and targets [B, T]."""
    c, S, T = config, inputs_length, targets_length

    # The lengths of queries and keys of each attention.
    lengths = {"encoder": (S, S), "self_attention": (T, T), "cross_attention": (T, S)}
    attention = sum(_attention(c, K, *lengths[name]) for name in lengths for K in c.kv_heads(name))
    mlps = c.num_encoder_layers * _mlp(c, S) + c.num_decoder_layers * _mlp(c, T)
    logits = 2 * T * c.d_model * c.vocab_size
    return float(batch_size * (attention + mlps + logits))


def _attention(config: Config, K: int, T: int, S: int) -> int:
    """Return the FLOPs of one layer's attention from T queries to S keys, with projections."""
    # Only keys and values get cheaper with fewer KV heads; the logits and the weighted sum are
    # computed for every query head.
    D, N, H = config.d_model, config.num_heads, config.head_dim
    query_and_out = 2 * (2 * T * D * N * H)
    key_and_value = 2 * (2 * S * D * K * H)
    logits_and_sum = 2 * (2 * N * T * S * H)
    return query_and_out + key_and_value + logits_and_sum


def _mlp(config: Config, T: int) -> int:
    """Return the FLOPs of one layer's MLP on T positions."""
    kernels = 3 if config.is_gated else 2
    return kernels * 2 * T * config.d_model * config.d_ff
