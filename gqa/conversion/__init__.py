"""Convert parameters to fewer KV heads: pure functions on their tree (paper, section 2.1).

The N heads of an attention are cut into K neighbouring groups and each group becomes one head. The
result is always a plain grouped checkpoint. The choices are independent of each other:

    method     how a group's head is made    pool.py: of keys and values alone
                                             absorb.py: queries and outputs change with them
                                             learned.py: while uptraining
    grouping   which heads share a group     grouping.py
    renorm     whether a group's head gets the mean norm of its members

The number K is the same in all layers of an attention, or one for each (budget.py).
"""

import dataclasses
from collections.abc import Generator, Iterable, Sequence

import numpy as np

from gqa.conversion import assemble, calibration, closed_form, layer_budget, learned, pooling
from gqa.conversion.attention_kernels import kernels_of
from gqa.conversion.calibration import ATTENTIONS, InputCovariance
from gqa.conversion.closed_form import SPACES
from gqa.conversion.grouping import GROUPINGS, MEASURED, orders, permuted
from gqa.model.config import Config, check_kv_heads
from gqa.model.transformer import each_layer
from gqa.runtime.errors import UserError
from gqa.runtime.sharding import divisors

ABSORBING = closed_form.METHODS
CLOSED = (*pooling.METHODS, *ABSORBING)  # those that need no training
METHODS = (*CLOSED, *learned.METHODS)

SHRINKAGE = 0.01  # of input_covariances, where nothing else is asked for


def convert(
    params: dict,
    config: Config,
    num_kv_heads: int | dict[str, int | tuple[int, ...]],
    method: str = "mean",
    seed: int = 0,
    *,
    input_covariances: Iterable[InputCovariance] | None = None,
    batches: Sequence[dict] | None = None,
    space: str = "logit",
    grouping: str = "contiguous",
    renorm: bool = False,
    shrinkage: float = SHRINKAGE,
) -> tuple[dict, Config]:
    """Parameters and config with `num_kv_heads` KV heads; keeps the input's arrays where it can.

    Args:
        num_kv_heads: for decoder self- and cross-attention (the paper leaves the encoder alone), or
            a number for each of "encoder", "self_attention" and "cross_attention" that is to
            change; for the latter
            two also a number for each layer, such as `per_layer_kv_heads` gives.
        method: one of METHODS. "weighted" and "fuse" give what their training starts from.
        seed: of what draws: method and grouping.
        input_covariances: what `gqa.conversion.calibration.input_covariances(params, config, ...)`
            yields, for `needs_input_covariances`.
        batches: calibration batches to take the covariances from instead, layer by layer, each of
            the
            network as converted so far, so that later layers make up for earlier ones.
        space: what svd keeps best: the kernels ("weight"), keys and values ("activation"), or
            logits and outputs ("logit"); procrustes aligns kernels, or else keys and values.
        grouping: one of GROUPINGS.
        renorm: scale each new key and value block to the mean Frobenius norm of its members.
        shrinkage: of input_covariances towards a multiple of the identity, in [0, 1].

    Raises:
        UserError: for an unknown name, covariances that are missing, or a number that does not
            divide
            the heads that are there.
    """
    heads = _by_name(num_kv_heads)
    calibrated = input_covariances is not None or batches is not None
    check(config, heads, method, space, grouping, renorm, calibrated)
    new_config = dataclasses.replace(config, **{_field(name): K for name, K in heads.items()})
    fewer = _fewer(config, heads)
    if not fewer:
        return params, new_config
    if grouping in MEASURED:
        if input_covariances is None:
            input_covariances = calibration.input_covariances(params, config, batches, tuple(fewer))
        input_covariances = list(input_covariances)
    params = permuted(params, orders(params, fewer, grouping, seed, input_covariances))
    if method in learned.METHODS:
        return learned.fold(learned.expand(params, fewer, method)), new_config
    if method in closed_form.METHODS:
        walk = _walk(params, config, fewer, space, input_covariances, batches)
        made = assemble.absorbed(params, new_config, fewer, walk, method, space, shrinkage)
    else:
        made = assemble.pooled(params, new_config, fewer, method, seed)
    if renorm:
        made = assemble.renormed(made, params)
    return assemble.assembled(params, new_config, made), new_config


def check(
    config: Config,
    num_kv_heads: dict[str, int | tuple[int, ...]],
    method: str,
    space: str = "logit",
    grouping: str = "contiguous",
    renorm: bool = False,
    calibrated: bool = True,
) -> None:
    """Raise the UserError that `convert` would, without touching parameters.

    `calibrated` says that input_covariances or batches will be there.
    """
    choices = {"method": (method, METHODS), "space": (space, SPACES)}
    for key, (value, known) in (choices | {"grouping": (grouping, GROUPINGS)}).items():
        if value not in known:
            raise UserError(f"convert.{key}={value!r}; use one of {', '.join(known)}")
    if len(config.layer_groups) > 1:
        raise UserError("KV heads differ by layer already; convert the network they were made of")
    for name, value in num_kv_heads.items():
        if name not in ATTENTIONS:
            raise UserError(f"no attention {name!r} to convert; use {', '.join(ATTENTIONS)}")
        for K in value if isinstance(value, tuple) else (value,):
            check_kv_heads(_field(name), K, getattr(config, _field(name)))
    if renorm and method in learned.METHODS:
        raise UserError(f"convert.renorm does not go with convert.method={method!r}, which learns")
    if any(isinstance(value, tuple) for value in num_kv_heads.values()):
        check_by_layer(method, grouping)
    if (
        needs_input_covariances(method, space, grouping)
        and _fewer(config, num_kv_heads)
        and not calibrated
    ):
        what = f"method={method!r}" if grouping not in MEASURED else f"grouping={grouping!r}"
        raise UserError(
            f"convert.{what} weighs heads by activations: set convert.calibration_tokens above 0"
        )


def check_by_layer(method: str, grouping: str) -> None:
    """Raise a UserError for what takes one number of KV heads for all layers."""
    if method in learned.METHODS:
        raise UserError(f"KV heads by layer do not go with convert.method={method!r}, which learns")
    if grouping != "contiguous":
        raise UserError(
            f"KV heads by layer do not go with convert.grouping={grouping!r}: the self-attentions "
            "share a bias, and so the order of their heads; use contiguous"
        )


def needs_input_covariances(
    method: str, space: str = "logit", grouping: str = "contiguous"
) -> bool:
    """Whether a conversion takes calibration batches."""
    return (method in closed_form.METHODS and space != "weight") or grouping in MEASURED


def per_layer_kv_heads(
    params: dict,
    config: Config,
    num_kv_heads: int | dict[str, int],
    lengths: dict[str, int],
    *,
    input_covariances: Iterable[InputCovariance] | None = None,
    space: str = "logit",
    shrinkage: float = SHRINKAGE,
) -> dict[str, tuple[int, ...]]:
    """KV heads by layer for `convert`, in a cache as large as with `num_kv_heads` everywhere.

    Args:
        num_kv_heads: as in `convert`, one number an attention.
        lengths: positions that the cache holds, of "self_attention" (targets) and
            "cross_attention" (inputs).
        input_covariances, space, shrinkage: as in `convert`; what a layer loses is what svd would.
    """
    heads = _by_name(num_kv_heads)
    check(config, heads, "svd", space, calibrated=input_covariances is not None)
    fewer = _fewer(config, heads)
    lost = {}
    for covariance in _walk(params, config, fewer, space, input_covariances, None):
        name, layer = covariance.attention, covariance.layer
        if name in fewer:
            kernels = {side: kernel[layer] for side, kernel in kernels_of(params, name).items()}
            lost[name, layer] = {
                K: closed_form.discarded(kernels, K, space, covariance, shrinkage)
                for K in divisors(kernels["key"].shape[1])
            }
    return layer_budget.allocate(lost, fewer, lengths)


def query_scale(old: dict, new: dict) -> dict[str, np.ndarray]:
    """Root mean square of each layer's query kernel by what it was, [L] per attention.

    Adafactor's steps are relative to it: queries that were scaled up learn faster than before. A
    kernel of zeros has the scale 1.
    """

    def rms(params: dict, name: str) -> np.ndarray:
        stack, attention = ATTENTIONS[name]
        queries = (layer[attention]["query"] for layer in each_layer(params[stack]))
        return np.sqrt([np.square(np.asarray(x, np.float64)).mean() for x in queries])

    before, after = ({name: rms(params, name) for name in ATTENTIONS} for params in (old, new))
    return {
        name: np.divide(after[name], x, out=np.ones_like(x), where=x > 0)
        for name, x in before.items()
    }


def _field(name: str) -> str:
    return f"num_kv_heads_{name}"


def _by_name(num_kv_heads: int | dict) -> dict[str, int | tuple[int, ...]]:
    """For each attention that is to change; a number alone is both of the decoder's."""
    if isinstance(num_kv_heads, int):
        return {"self_attention": num_kv_heads, "cross_attention": num_kv_heads}
    return num_kv_heads


def _fewer(config: Config, num_kv_heads: dict) -> dict[str, int | tuple[int, ...]]:
    """The attentions that change; an equal number in every layer is the identity."""

    def changes(name: str, value: int | tuple[int, ...]) -> bool:
        numbers = value if isinstance(value, tuple) else (value,)
        return any(getattr(config, _field(name)) != K for K in numbers)

    return {name: value for name, value in num_kv_heads.items() if changes(name, value)}


def _walk(
    params: dict,
    config: Config,
    fewer: dict[str, int],
    space: str,
    input_covariances: Iterable[InputCovariance] | None,
    batches: Sequence[dict] | None,
) -> Generator[InputCovariance, dict | None, None]:
    """The covariances in the order that layers are to be converted in; without any, `keys` is
    None.
    """
    if space == "weight":
        layers = {name: len(kernels_of(params, name)["key"]) for name in fewer}
        return (
            InputCovariance(n, i, None, None, 0, 0) for n, L in layers.items() for i in range(L)
        )
    if batches is not None:
        return calibration.input_covariances(params, config, batches, tuple(fewer))
    return (covariance for covariance in input_covariances)
