"""Apply a conversion method to every layer, and put the new kernels into the parameter tree.

Neighbouring decoder layers with equal numbers of KV heads form a layer group and share stacked
arrays (`Config.layer_groups`). So new kernels are keyed by attention and by the first layer of a
layer group. The methods themselves are in pooling.py and closed_form.py.
"""

import contextlib
import warnings
from collections.abc import Generator, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gqa.conversion import calibration, closed_form, pooling
from gqa.conversion.arguments import check_covariance, needs_attended, needs_input_covariances
from gqa.conversion.attention_kernels import in_groups, kernels_of, replaced
from gqa.conversion.calibration import ATTENTIONS, InputCovariance
from gqa.model.config import Config
from gqa.model.transformer import cut

# A covariance with a larger condition number has directions of which the batches say nothing.
ILL_CONDITIONED = 1e9
# With so many tokens for each of the D directions, that is no fault of the batches: the network
# never uses these directions. A small vocabulary's embeddings, for example, span few of them.
ENOUGH_TOKENS = 10

# New kernels of each attention, by the first layer of each layer group of the new config.
GroupKernels = dict[str, dict[int, dict]]


def _layer_groups(config: Config, name: str) -> dict[int, tuple[slice, int]]:
    """Return, by the first layer of each layer group, its layers and the KV heads of `name`."""
    lengths = {0: config.num_encoder_layers} if name == "encoder" else config.layer_groups
    heads = config.kv_heads(name)
    return {first: (slice(first, first + n), heads[first]) for first, n in lengths.items()}


def pooled_kernels(
    params: dict, new_config: Config, num_kv_heads: dict, method: str, seed: int
) -> GroupKernels:
    """Pool keys and values of the attentions in `num_kv_heads` by a method of pooling.py."""
    kernels: GroupKernels = {name: {} for name in num_kv_heads}
    for name in num_kv_heads:
        # Each attention has a key of its own, so that "random" draws different heads for each.
        old = kernels_of(params, name)
        key = jax.random.fold_in(jax.random.key(seed), list(ATTENTIONS).index(name))
        for first, (layers, K) in _layer_groups(new_config, name).items():
            group = {side: kernel[layers] for side, kernel in old.items()}
            kernels[name][first] = group
            if group["key"].shape[2] == K:
                continue

            # Each layer group folds its first layer into the key, so that no two draw equal heads.
            heads = [in_groups(group[side], K) for side in ("key", "value")]
            keys, values = getattr(pooling, method)(*heads, jax.random.fold_in(key, first))
            kernels[name][first] = group | {"key": keys, "value": values}
    return kernels


def layer_covariances(
    params: dict,
    config: Config,
    num_kv_heads: dict,
    method: str,
    space: str,
    input_covariances: Iterable[InputCovariance] | None,
    batches: Sequence[dict] | None,
) -> Generator[InputCovariance, dict | None, None]:
    """Return the input covariances in the order in which layers are to be converted.

    With `batches` they are measured on the way, and a caller may send a layer's new kernels back.
    A method that reads no covariances in its space, as "svd" in "weight", gets some whose `keys`
    are None.
    """
    if not needs_input_covariances(method, space):
        num_layers = {name: len(kernels_of(params, name)["key"]) for name in num_kv_heads}
        return _ignoring_sends(
            InputCovariance(name, i, None, None, 0, 0)
            for name, L in num_layers.items()
            for i in range(L)
        )
    if batches is not None:
        attended = needs_attended(method, space)
        return calibration.input_covariances(params, config, batches, tuple(num_kv_heads), attended)
    return _ignoring_sends(input_covariances or ())


def _ignoring_sends(
    covariances: Iterable[InputCovariance],
) -> Generator[InputCovariance, dict | None, None]:
    """Yield covariances that were measured before; kernels that are sent back change nothing."""
    # `yield from` would pass sent kernels on to a list's iterator, which has no method `send`.
    for covariance in covariances:  # noqa: UP028
        yield covariance


def layerwise_kernels(
    params: dict,
    new_config: Config,
    num_kv_heads: dict,
    covariances: Generator[InputCovariance, dict | None, None],
    method: str,
    space: str,
    shrinkage: float,
) -> GroupKernels:
    """Convert the attentions in `num_kv_heads` layer by layer, by a method that reads covariances.

    Each layer's new kernels are sent to the generator `covariances`, which continues with the
    network as converted so far if it measures on the way.
    """
    kernels: dict[str, dict[int, dict]] = {name: {} for name in num_kv_heads}  # by layer
    conditions: dict[tuple[str, int], float] = {}

    # Each pass sends the new kernels of the layer before, and receives the next covariance. The
    # generator ends with StopIteration.
    new: dict | None = None
    with contextlib.suppress(StopIteration):
        while True:
            covariance = covariances.send(new)
            name, layer = covariance.attention, covariance.layer
            if name not in num_kv_heads:
                new = None
                continue
            old = {side: kernel[layer] for side, kernel in kernels_of(params, name).items()}

            check_covariance(covariance, method, space)

            # With KV heads by layer, a layer may keep all of its heads; then it keeps its kernels.
            new, K = old, new_config.kv_heads(name)[layer]
            if new["key"].shape[1] != K and method in pooling.MEASURED:
                new = _pruned(old, K, covariance)
            elif new["key"].shape[1] != K:
                new, condition = closed_form.convert_layer(
                    old, K, method, space, covariance, shrinkage
                )
                if covariance.num_keys < ENOUGH_TOKENS * new_config.d_model:
                    conditions[name, layer] = condition
            kernels[name][layer] = new

    # This finds out whether every layer had a covariance, before the worst of them is looked for.
    stacked = {name: _stack(params, new_config, name, layers) for name, layers in kernels.items()}
    if conditions:
        _warn_if_ill_conditioned(conditions)
    return stacked


def _pruned(old: dict, num_kv_heads: int, covariance: InputCovariance) -> dict:
    """Return one layer's kernels with the heads that `pooling.prune` keeps."""
    assert covariance.attended is not None  # `check_covariance` has seen to it
    energies = pooling.output_energies(old, covariance.attended).reshape(1, num_kv_heads, -1)

    # `prune` is for stacked layers: here, for a stack of one.
    old_keys, old_values = (in_groups(old[side][None], num_kv_heads) for side in ("key", "value"))
    keys, values = pooling.prune(old_keys, old_values, energies)
    return old | {"key": keys[0], "value": values[0]}


def restore_norms(kernels: GroupKernels, params: dict) -> GroupKernels:
    """Scale new keys and values to the mean norm of the heads in `params` that they replace."""

    def scaled(name: str, first: int, new: dict) -> dict:
        L, _, K, _ = new["key"].shape
        old = {side: kernels_of(params, name)[side][first : first + L] for side in ("key", "value")}
        return new | {s: pooling.restore_norm(new[s], in_groups(old[s], K)) for s in old}

    return {
        name: {first: scaled(name, first, new) for first, new in groups.items()}
        for name, groups in kernels.items()
    }


def with_kernels(params: dict, new_config: Config, kernels: GroupKernels) -> dict:
    """Return the parameters of `new_config`: the new kernels, and all other leaves of `params`."""
    params = cut(params, new_config)
    for name, groups in kernels.items():
        stack, attention = ATTENTIONS[name]
        for first, new in groups.items():
            # The tree has a level for layer groups only where there are several.
            group = (str(first),) if len(groups) > 1 else ()
            params = replaced(params, (stack, "layers", *group, attention), new)
    return params


def _stack(params: dict, new_config: Config, name: str, layers: dict[int, dict]) -> dict[int, dict]:
    """Stack one attention's kernels by layer group, in the dtypes of `params`."""
    old = kernels_of(params, name)
    L = len(old["key"])
    if len(layers) != L:
        raise ValueError(f"covariances of {len(layers)} layers of {L} for {name}")

    def stacked(group: slice) -> dict:
        return {
            side: jnp.asarray(np.stack([layers[i][side] for i in range(L)[group]]), kernel.dtype)
            for side, kernel in old.items()
        }

    groups = _layer_groups(new_config, name)
    return {first: stacked(group) for first, (group, _) in groups.items()}


def _warn_if_ill_conditioned(conditions: dict[tuple[str, int], float]) -> None:
    """Warn once, about the worst covariance. The converted weights are finite all the same."""
    (name, layer), worst = max(conditions.items(), key=lambda item: item[1])
    if worst > ILL_CONDITIONED:
        warnings.warn(
            f"covariances of layer {layer} of attention {name!r} have condition number "
            f"{worst:.2g}: some directions or heads carry no signal; calibrate on more tokens",
            stacklevel=3,
        )
