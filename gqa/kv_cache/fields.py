"""The fields of a config.json of a known model type, with the defaults that the type's class has.

`model_types.py` says which fields a type has. `config_json.py` refuses every other field that may
change the cache.
"""

from typing import Any

from gqa.runtime.checks import check_whole_number
from gqa.runtime.errors import ConfigError, UserError

# The names of each size. The first is the one that Transformers takes for every type; types with
# older configs have one of the others.
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads")
WIDTH = ("hidden_size", "d_model", "n_embd", "n_embed")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
HEAD_DIM = ("head_dim", "d_kv", "kv_channels")

# More than any network has, and few enough for a table.
MAX_LAYERS, MAX_HEADS = 10_000, 10_000

# Layers without keys and values: they keep a state of a fixed size, or nothing.
STATE_LAYERS = ("linear_attention", "conv", "mamba", "recurrent")
EMPTY_LAYERS = ("moe", "mlp")
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


class Fields:
    """The values of a config.json by name, completed by the defaults of its type.

    Args:
        config: the object in the file.
        defaults: the fields that the type's class has and that decide about the cache, with the
            values that a file without them stands for.

    Raises:
        UserError: if the file gives a size twice, by two names and with two values.
    """

    def __init__(self, config: dict[str, Any], defaults: dict[str, Any]):
        self.aliases: set[str] = set()

        # Fields that the type does not have are left out; `config_json.py` decides about these.
        self._values = defaults | {key: config[key] for key in defaults if key in config}

        # A file may call a size by another model's name for it: GPT-2's class has n_layer and also
        # takes num_hidden_layers.
        for names in (LAYERS, HEADS, WIDTH):
            name = next((name for name in names if name in defaults), None)
            if name is not None:
                self._take_aliases(config, name, names)

    def _take_aliases(self, config: dict[str, Any], name: str, names: tuple[str, ...]) -> None:
        """Take the field `name` from another of its `names`, where the file has that.

        A null says nothing of a size, so it contradicts no other name.
        """
        for alias in names:
            if alias == name or config.get(alias) is None:
                continue
            if config.get(name) not in (None, config[alias]):
                raise UserError(
                    f"{name}={config[name]!r} and {alias}={config[alias]!r} are names of one size; "
                    "remove the wrong one"
                )
            self._values[name] = config[alias]
            self.aliases.add(alias)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        return self._values.get(name)

    def size(self, *names: str) -> int:
        """Return the size that the type calls by one of `names`: a whole number, 1 or more."""
        name = next(name for name in names if name in self._values)
        return check_whole_number(name, self._values[name])

    def size_or(self, default: int, *names: str) -> int:
        """Return the size of one of `names`, or `default` where the type or the file has none."""
        for name in names:
            if self._values.get(name) is not None:
                return check_whole_number(name, self._values[name])
        return default

    @property
    def layers(self) -> int:
        """The number of layers; more than any network has would only cost memory."""
        name = next(name for name in LAYERS if name in self._values)
        return check_whole_number(name, self._values[name], most=MAX_LAYERS)

    @property
    def heads(self) -> int:
        """The number of query heads."""
        name = next(name for name in HEADS if name in self._values)
        return check_whole_number(name, self._values[name], most=MAX_HEADS)

    def head_dim(self) -> int:
        """Return the numbers of a head: the file's, or the width shared by all heads."""
        return self.size_or(0, *HEAD_DIM) or self.shared_width(self.heads)

    def shared_width(self, heads: int) -> int:
        """Return the width of the network divided by the number of heads."""
        width = self.size(*WIDTH)
        if width % heads:
            name = next(name for name in WIDTH if name in self._values)
            raise ConfigError(name, width, "give head_dim", f"is no multiple of {heads} heads")
        return width // heads

    def flag(self, name: str, otherwise: bool) -> bool:
        """Return a field that is true or false, or `otherwise` for a type without it."""
        if name not in self._values:
            return otherwise
        value = self._values[name]
        if value is not None and not isinstance(value, bool):
            raise ConfigError(name, value, "use true or false")
        return bool(value)

    def window(self, name: str = "sliding_window") -> int:
        """Return the window of the layers that have one; 0 if there is none, or it is off."""
        value = self._values.get(name)
        if value is None or not self.flag("use_sliding_window", otherwise=True):
            return 0
        return check_whole_number(name, value, least=0)

    def indices(self, name: str) -> list[int]:
        """Return a list of whole numbers, 0 or more; none where the file says null."""
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise ConfigError(name, value, "use a list of whole numbers")
        return [check_whole_number(name, each, least=0) for each in value]

    def layer_types(self, name: str = "layer_types") -> list[str] | None:
        """Return the kind of each layer as the file lists it, or None where it has no list."""
        value = self._values.get(name)
        if value is None:
            return None

        # "attention" is what some hybrid models call full attention (Granite, Nemotron-H).
        known = (*ATTENTION_LAYERS, *STATE_LAYERS, *EMPTY_LAYERS, "attention")
        if not isinstance(value, list) or not value:
            raise ConfigError(name, value, "use a list with the kind of each layer")
        for kind in value:
            if kind not in known:
                raise ConfigError(name, kind, f"use kinds out of {', '.join(known)}")

        if self["num_hidden_layers"] is not None and len(value) != self.layers:
            raise UserError(f"{name} has {len(value)} entries for {self.layers} layers")
        return ["full_attention" if kind == "attention" else kind for kind in value]
