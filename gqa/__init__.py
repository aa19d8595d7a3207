"""Grouped-query attention for encoder-decoder Transformers: train, convert, uptrain, compare.

The names in `__all__` are the public interface. Each is imported when it is first used, so that
`import gqa` itself costs nothing: neither JAX nor Flax is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gqa.conversion import convert
    from gqa.inference.generator import generate
    from gqa.interop.huggingface import load, save
    from gqa.kv_cache import kv_cache_bytes
    from gqa.model.attention import grouped_query_attention
    from gqa.model.config import Config
    from gqa.model.transformer import Transformer

__all__ = [
    "Config",
    "Transformer",
    "convert",
    "generate",
    "grouped_query_attention",
    "kv_cache_bytes",
    "load",
    "save",
]

# The module that defines each public name.
_MODULES = {
    "Config": "gqa.model.config",
    "Transformer": "gqa.model.transformer",
    "convert": "gqa.conversion",
    "generate": "gqa.inference.generator",
    "grouped_query_attention": "gqa.model.attention",
    "kv_cache_bytes": "gqa.kv_cache",
    "load": "gqa.interop.huggingface",
    "save": "gqa.interop.huggingface",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, and keep it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'gqa' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
