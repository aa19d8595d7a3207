"""Grouped-query attention for encoder-decoder Transformers: train, convert, uptrain, compare."""

from gqa.kv_cache import kv_cache_bytes

__all__ = ["kv_cache_bytes"]
