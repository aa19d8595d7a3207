"""Convert parameters to fewer KV heads: a pure function on their tree (paper, section 2.1).

K and V kernels are [L, D, N, H]. The N heads are cut into K neighbouring groups and each group
becomes one head; everything else is kept. A method is a function of this file from a kernel seen
as [L, D, K, G, H] to [L, D, K, H]; a new one needs only its name in METHODS.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax import Array
from jax.nn.initializers import variance_scaling

from gqa.errors import UserError
from gqa.model import Config, check_kv_heads


def mean(groups: Array, key: Array) -> Array:
    """Mean of the heads of each group: the paper's choice."""
    del key
    return groups.mean(3)


def first(groups: Array, key: Array) -> Array:
    """The first head of each group (paper, section 3.3 "First")."""
    del key
    return groups[:, :, :, 0]


def random(groups: Array, key: Array) -> Array:
    """Fresh heads from the initialiser (paper, section 3.3 "Random")."""
    L, D, K, _, H = groups.shape
    init = variance_scaling(1.0, "fan_in", "normal", 0, (1, 2))
    return jax.vmap(lambda key: init(key, (D, K, H), groups.dtype))(jax.random.split(key, L))


# The attentions of the network and where their kernels are in the tree.
ATTENTIONS = {
    "encoder": ("encoder", "attention"),
    "decoder": ("decoder", "self_attention"),
    "cross": ("decoder", "cross_attention"),
}

METHODS: dict[str, Callable[[Array, Array], Array]] = {
    "mean": mean,
    "first": first,
    "random": random,
}


def convert(
    params: dict,
    config: Config,
    num_kv_heads: int | dict[str, int],
    method: str = "mean",
    seed: int = 0,
) -> tuple[dict, Config]:
    """Parameters and config with `num_kv_heads` KV heads; keeps the input's arrays where it can.

    Args:
        num_kv_heads: for decoder self- and cross-attention (the paper leaves the encoder alone), or
            a number for each of "encoder", "decoder" and "cross" that is to change.
        method: one of METHODS.
        seed: of the methods that draw.

    Raises:
        UserError: for an unknown method or attention, or a number that does not divide the heads
            that are there.
    """
    if isinstance(num_kv_heads, int):
        num_kv_heads = {"decoder": num_kv_heads, "cross": num_kv_heads}
    check(config, num_kv_heads, method)
    key = jax.random.key(seed)
    for i, (name, (stack, attention)) in enumerate(ATTENTIONS.items()):
        if name in num_kv_heads:
            kernels = params[stack]["layers"][attention]
            new = _pool(kernels, num_kv_heads[name], method, jax.random.fold_in(key, i))
            params = _replace(params, (stack, "layers", attention), new)
    heads = {f"num_kv_heads_{name}": K for name, K in num_kv_heads.items()}
    return params, dataclasses.replace(config, **heads)


def check(config: Config, num_kv_heads: dict[str, int], method: str) -> None:
    """Raise the UserError that `convert` would, without touching parameters."""
    if method not in METHODS:
        raise UserError(f"convert.method={method!r}; use one of {', '.join(METHODS)}")
    for name, K in num_kv_heads.items():
        field = f"num_kv_heads_{name}"
        if name not in ATTENTIONS:
            raise UserError(f"no attention {name!r} to convert; use {', '.join(ATTENTIONS)}")
        check_kv_heads(field, K, getattr(config, field))


def _pool(kernels: dict, num_kv_heads: int, method: str, key: Array) -> dict:
    new = dict(kernels)
    for i, name in enumerate(("key", "value")):
        L, D, N, H = kernels[name].shape
        if num_kv_heads < N:  # an equal number is the identity for every method, also for `random`
            groups = kernels[name].reshape(L, D, num_kv_heads, N // num_kv_heads, H)
            new[name] = METHODS[method](groups, jax.random.fold_in(key, i))
    return new


def _replace(tree: dict, path: tuple[str, ...], value: dict) -> dict:
    if not path:
        return value
    return tree | {path[0]: _replace(tree[path[0]], path[1:], value)}
