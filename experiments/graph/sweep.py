"""Expand a config into the configs that it stands for: the points of its sweep, or comparisons.

The section `sweep` of a config has grids by name. A grid lists what varies over the base config,
and stands for every combination; the sweep is all of its grids. A config without that section
stands for itself and for the ways of converting that its key `compare` names.
"""

import importlib
import itertools
from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.graph import method_names
from experiments.graph.plan import WHERE, converts
from experiments.graph.validate import check_keys, flatten
from experiments.stages.text import split_names
from experiments.stages.variant import NOT_CONVERTED
from gqa.runtime.errors import UserError

NO_TASKS = "none"  # instead of a list of tasks
MULTI_HEAD = 0  # stands for as many KV heads as heads, in any size

# The keys that are lists of numbers, each with an example that shows whether fractions are allowed.
NUMBERS = {"kv_heads": (8, 1), "alphas": (0.05, 0.1), "seeds": (0, 1)}


def expand(config: ConfigDict) -> list[ConfigDict]:
    """Return the points of a sweep; of a config without one, the config itself and its comparisons.

    Raises:
        UserError: for an empty list, an unknown size, or a comparison that could not run.
    """
    if "sweep" in config:
        return [each for grid in config.sweep for each in _grid(config, grid)]
    return [config, *_comparisons(config)]


def _comparisons(config: ConfigDict) -> list[ConfigDict]:
    """Return a config for each entry of `compare` that differs from the config itself."""
    names = split_names(config.compare)
    if not names:
        return []

    # Comparisons inherit the keys of the config. Check those first, so that no comparison is blamed
    # for a mistake in them.
    check_keys(config)
    itself = _point(config)
    points: list[ConfigDict] = []
    for name in names:
        try:
            point = _compared(itself, name)
            check_keys(point)
        except UserError as error:
            raise UserError(f"config.compare: {name!r}: {error}") from error
        if point not in (itself, *points):
            points.append(point)

    # A network that keeps all its heads is the same however it would have been converted.
    return points if converts(config) else []


def _compared(config: ConfigDict, name: str) -> ConfigDict:
    """Return the config with the method and the alpha of a comparison, such as `svd-weight@0.05`.

    Raises:
        UserError: for an alpha that is no number, and for words that name no setting.
    """
    point = _point(config)
    method, at, alpha = name.partition("@")
    point.update_from_flattened_dict(method_names.keys(method.strip()))
    if at:
        try:
            point.uptrain.alpha = float(alpha)
        except ValueError as error:
            advice = "use a fraction from 0 to 1, as in mean@0.05"
            raise UserError(f"{alpha!r} is no alpha; {advice}") from error
    return point


def _grid(config: ConfigDict, grid: str) -> Iterator[ConfigDict]:
    # Check all axes before the first point is made, so that errors name the key of the sweep.
    axes = config.sweep[grid]
    tasks = "" if axes.tasks == NO_TASKS else axes.tasks or config.finetune.tasks
    for key in ("sizes", "methods", "where"):
        if not split_names(axes[key]):
            raise UserError(f"sweep.{grid}.{key} is empty; name at least one")
    for where in split_names(axes.where):
        if where not in WHERE:
            raise UserError(f"sweep.{grid}.where: {where!r}; use any of {', '.join(WHERE)}")
    for key, example in NUMBERS.items():
        _check_numbers(f"sweep.{grid}.{key}", axes[key], example)

    for size in split_names(axes.sizes):
        base = _resized(config, size)
        heads = axes.kv_heads or _groups(base.model.num_heads)
        lists = (heads, split_names(axes.where), _methods(base, axes), axes.alphas, axes.seeds)
        for kv_heads, where, method, alpha, seed in itertools.product(*lists):
            point = _point(base)

            kv_heads = base.model.num_heads if kv_heads == MULTI_HEAD else kv_heads
            for attention in WHERE["both"]:
                point.convert[f"num_kv_heads_{attention}"] = kv_heads
            point.convert.where = where
            point.update_from_flattened_dict(method_names.keys(method))
            point.uptrain.alpha, point.seed = alpha, seed
            point.finetune.tasks = tasks
            yield point


def _methods(config: ConfigDict, axes: ConfigDict) -> tuple[str, ...]:
    """Return the methods of a grid, without NOT_CONVERTED where pretraining is done already.

    With a trained network in the place of pretraining, nothing can be trained from scratch beside
    it. A grid that asks for nothing else keeps the method, and is refused.
    """
    names = split_names(axes.methods)
    is_trained = any(config.init.values())
    others = tuple(name for name in names if name != NOT_CONVERTED)
    return others if is_trained and others else names


def _check_numbers(name: str, values: tuple, example: tuple) -> None:
    kinds = (int, float) if isinstance(example[0], float) else (int,)
    # `type`, because `isinstance` would take True for an integer.
    good = isinstance(values, tuple) and all(type(value) in kinds for value in values)
    # Without KV heads a grid has every number that divides the heads; other lists need an element.
    if not good or not (values or name.endswith(".kv_heads")):
        raise UserError(f"{name}={values!r}; use numbers such as {example[0]},{example[1]}")


def _groups(num_heads: int) -> list[int]:
    """Return every number of KV heads below the parent's, which is in every plan anyway."""
    return [K for K in range(num_heads - 1, 0, -1) if num_heads % K == 0]


def _resized(config: ConfigDict, size: str) -> ConfigDict:
    """Return the base config of another size, with the keys that the user changed in this one."""
    if size == config.size:
        return config
    get_config = importlib.import_module("configs.base").get_config

    # Keys that differ from the default of the old size were set by the user, or by the sweep.
    default, other = get_config(config.size), get_config(size)
    changed = set(flatten(config)) - set(flatten(default))
    keys = dict(flatten(other)).keys()
    other.update_from_flattened_dict({k: v for k, v in changed if k in keys - {"name", "size"}})
    other.name = config.name
    return other


def _point(config: ConfigDict) -> ConfigDict:
    """Return a copy of a config that stands for itself alone."""
    point = config.copy_and_resolve_references()
    point.compare = ""
    if "sweep" in point:
        with point.unlocked():
            del point.sweep
    return point
