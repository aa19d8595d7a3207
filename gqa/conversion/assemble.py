"""The kernels of fewer heads, for each run of layers that are to have the same number of them."""

import contextlib
import warnings
from collections.abc import Generator

import jax
import jax.numpy as jnp
import numpy as np

from gqa.conversion import closed_form, pooling
from gqa.conversion.attention_kernels import in_groups, kernels_of, replaced
from gqa.conversion.calibration import ATTENTIONS
from gqa.model.config import Config
from gqa.model.transformer import cut

# Moments with a larger condition number have directions of which the batches say nothing.
ILL_CONDITIONED = 1e9

# What is made of each attention: by the first layer of each run of the new config, its kernels.
Made = dict[str, dict[int, dict]]


def _runs(config: Config, name: str) -> dict[int, tuple[slice, int]]:
    """By the first layer of each run: its layers, and their KV heads in attention `name`."""
    runs = {0: config.num_encoder_layers} if name == "encoder" else config.layer_groups
    heads = config.kv_heads(name)
    return {first: (slice(first, first + length), heads[first]) for first, length in runs.items()}


def pooled(params: dict, config: Config, fewer: dict, method: str, seed: int) -> Made:
    """By a method of `pool`, for the attentions in `fewer`; `config` is the new one."""
    made = {name: {} for name in fewer}
    for name in fewer:
        kernels = kernels_of(params, name)
        key = jax.random.fold_in(jax.random.key(seed), list(ATTENTIONS).index(name))
        for first, (layers, K) in _runs(config, name).items():
            run = {side: kernel[layers] for side, kernel in kernels.items()}
            made[name][first] = run
            if run["key"].shape[2] == K:
                continue
            groups = [in_groups(run[side], K) for side in ("key", "value")]
            keys, values = getattr(pooling, method)(*groups, jax.random.fold_in(key, first))
            made[name][first] = run | {"key": keys, "value": values}
    return made


def renormed(made: Made, params: dict) -> Made:
    """The same with keys and values as large as those of `params` that they are made of."""

    def scaled(name: str, first: int, kernels: dict) -> dict:
        L, _, K, _ = kernels["key"].shape
        old = {side: kernels_of(params, name)[side][first : first + L] for side in ("key", "value")}
        return kernels | {s: pooling.renormed(kernels[s], in_groups(old[s], K)) for s in old}

    return {
        name: {first: scaled(name, first, kernels) for first, kernels in runs.items()}
        for name, runs in made.items()
    }


def assembled(params: dict, config: Config, made: Made) -> dict:
    """Parameters of `config` with the kernels that were made, the rest as it was."""
    params = cut(params, config)
    for name, runs in made.items():
        stack, attention = ATTENTIONS[name]
        for first, kernels in runs.items():
            run = (str(first),) if len(runs) > 1 else ()
            params = replaced(params, (stack, "layers", *run, attention), kernels)
    return params


def absorbed(
    params: dict,
    config: Config,
    fewer: dict,
    walk: Generator,
    method: str,
    space: str,
    shrinkage: float,
) -> Made:
    """Convert layer by layer; what becomes of each is sent back to the walk, which may use it."""
    found = {name: {} for name in fewer}
    conditions = {}
    new = None
    with contextlib.suppress(StopIteration):
        while True:
            covariance = walk.send(new)
            name, layer = covariance.attention, covariance.layer
            if name not in fewer:
                new = None
                continue
            kernels = {side: kernel[layer] for side, kernel in kernels_of(params, name).items()}
            new, K = kernels, config.kv_heads(name)[layer]
            if new["key"].shape[1] != K:
                new, conditions[name, layer] = closed_form.layer(
                    kernels, K, method, space, covariance, shrinkage
                )
            found[name][layer] = new
    _warn(conditions)
    return {name: _in_runs(params, config, name, layers) for name, layers in found.items()}


def _in_runs(params: dict, config: Config, name: str, made: dict[int, dict]) -> dict[int, dict]:
    """Kernels by layer as kernels by run, in the dtypes of `params`."""
    kernels = kernels_of(params, name)
    L = len(kernels["key"])
    if len(made) != L:
        raise ValueError(f"covariances of {len(made)} layers of {L} for {name}")

    def stacked(layers: slice) -> dict:
        return {
            side: jnp.asarray(np.stack([made[i][side] for i in range(L)[layers]]), kernel.dtype)
            for side, kernel in kernels.items()
        }

    return {first: stacked(layers) for first, (layers, _) in _runs(config, name).items()}


def _warn(conditions: dict[tuple[str, int], float]) -> None:
    """Say once how bad the worst covariances were; the weights are finite all the same."""
    (name, layer), worst = max(conditions.items(), key=lambda item: item[1])
    if worst > ILL_CONDITIONED:
        warnings.warn(
            f"covariances of layer {layer} of attention {name!r} have condition number "
            f"{worst:.2g}: "
            "directions or heads without any signal; raise convert.calibration_tokens",
            stacklevel=3,
        )
