"""Convert a checkpoint to fewer KV heads: pure functions of a parameter tree (paper, section 2.1).

This file holds the two public functions, `convert` and `per_layer_kv_heads`, and nothing else. The
N heads of an attention are cut into K groups of neighbours, and each group becomes one KV head. The
result is always a plain grouped checkpoint. Three choices are independent of each other:

    method     how a group's head is made    pooling.py: from the group's keys and values alone
                                             closed_form.py: queries and outputs change with them
                                             learned.py: by training
    grouping   which heads share a group     grouping.py
    renorm     whether a new head is scaled to the mean norm of the heads that it replaces

arguments.py checks the arguments, calibration.py and attended.py measure the activations,
assemble.py applies a method to every layer, layer_budget.py gives each layer its own number of KV
heads, and optimizer_state.py converts Adafactor's state. docs/conversion.md derives the methods.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from gqa.conversion import arguments, calibration, closed_form, layer_budget, learned
from gqa.conversion.arguments import (
    ABSORBING,
    CLOSED,
    METHODS,
    SHRINKAGE,
    check,
    check_per_layer,
    needs_attended,
    needs_input_covariances,
)
from gqa.conversion.assemble import (
    layer_covariances,
    layerwise_kernels,
    pooled_kernels,
    restore_norms,
    with_kernels,
)
from gqa.conversion.attention_kernels import kernels_of
from gqa.conversion.calibration import ATTENTIONS, InputCovariance
from gqa.conversion.closed_form import SPACES
from gqa.conversion.grouping import (
    GROUPINGS,
    MEASURED,
    find_head_orders,
    permute_covariances,
    permute_heads,
)
from gqa.conversion.query_scale import query_scale
from gqa.model.config import Config
from gqa.runtime.mesh import divisors

__all__ = [
    "ABSORBING",
    "ATTENTIONS",
    "CLOSED",
    "GROUPINGS",
    "MEASURED",
    "METHODS",
    "SHRINKAGE",
    "SPACES",
    "Conversion",
    "InputCovariance",
    "check",
    "check_per_layer",
    "convert",
    "needs_attended",
    "needs_input_covariances",
    "per_layer_kv_heads",
    "query_scale",
]


class Conversion(NamedTuple):
    """The result of `convert`: the grouped network, and the order of its heads.

    Attributes:
        params, config: of the grouped network.
        head_orders: by attention, an array [L, N]. KV head i of layer l, before heads were pooled,
            was head `head_orders[name][l, i]` of the old parameters. An attention that kept its
            order is left out.
    """

    params: dict
    config: Config
    head_orders: dict[str, Int[np.ndarray, "L N"]]


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
) -> Conversion:
    """Convert parameters to `num_kv_heads` KV heads; arrays that do not change are shared.

    Args:
        num_kv_heads: one number for both attentions of the decoder, or a dict of "encoder",
            "self_attention" and "cross_attention"; the latter two also take a number per layer.
        method: one of METHODS. "weighted" and "fuse" give the network their training starts from.
        seed: of everything random in method and grouping.
        input_covariances: of `calibration.input_covariances`, where they or `batches` are needed.
        batches: calibration batches. Each layer is then measured in the network as converted so
            far, so that later layers can make up for the errors of earlier ones.
        space: one of SPACES, what "svd" and "procrustes" keep best (docs/conversion.md).
        grouping: one of GROUPINGS.
        renorm: scale each new head to the mean norm of its group (docs/conversion.md, eq. 13).
        shrinkage: of the covariances toward the identity (eq. 10), from 0 to 1.

    Raises:
        UserError: for arguments that `check` refuses, and for numbers that are not finite.
    """
    heads = arguments.heads_by_attention(num_kv_heads)
    calibrated = input_covariances is not None or batches is not None
    check(config, heads, method, space, grouping, renorm, calibrated)
    arguments.check_finite(params)
    new_config = dataclasses.replace(config, **arguments.config_fields(heads))
    heads = arguments.changed_attentions(config, heads)
    if not heads:
        return Conversion(params, new_config, {})

    # Grouping: reorder the heads so that the members of a group are neighbours.
    if grouping in MEASURED:
        input_covariances = _reusable(input_covariances, params, config, batches, heads)
    one_for_all = arguments.one_for_all_layers(heads)
    head_orders = find_head_orders(params, one_for_all, grouping, seed, input_covariances)
    params = permute_heads(params, head_orders)

    # Method: make one head of each group. All other parameters are shared with the parent.
    if method in learned.METHODS:
        params = learned.fold(learned.expand(params, one_for_all, method))
        return Conversion(params, new_config, head_orders)
    if method in arguments.LAYERWISE:
        measured = permute_covariances(input_covariances or (), head_orders)
        layers = layer_covariances(params, config, heads, method, space, measured, batches)
        kernels = layerwise_kernels(params, new_config, heads, layers, method, space, shrinkage)
    else:
        kernels = pooled_kernels(params, new_config, heads, method, seed)
    kernels = restore_norms(kernels, params) if renorm else kernels
    return Conversion(with_kernels(params, new_config, kernels), new_config, head_orders)


def _reusable(
    input_covariances: Iterable[InputCovariance] | None,
    params: dict,
    config: Config,
    batches: Sequence[dict] | None,
    heads: arguments.KVHeads,
) -> Iterable[InputCovariance]:
    """Return covariances that both the grouping and then the method can read.

    A generator is used up by the first of the two, so its covariances are kept in a list.
    """
    if input_covariances is None:
        assert batches is not None  # or `check` would have asked for them
        input_covariances = calibration.input_covariances(params, config, batches, tuple(heads))
    return list(input_covariances) if isinstance(input_covariances, Iterator) else input_covariances


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
    """Choose KV heads for each layer, in a cache no larger than with `num_kv_heads` everywhere.

    The result is the argument `num_kv_heads` of `convert`. It minimises the energy that "svd" would
    discard, summed over layers and attentions (docs/conversion.md, eqs. 11 and 12).

    Args:
        num_kv_heads: as in `convert`, one number for each attention.
        lengths: positions in the cache of "self_attention" (targets) and "cross_attention"
            (inputs).
        input_covariances, space, shrinkage: as in `convert`.

    Raises:
        UserError: as `convert` does.
    """
    heads = arguments.heads_by_attention(num_kv_heads)
    check(config, heads, "svd", space, calibrated=input_covariances is not None)
    arguments.check_finite(params)
    heads = arguments.changed_attentions(config, heads)

    # First the loss of every layer with each possible number of heads, then the cheapest choice.
    discarded = {}
    layers = layer_covariances(params, config, heads, "svd", space, input_covariances, None)
    for covariance in layers:
        name, layer = covariance.attention, covariance.layer
        if name in heads:
            arguments.check_covariance(covariance, "svd", space)
            kernels = {side: kernel[layer] for side, kernel in kernels_of(params, name).items()}
            discarded[name, layer] = {
                K: closed_form.discarded_energy(kernels, K, space, covariance, shrinkage)
                for K in divisors(kernels["key"].shape[1])
            }

    one_for_all = arguments.one_for_all_layers(heads)
    return layer_budget.allocate(discarded, one_for_all, lengths)
