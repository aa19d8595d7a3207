"""Variants of networks: the decoder has fewer KV heads, the encoder keeps its own."""

from experiments.stages.variant import Variant


def grouped(num_heads=16, num_kv_heads=8, size="nano", alpha=0.0, **settings):
    """Return the variant with `num_kv_heads` in both attentions of the decoder."""
    return Variant(
        size=size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_kv_heads_cross_attention=num_kv_heads,
        num_kv_heads_encoder=num_heads,
        alpha=alpha,
        **settings,
    )
