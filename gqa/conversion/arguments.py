"""Check the arguments of a conversion: known names, defaults, and which of them go together.

Messages name the argument of `gqa.convert` and the values that would do. Nothing but `check_finite`
reads parameters, so a pipeline can check a conversion before it trains the network.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gqa.conversion import closed_form, learned, pooling
from gqa.conversion.calibration import ATTENTIONS, InputCovariance
from gqa.conversion.calibration import check_finite as check_covariance_finite
from gqa.conversion.closed_form import SPACES
from gqa.conversion.grouping import GROUPINGS, MEASURED
from gqa.model.config import Config, check_kv_heads
from gqa.runtime.errors import CheckpointError, ConfigError, UserError

ABSORBING = closed_form.METHODS  # queries and outputs absorb a change of basis
LAYERWISE = (*ABSORBING, *pooling.MEASURED)  # methods that convert a layer by its covariances
CLOSED = (*pooling.METHODS, *pooling.MEASURED, *ABSORBING)  # methods that need no training
METHODS = (*CLOSED, *learned.METHODS)

SHRINKAGE = 0.01  # default shrinkage of the covariances toward the identity

# KV heads by attention: one number, or a number for each layer.
KVHeads = dict[str, int | tuple[int, ...]]


def check(
    config: Config,
    num_kv_heads: KVHeads,
    method: str,
    space: str = "logit",
    grouping: str = "contiguous",
    renorm: bool = False,
    calibrated: bool = True,
) -> None:
    """Raise the UserError that `convert` would raise, without touching parameters.

    Args:
        calibrated: whether `convert` will be given `input_covariances` or `batches`.
    """
    choices = {
        "method": (method, METHODS),
        "space": (space, SPACES),
        "grouping": (grouping, GROUPINGS),
    }
    for argument, (choice, known) in choices.items():
        if choice not in known:
            raise ConfigError(argument, choice, f"use one of {', '.join(known)}")

    # Methods read kernels that are stacked over all layers, and such layers have no common stack.
    if len(config.layer_groups) > 1:
        raise UserError(
            "the layers of this network differ in KV heads already; convert its multi-head parent"
        )

    # The numbers of KV heads must divide the heads that the network has now.
    for name, value in num_kv_heads.items():
        if name not in ATTENTIONS:
            raise UserError(f"no attention {name!r} to convert; use {', '.join(ATTENTIONS)}")
        for K in value if isinstance(value, tuple) else (value,):
            check_kv_heads(_field(name), K, getattr(config, _field(name)))

    # Combinations: some methods exclude an option, others need calibration text.
    if renorm and method in learned.METHODS:
        advice = f"use renorm=False, or method={', '.join(CLOSED)}"
        raise ConfigError("renorm", True, advice, f"does not go with {method!r}, which is trained")
    if any(isinstance(value, tuple) for value in num_kv_heads.values()):
        check_per_layer(method, grouping)

    if calibrated or not changed_attentions(config, num_kv_heads):
        return
    if needs_input_covariances(method, space, grouping):
        measured = ("grouping", grouping) if grouping in MEASURED else ("method", method)
        advice = "give input_covariances, or calibration batches"
        raise ConfigError(*measured, advice, "weighs heads by activations")


def check_finite(params: dict) -> None:
    """Raise a CheckpointError that names the first parameter with NaN or an infinite number.

    Every method would spread such a number over a whole group, or stop inside a factorisation.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        bad = leaf.size - int(jnp.isfinite(leaf).sum())
        if bad:
            name = "/".join(str(key.key) for key in path)
            raise CheckpointError(
                f"parameter {name} has NaN or infinity in {bad} of {leaf.size} places, so the "
                "network cannot be converted; use an earlier checkpoint"
            )


def check_per_layer(method: str, grouping: str) -> None:
    """Raise a ConfigError for a choice that needs one number of KV heads for all layers.

    A method that is trained keeps one stack of layers. A grouping other than "contiguous" reorders
    heads, and the self-attentions of a stack share one order because they share a position bias.
    """
    if method in learned.METHODS:
        reason = "does not go with KV heads by layer, because it is trained"
        raise ConfigError("method", method, f"use one of {', '.join(CLOSED)}", reason)
    if grouping != "contiguous":
        reason = "does not go with KV heads by layer, because self-attentions share one order"
        raise ConfigError("grouping", grouping, "use contiguous", reason)


def needs_input_covariances(
    method: str, space: str = "logit", grouping: str = "contiguous"
) -> bool:
    """Return whether a conversion reads input covariances, so that it needs calibration text."""
    by_activations = method in closed_form.METHODS and space != "weight"
    return by_activations or method in pooling.MEASURED or grouping in MEASURED


def needs_attended(method: str, space: str = "logit", per_layer_budget: bool = False) -> bool:
    """Return whether a conversion reads what attention attends to, as part of its covariances.

    Args:
        per_layer_budget: whether KV heads are spread over the layers by `per_layer_kv_heads`, which
            measures the loss of "svd" in each layer, whatever the method is.
    """
    by_closed_form = method in closed_form.METHODS or per_layer_budget
    return (by_closed_form and space == "attention") or method in pooling.MEASURED


def check_covariance(covariance: InputCovariance, method: str, space: str) -> None:
    """Raise a UserError for a covariance that is not finite, or lacks what a method reads."""
    check_covariance_finite(covariance)
    if needs_attended(method, space) and covariance.attended is None:
        raise UserError(
            f"input_covariances of {covariance.attention} in layer {covariance.layer} do not say "
            "what its heads attend to; measure them with attended=True"
        )


def heads_by_attention(
    num_kv_heads: int | Mapping[str, int] | Mapping[str, int | tuple[int, ...]],
) -> KVHeads:
    """Return the numbers by attention; a number alone stands for both attentions of the decoder."""
    if isinstance(num_kv_heads, int):
        return {"self_attention": num_kv_heads, "cross_attention": num_kv_heads}
    return dict(num_kv_heads)


def one_for_all_layers(num_kv_heads: KVHeads) -> dict[str, int]:
    """Return the entries with one number of KV heads for all layers.

    Groupings other than "contiguous" and the learned methods have no other entries; see `check`.
    """
    return {name: K for name, K in num_kv_heads.items() if not isinstance(K, tuple)}


def changed_attentions(config: Config, num_kv_heads: KVHeads) -> KVHeads:
    """Return the entries of attentions that get another number of KV heads in any layer."""

    def changes(name: str, value: int | tuple[int, ...]) -> bool:
        numbers = value if isinstance(value, tuple) else (value,)
        return any(getattr(config, _field(name)) != K for K in numbers)

    return {name: value for name, value in num_kv_heads.items() if changes(name, value)}


def config_fields(num_kv_heads: KVHeads) -> dict[str, Any]:
    """Return the numbers by the name of their field of `Config`, as ** arguments for it."""
    return {_field(name): K for name, K in num_kv_heads.items()}


def _field(attention: str) -> str:
    """Return the field of `Config` that holds an attention's number of KV heads."""
    return f"num_kv_heads_{attention}"
