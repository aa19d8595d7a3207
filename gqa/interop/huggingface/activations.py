"""The activation of a T5's MLP as config.json names it, and as our config does.

Transformers reads it from `feed_forward_proj`, such as "gated-gelu". It also writes what it has
read as `dense_act_fn` and `is_gated_act`, and where a file has these, they win. So a file in which
they say something else than `feed_forward_proj` is refused: nobody can know which of both the
checkpoint was trained with.
"""

from gqa.model import activations
from gqa.model.activations import GATED
from gqa.runtime.errors import CheckpointError

# Transformers' functions by name, and ours. Several of its names are one function, computed in
# different ways. The last of these names is the one that we write.
FUNCTIONS = {
    "gelu_accurate": "gelu",
    "gelu_fast": "gelu",
    "gelu_python_tanh": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "gelu_10": "gelu_clipped",
    "hardswish": "hard_swish",
    "laplace": "laplace",
    "leaky_relu": "leaky_relu",
    "linear": "linear",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "swish": "silu",
    "silu": "silu",
    "sqrtsoftplus": "sqrt_softplus",
    "tanh": "tanh",
}
# The one name that does not mean its function: T5 1.1 has the tanh approximation.
GATED_GELU = "gated-gelu"


def activation(hf_config: dict, default: str) -> str:
    """Return our name of the activation that a config.json asks for.

    Args:
        default: `feed_forward_proj` where the file has none.

    Raises:
        CheckpointError: for an activation with parameters of its own or an unknown one, and where
            `dense_act_fn` or `is_gated_act` contradict `feed_forward_proj`.
    """
    explicit, gate = hf_config.get("dense_act_fn"), hf_config.get("is_gated_act")
    if explicit is not None and "feed_forward_proj" not in hf_config:
        return GATED * (gate is True) + _function("dense_act_fn", explicit)

    named = hf_config.get("feed_forward_proj", default)
    found = activations.GATED_GELU if named == GATED_GELU else _parsed(named)
    if explicit is not None and _function("dense_act_fn", explicit) != found.removeprefix(GATED):
        means = ", which means 'gelu_new'" if named == GATED_GELU else ""
        raise _contradiction("dense_act_fn", explicit, f"{named!r}{means}")
    if gate is not None and gate is not activations.is_gated(found):
        raise _contradiction("is_gated_act", gate, repr(named))
    return found


def feed_forward_proj(activation: str) -> str:
    """Return Transformers' name of one of our activations; `activation` is the inverse."""
    if activation == activations.GATED_GELU:
        return GATED_GELU
    theirs = {ours: theirs for theirs, ours in FUNCTIONS.items()}
    name = theirs[activation.removeprefix(GATED)]
    return f"gated-{name}" if activations.is_gated(activation) else name


def _parsed(named: object) -> str:
    """Return our name for "NAME" or "gated-NAME"."""
    if not isinstance(named, str):
        raise _unknown("feed_forward_proj", named)
    function = named.removeprefix("gated-")
    if function not in FUNCTIONS:
        raise _unknown("feed_forward_proj", named)
    return GATED * (function != named) + FUNCTIONS[function]


def _function(key: str, name: object) -> str:
    if not isinstance(name, str) or name not in FUNCTIONS:
        raise _unknown(key, name)
    return FUNCTIONS[name]


def _unknown(key: str, value: object) -> CheckpointError:
    # The names that T5s are published with; the others are in docs/checkpoints.md.
    usual = "relu, gated-gelu, gated-silu"
    return CheckpointError(
        f"{key}={value!r} is not supported; use {usual} or another function without parameters"
    )


def _contradiction(key: str, value: object, named: str) -> CheckpointError:
    return CheckpointError(
        f"{key}={value!r} contradicts feed_forward_proj={named}; "
        "keep the one that the checkpoint was trained with and remove the other"
    )
