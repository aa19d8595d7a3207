"""Turn the fields of a config.json into a `Decoder`, as each family of models needs it.

A pattern returns the kind of each layer. A reader makes a `Decoder` of a pattern and the sizes.
`model_types.py` gives every model type its reader. Decoders that attend to an encoder as well are
read in `cross_readers.py`.
"""

from collections.abc import Callable

from gqa.kv_cache.decoder import CachedLayer, Decoder
from gqa.kv_cache.fields import KV_HEADS, STATE_LAYERS, Fields
from gqa.model.config import check_kv_heads
from gqa.runtime.checks import check_whole_number
from gqa.runtime.errors import ConfigError

FULL, SLIDING, CHUNKED, STATE = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
)
Pattern = Callable[[Fields], list[str]]
Reader = Callable[[Fields], Decoder]


# Patterns.


def all_full(fields: Fields) -> list[str]:
    """Return full attention for every layer."""
    return [FULL] * fields.layers


def all_sliding(fields: Fields) -> list[str]:
    """Return the window for every layer, if there is one."""
    return [SLIDING if fields.window() else FULL] * fields.layers


def listed_or(pattern: Pattern) -> Pattern:
    """Return a pattern: `layer_types` where the file has it, else what another pattern says."""

    def kinds(fields: Fields) -> list[str]:
        return fields.layer_types() or pattern(fields)

    return kinds


def every(number: int, kind: str = SLIDING, name: str = "", first: bool = False) -> Pattern:
    """Return a pattern: full attention in one layer of `number`, `kind` in the others.

    For example, every(4) is three layers with a window, one full, three with a window, one full ...

    Args:
        name: the field that replaces `number`, if the type has one.
        first: whether the full layer is the first of each group instead of the last.
    """

    def kinds(fields: Fields) -> list[str]:
        group = fields.size_or(number, name)
        full = 0 if first else group - 1
        return [FULL if i % group == full else kind for i in range(fields.layers)]

    return listed_or(kinds)


def after_max_window_layers(fields: Fields) -> list[str]:
    """Return the window for the layers from `max_window_layers` on (Qwen2, Qwen3, dots1)."""
    if not fields.window():
        return [FULL] * fields.layers

    first = check_whole_number("max_window_layers", fields["max_window_layers"], least=0)
    return [SLIDING if i >= first else FULL for i in range(fields.layers)]


def even_below_max_window_layers(fields: Fields) -> list[str]:
    """Return the window for every other layer before `max_window_layers` (Qwen2-MoE)."""
    if not fields.window():
        return [FULL] * fields.layers

    last = check_whole_number("max_window_layers", fields["max_window_layers"], least=0)
    return [SLIDING if i % 2 == 0 and i < last else FULL for i in range(fields.layers)]


def by_rope(kind_with_rope: str, kind_without: str) -> Pattern:
    """Return a pattern: one kind of layer with rotary embeddings, one without (SmolLM3, Llama 4).

    Without a list in the file, every `no_rope_layer_interval`-th layer has no rotary embeddings.
    """

    def kinds(fields: Fields) -> list[str]:
        interval = fields.size("no_rope_layer_interval")
        # The field's name is the opposite of its content: 1 stands for a layer with RoPE.
        rope = fields.indices("no_rope_layers") or [
            int((i + 1) % interval != 0) for i in range(fields.layers)
        ]
        if len(rope) != fields.layers:
            raise ConfigError("no_rope_layers", rope, f"use one entry for each of {fields.layers}")
        return [kind_with_rope if each else kind_without for each in rope]

    return kinds


def smollm3(fields: Fields) -> list[str]:
    """Return the window, if switched on, for the layers without rotary embeddings."""
    return by_rope(FULL, SLIDING if fields.window() else FULL)(fields)


def exaone4(fields: Fields) -> list[str]:
    """Return the window, if there is one, for three layers of four."""
    if not fields.window():
        return [FULL] * fields.layers
    return every(4, name="sliding_window_pattern")(fields)


def olmo_hybrid(fields: Fields) -> list[str]:
    """Return attention for the last layer of four; for the last of all if there are fewer."""
    kinds = every(4, STATE)(fields)
    return kinds if FULL in kinds else [*kinds[:-1], FULL]


def listed(fields: Fields) -> list[str]:
    """Return the kinds that the file lists, because no default says where the attention is."""
    kinds = fields.layer_types() or fields.layer_types("layers_block_type")
    if kinds is None:
        raise ConfigError("layer_types", None, "use a list with the kind of each layer")
    return kinds


def jamba(fields: Fields) -> list[str]:
    """Return attention for one layer of each period, a state for the others."""
    period = fields.size("attn_layer_period")
    offset = check_whole_number("attn_layer_offset", fields["attn_layer_offset"], least=0)
    return [FULL if i % period == offset else STATE for i in range(fields.layers)]


def attention_at(name: str) -> Pattern:
    """Return a pattern: attention in the layers that `name` lists, or in all without the field."""

    def kinds(fields: Fields) -> list[str]:
        layers = range(fields.layers) if fields[name] is None else fields.indices(name)
        return [FULL if i in layers else STATE for i in range(fields.layers)]

    return kinds


def nemotron_h(fields: Fields) -> list[str]:
    """Read a letter for each layer: * attention, M Mamba, E experts, - MLP."""
    letters = {"*": FULL, "M": STATE, "E": "moe", "-": "mlp"}
    value = fields["hybrid_override_pattern"]
    listed = fields.layer_types("layers_block_type") or fields.layer_types()
    if listed is not None:
        return listed
    if not isinstance(value, str) or not value or set(value) - set(letters):
        raise ConfigError(
            "hybrid_override_pattern", value, f"use letters out of {''.join(letters)}"
        )

    if fields.size_or(len(value), "num_hidden_layers") != len(value):
        reason = f"but there are {fields.layers} layers"
        raise ConfigError("hybrid_override_pattern", value, "use a letter for each", reason)
    return [letters[letter] for letter in value]


# Readers.


def causal(
    pattern: Pattern = all_full,
    head_dim: str = "",
    shared: str = "",
    others: tuple[str, ...] = (),
) -> Reader:
    """Return the reader of decoder-only models with a key and a value of one size for each head.

    Args:
        head_dim: "width" for types that take the width divided by the heads whatever the file
            says of `head_dim`.
        shared: the field with the number of last layers that reuse the cache of earlier ones.
        others: the kinds of layers without a cache that the type has.
    """

    def read(fields: Fields) -> Decoder:
        kv_heads = fields.size_or(fields.heads, *KV_HEADS)
        check_kv_heads(KV_HEADS[0], kv_heads, fields.heads)
        size = fields.shared_width(fields.heads) if head_dim == "width" else fields.head_dim()
        kinds = pattern(fields)
        check_kinds(kinds, (FULL, SLIDING, CHUNKED, *others))
        layers = len(kinds)

        # The last layers read the cache of earlier ones and have none themselves (Gemma 3n).
        if shared:
            reusing = check_whole_number(shared, fields[shared], least=0, most=layers - 1)
            kinds = kinds[: layers - reusing]
        return _decoder(fields, kinds, layers, CachedLayer(kv_heads, size, size))

    return read


def check_kinds(kinds: list[str], known: tuple[str, ...]) -> None:
    """Refuse a kind of layer that the type does not have, whatever the file lists."""
    for kind in kinds:
        if kind not in known:
            raise ConfigError("layer_types", kind, f"this type has {', '.join(known)} alone")


def _decoder(fields: Fields, kinds: list[str], layers: int, layer: CachedLayer) -> Decoder:
    """Return the decoder with layers of these kinds; `layer` is the cache of a full layer."""
    windows = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}
    cached = []
    for kind in kinds:
        if kind in windows:
            cached.append(layer._replace(window=fields.window(windows[kind])))
            # A list with such a layer contradicts a file that has no window.
            if not cached[-1].window:
                raise ConfigError(
                    windows[kind], fields[windows[kind]], "use its size", f"but {kind} is listed"
                )
        elif kind == FULL:
            cached.append(layer)

    states = sum(kind in STATE_LAYERS for kind in kinds)
    note = f"{states} layers keep a state of a fixed size instead, not counted here"
    if not cached:
        raise ConfigError("num_hidden_layers", layers, "use a model with attention", "but none has")
    return Decoder(layers, fields.heads, tuple(cached), note=note if states else "")


def falcon_h1(fields: Fields) -> Decoder:
    """Read Falcon-H1, whose layers have attention and Mamba side by side."""
    note = f"{fields.layers} layers also keep a state of a fixed size, not counted here"
    return causal()(fields)._replace(note=note)


def multi_query(fields: Fields) -> Decoder:
    """Read GPT-BigCode: one KV head, or as many as query heads."""
    kv_heads = 1 if fields.flag("multi_query", otherwise=False) else fields.heads
    size = fields.shared_width(fields.heads)
    return _decoder(fields, all_full(fields), fields.layers, CachedLayer(kv_heads, size, size))


def falcon(fields: Fields) -> Decoder:
    """Read Falcon: one KV head, as many as query heads, or the newer models' own number."""
    size = fields.shared_width(fields.heads)
    new = fields.flag("new_decoder_architecture", otherwise=False)
    kv_heads = fields.size_or(fields.heads, "num_kv_heads")
    # The new architecture ignores `multi_query` and has a number of KV heads of its own.
    if not new and fields.flag("multi_query", otherwise=False):
        kv_heads = 1
    check_kv_heads("num_kv_heads", kv_heads, fields.heads)

    decoder = _decoder(fields, all_full(fields), fields.layers, CachedLayer(kv_heads, size, size))
    note = "Transformers repeats the KV heads of Falcon's newer models, so it takes what MHA takes"
    return decoder._replace(note=note if new and kv_heads < fields.heads else "")


def dbrx(fields: Fields) -> Decoder:
    """Read DBRX, whose attention has an object of its own."""
    attention = fields["attn_config"] or {}
    if not isinstance(attention, dict):
        raise ConfigError("attn_config", attention, "use an object")

    # 1 is the default of Transformers' class.
    kv_heads = check_whole_number("kv_n_heads", attention.get("kv_n_heads", 1))
    check_kv_heads("kv_n_heads", kv_heads, fields.heads)
    size = fields.shared_width(fields.heads)
    return _decoder(fields, all_full(fields), fields.layers, CachedLayer(kv_heads, size, size))


def mpt(fields: Fields) -> Decoder:
    """Read MPT: multi-head attention alone, because Transformers' class has no other."""
    attention = fields["attn_config"] or {}
    # 0 is not the name of a kind, so that anything but an object is refused.
    kind = attention.get("attn_type", "multihead_attention") if isinstance(attention, dict) else 0
    if kind != "multihead_attention" or attention.get("kv_n_heads") is not None:
        raise ConfigError("attn_config", attention, "use multihead_attention without kv_n_heads")
    return causal(head_dim="width")(fields)


def gemma4(fields: Fields) -> Decoder:
    """Read Gemma 4: full layers have other heads than sliding ones, and later layers share."""
    kinds = every(6)(fields)
    check_kinds(kinds, (FULL, SLIDING))
    # The last layer is full, whatever the pattern gives: with 8 layers, layers 6 and 8 are full.
    kinds[-1] = FULL
    reusing = check_whole_number(
        "num_kv_shared_layers", fields["num_kv_shared_layers"], least=0, most=len(kinds) - 1
    )

    cached = []
    for i, kind in enumerate(kinds[: len(kinds) - reusing]):
        kv_heads, size = _gemma4_heads(fields, i, kind == FULL)
        check_kv_heads("num_key_value_heads", kv_heads, fields.heads)
        window = 0 if kind == FULL else fields.size("sliding_window")
        cached.append(CachedLayer(kv_heads, size, size, window))
    return Decoder(len(kinds), fields.heads, tuple(cached))


def _gemma4_heads(fields: Fields, i: int, full: bool) -> tuple[int, int]:
    """Return KV heads and head size of layer `i`.

    Transformers writes the sizes of single layers as `per_layer_config`. Other files have fields
    for all full layers.
    """
    kv_heads, size = fields.size("num_key_value_heads"), fields.size("head_dim")
    overrides = fields["per_layer_config"]
    if overrides is None:
        if full and fields.flag("attention_k_eq_v", otherwise=False):
            kv_heads = fields.size_or(kv_heads, "num_global_key_value_heads")
        return kv_heads, fields.size("global_head_dim") if full else size

    # Any other field in the object of a layer could change the cache, too.
    layer = overrides.get(str(i), {}) if isinstance(overrides, dict) else None
    if not isinstance(layer, dict) or layer.keys() - {"head_dim", "num_key_value_heads"}:
        raise ConfigError(
            "per_layer_config", layer, "use head_dim and num_key_value_heads by layer alone"
        )
    return (
        check_whole_number("num_key_value_heads", layer.get("num_key_value_heads", kv_heads)),
        check_whole_number("head_dim", layer.get("head_dim", size)),
    )


def latent(attentions_each: int = 1) -> Reader:
    """Return the reader of multi-head latent attention (MLA).

    A layer keeps one latent for all heads, and one key with rotary embedding.

    Args:
        attentions_each: attentions in each layer.
    """

    def read(fields: Fields) -> Decoder:
        rope, expanded = fields.size("qk_rope_head_dim"), _expanded(fields)
        # As one KV head whose "key" is the latent and whose "value" is the rotated key: the bytes
        # depend on the sum of the two alone.
        layer = CachedLayer(1, fields.size("kv_lora_rank"), rope)
        decoder = _decoder(fields, [FULL] * (fields.layers * attentions_each), fields.layers, layer)
        return decoder._replace(expanded=expanded)

    return read


def _expanded(fields: Fields) -> CachedLayer:
    """Return the keys and values of all heads that a latent stands for."""
    key_dim = fields.size("qk_nope_head_dim") + fields.size("qk_rope_head_dim")
    value_dim = fields.size_or(0, "v_head_dim") or fields.shared_width(fields.heads)
    return CachedLayer(fields.heads, key_dim, value_dim)


def jetmoe(fields: Fields) -> Decoder:
    """Read JetMoE: each expert of a token's attention has `num_key_value_heads` query heads."""
    kv_heads, size = fields.size("num_key_value_heads"), fields.size("kv_channels")
    heads = kv_heads * fields.size("num_experts_per_tok")
    layer = CachedLayer(kv_heads, size, size)
    return Decoder(fields.layers, heads, (layer,) * fields.layers)
