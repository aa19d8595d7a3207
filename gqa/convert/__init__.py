"""Convert parameters to fewer KV heads: pure functions on their tree (paper, section 2.1).

The N heads of an attention are cut into K neighbouring groups and each group becomes one head. The
result is always a plain grouped checkpoint. The choices are independent of each other:

    method     how a group's head is made    pool.py: of keys and values alone
                                             absorb.py: queries and outputs change with them
                                             learned.py: while uptraining
    grouping   which heads share a group     grouping.py
    renorm     whether a group's head gets the mean norm of its members
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Generator, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gqa import calibrate
from gqa.calibrate import ATTENTIONS, Moment
from gqa.convert import absorb, learned, pool
from gqa.convert.absorb import SPACES
from gqa.convert.grouping import GROUPINGS, MEASURED, regroup
from gqa.convert.tree import in_groups, kernels_of, with_kernels
from gqa.errors import UserError
from gqa.model import Config, check_kv_heads

ABSORBING = absorb.METHODS
CLOSED = (*pool.METHODS, *ABSORBING)  # those that need no training
METHODS = (*CLOSED, *learned.METHODS)

SHRINKAGE = 0.01  # of moments, where nothing else is asked for

# Moments with a larger condition number have directions of which the batches say nothing.
ILL_CONDITIONED = 1e9


def convert(
    params: dict,
    config: Config,
    num_kv_heads: int | dict[str, int],
    method: str = "mean",
    seed: int = 0,
    *,
    moments: Iterable[Moment] | None = None,
    batches: Sequence[dict] | None = None,
    space: str = "logit",
    grouping: str = "contiguous",
    renorm: bool = False,
    shrinkage: float = SHRINKAGE,
) -> tuple[dict, Config]:
    """Parameters and config with `num_kv_heads` KV heads; keeps the input's arrays where it can.

    Args:
        num_kv_heads: for decoder self- and cross-attention (the paper leaves the encoder alone), or
            a number for each of "encoder", "decoder" and "cross" that is to change. The layers of
            a stack share their number, as they share arrays.
        method: one of METHODS. "weighted" and "fuse" give what their training starts from.
        seed: of what draws: method and grouping.
        moments: what `gqa.calibrate.moments(params, config, ...)` yields, for `needs_moments`.
        batches: calibration batches to take the moments from instead, layer by layer, each of the
            network as converted so far, so that later layers make up for earlier ones.
        space: what svd keeps best: the kernels ("weight"), keys and values ("activation"), or
            logits and outputs ("logit"); procrustes aligns kernels, or else keys and values.
        grouping: one of GROUPINGS.
        renorm: scale each new key and value block to the mean Frobenius norm of its members.
        shrinkage: of moments towards a multiple of the identity, in [0, 1].

    Raises:
        UserError: for an unknown name, moments that are missing, or a number that does not divide
            the heads that are there.
    """
    if isinstance(num_kv_heads, int):
        num_kv_heads = {"decoder": num_kv_heads, "cross": num_kv_heads}
    calibrated = moments is not None or batches is not None
    check(config, num_kv_heads, method, space, grouping, renorm, calibrated)
    fewer = _fewer(config, num_kv_heads)
    new_config = dataclasses.replace(config, **{_field(n): K for n, K in num_kv_heads.items()})
    if not fewer:
        return params, new_config
    if grouping in MEASURED:
        if moments is None:
            moments = calibrate.moments(params, config, batches, tuple(fewer))
        moments = list(moments)
    params = regroup(params, fewer, grouping, seed, moments)
    if method in learned.METHODS:
        new = learned.fold(learned.expand(params, fewer, method))
    elif method in absorb.METHODS:
        walk = _walk(params, config, fewer, space, moments, batches)
        new = _absorbed(params, fewer, walk, method, space, shrinkage)
    else:
        new = _pooled(params, fewer, method, seed)
    return (_renormed(new, params, fewer) if renorm else new), new_config


def check(
    config: Config,
    num_kv_heads: dict[str, int],
    method: str,
    space: str = "logit",
    grouping: str = "contiguous",
    renorm: bool = False,
    calibrated: bool = True,
) -> None:
    """Raise the UserError that `convert` would, without touching parameters.

    `calibrated` says that moments or batches will be there.
    """
    choices = {"method": (method, METHODS), "space": (space, SPACES)}
    for key, (value, known) in (choices | {"grouping": (grouping, GROUPINGS)}).items():
        if value not in known:
            raise UserError(f"convert.{key}={value!r}; use one of {', '.join(known)}")
    for name, K in num_kv_heads.items():
        if name not in ATTENTIONS:
            raise UserError(f"no attention {name!r} to convert; use {', '.join(ATTENTIONS)}")
        check_kv_heads(_field(name), K, getattr(config, _field(name)))
    if renorm and method in learned.METHODS:
        raise UserError(f"convert.renorm does not go with convert.method={method!r}, which learns")
    if needs_moments(method, space, grouping) and _fewer(config, num_kv_heads) and not calibrated:
        what = f"method={method!r}" if grouping not in MEASURED else f"grouping={grouping!r}"
        raise UserError(
            f"convert.{what} weighs heads by activations: set convert.calibration_tokens above 0"
        )


def needs_moments(method: str, space: str = "logit", grouping: str = "contiguous") -> bool:
    """Whether a conversion takes calibration batches."""
    return (method in absorb.METHODS and space != "weight") or grouping in MEASURED


def query_scale(old: dict, new: dict) -> dict[str, np.ndarray]:
    """Root mean square of each layer's query kernel by what it was, [L] per attention.

    Adafactor's steps are relative to it: queries that were scaled up learn faster than before. A
    kernel of zeros has the scale 1.
    """

    def rms(params: dict, name: str) -> np.ndarray:
        query = np.asarray(kernels_of(params, name)["query"], np.float64)
        return np.sqrt(np.square(query).mean((1, 2, 3)))

    before, after = ({name: rms(params, name) for name in ATTENTIONS} for params in (old, new))
    return {
        name: np.divide(after[name], x, out=np.ones_like(x), where=x > 0)
        for name, x in before.items()
    }


def _field(name: str) -> str:
    return f"num_kv_heads_{name}"


def _fewer(config: Config, num_kv_heads: dict[str, int]) -> dict[str, int]:
    """Those that change: an equal number is the identity for every method."""
    return {name: K for name, K in num_kv_heads.items() if getattr(config, _field(name)) > K}


def _pooled(params: dict, fewer: dict[str, int], method: str, seed: int) -> dict:
    key = jax.random.key(seed)
    for i, name in enumerate(ATTENTIONS):
        if name in fewer:
            kernels = kernels_of(params, name)
            groups = [in_groups(kernels[side], fewer[name]) for side in ("key", "value")]
            keys, values = getattr(pool, method)(*groups, jax.random.fold_in(key, i))
            params = with_kernels(params, name, kernels | {"key": keys, "value": values})
    return params


def _renormed(new: dict, old: dict, fewer: dict[str, int]) -> dict:
    for name, K in fewer.items():
        kernels = kernels_of(new, name)
        groups = {side: in_groups(kernels_of(old, name)[side], K) for side in ("key", "value")}
        scaled = {side: pool.renormed(kernels[side], groups[side]) for side in groups}
        new = with_kernels(new, name, kernels | scaled)
    return new


def _walk(
    params: dict,
    config: Config,
    fewer: dict[str, int],
    space: str,
    moments: Iterable[Moment] | None,
    batches: Sequence[dict] | None,
) -> Generator[Moment, dict | None, None]:
    """The moments in the order that layers are to be converted in; without any, `keys` is None."""
    if space == "weight":
        layers = {name: len(kernels_of(params, name)["key"]) for name in fewer}
        return (Moment(n, i, None, None, 0, 0) for n, L in layers.items() for i in range(L))
    if batches is not None:
        return calibrate.moments(params, config, batches, tuple(fewer))
    return (moment for moment in moments)


def _absorbed(
    params: dict, fewer: dict[str, int], walk: Generator, method: str, space: str, shrinkage: float
) -> dict:
    """Convert layer by layer; what becomes of each is sent back to the walk, which may use it."""
    found = {name: {} for name in fewer}
    conditions = {}
    new = None
    with contextlib.suppress(StopIteration):
        while True:
            moment = walk.send(new)
            name, layer = moment.attention, moment.layer
            if name not in fewer:
                new = None
                continue
            kernels = {side: kernel[layer] for side, kernel in kernels_of(params, name).items()}
            new, conditions[name, layer] = absorb.layer(
                kernels, fewer[name], method, space, moment, shrinkage
            )
            found[name][layer] = new
    _warn(conditions)
    for name, layers in found.items():
        kernels = kernels_of(params, name)
        if len(layers) != len(kernels["key"]):
            raise ValueError(f"moments of {len(layers)} layers of {len(kernels['key'])} for {name}")
        stacked = {
            side: jnp.asarray(np.stack([layers[i][side] for i in range(len(layers))]), kernel.dtype)
            for side, kernel in kernels.items()
        }
        params = with_kernels(params, name, stacked)
    return params


def _warn(conditions: dict[tuple[str, int], float]) -> None:
    """Say once how bad the worst moments were; the weights are finite all the same."""
    (name, layer), worst = max(conditions.items(), key=lambda item: item[1])
    if worst > ILL_CONDITIONED:
        warnings.warn(
            f"moments of layer {layer} of attention {name!r} have condition number {worst:.2g}: "
            "directions or heads without any signal; raise convert.calibration_tokens",
            stacklevel=3,
        )
