"""Continue pretraining a converted checkpoint for alpha times its steps (paper, section 2.1).

Recipe, learning-rate schedule, text and the place in it are the parent's, as if nothing had
happened but the conversion.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.stages.stage import (
    NATS,
    Job,
    Outcome,
    Parent,
    load_params,
    load_state,
    open_parent,
    read_done,
    record,
)
from experiments.stages.text import Training, training
from experiments.stages.training import Pooling, run_training
from gqa import conversion
from gqa.checkpoints import checkpoint
from gqa.conversion import grouping, learned, optimizer_state
from gqa.model.config import Config
from gqa.runtime import distributed
from gqa.training import loop, optimizer


def run(name: str, settings: dict, folder: Path, parents: list[Path], job: Job) -> Outcome:
    """Settings: alpha, beta and variant, and the method if it is learned meanwhile.

    The last parent is the multi-head one; the first is what is uptrained.
    """
    converted, origin = open_parent(parents[0]), open_parent(parents[-1])
    recipe, first_step = origin.info["recipe"], int(origin.path.name)
    data = training(job.text, recipe["task"], recipe, recipe["seed"])
    steps = round(settings["alpha"] * recipe["steps"])
    pooling, teacher, given = None, None, ()
    if "learned" in settings:
        pooling = _pooling(settings["learned"], converted, origin, first_step, steps)
        orders = {name: np.array(x) for name, x in converted.info.get("orders", {}).items()}
    if settings["beta"]:
        teacher = loop.Teacher(origin.config, settings["beta"])
        given = (load_params(origin, job),)

    def start() -> loop.State:
        parent = (_head_start(folder) or converted) if pooling is None else origin
        state, data_state = load_state(parent, job)
        data.batches.set_state(distributed.own(data_state))
        return state if pooling is None else pooling.start(_permuted(state, orders))

    outcome = run_training(
        name,
        job,
        folder if pooling is None else folder / "learned",
        data,
        start=start,
        config=converted.config,
        info=converted.info | {"variant": settings["variant"]},
        recipe=recipe,
        learning_rate=optimizer.rsqrt(recipe["warmup"], recipe["scale"]),
        first_step=first_step,
        steps=steps,
        keep="last",
        pooling=pooling,
        teacher=teacher,
        given=given,
    )
    if pooling is not None:
        _fold(folder, outcome, pooling, converted.config, job)
    apart = _divergence(open_parent(folder / "checkpoints" / outcome.checkpoint), origin, data, job)
    return outcome._replace(records=[*outcome.records, record("kl_to_parent", apart, NATS)])


def _permuted(state: loop.State, orders: dict[str, np.ndarray]) -> loop.State:
    """The parent with its heads in the order that conversion chose, so that neighbours share."""
    opt_state = optimizer_state.permute_heads(state.opt_state, state.params, orders)
    return state._replace(params=grouping.permute_heads(state.params, orders), opt_state=opt_state)


def _head_start(folder: Path) -> Parent | None:
    """The end of the longest finished uptraining that is how this one begins.

    It differs in alpha alone: its last step is one of this one's, bit for bit.
    """
    found = distributed.by_primary(lambda: _beginning(folder))  # others may be finishing just now
    if found is None:
        return None
    stage = Path(found)
    return open_parent(stage / "checkpoints" / read_done(stage)["checkpoint"])


def _beginning(folder: Path) -> str | None:
    def read(stage: Path) -> tuple[dict, float]:
        what = json.loads((stage / "stage.json").read_text())
        settings = {
            key: x for key, x in what["settings"].items() if key not in ("alpha", "variant")
        }
        alpha = what["settings"]["alpha"]
        return {"settings": settings, "parents": what["parents"]}, alpha

    own, longest = read(folder)
    found = []
    for path in folder.parent.glob("uptrain-*/done.json"):
        same, alpha = read(path.parent)
        if same == own and alpha < longest:
            found.append((alpha, path.parent))
    return str(max(found)[1]) if found else None


def _pooling(method: str, converted: Parent, origin: Parent, first_step: int, steps: int):
    heads = {
        name: getattr(converted.config, f"num_kv_heads_{name}") for name in conversion.ATTENTIONS
    }
    expand = functools.partial(learned.expand, num_kv_heads=heads, method=method)

    def weighted(tree: dict, step: Array) -> dict:
        del step
        return learned.fold(tree)

    def fuse(tree: dict, step: Array) -> dict:
        return learned.blend(tree, (step - first_step).astype(jnp.float32) / steps)

    if method == "weighted":
        return Pooling(converted.config, origin.config, expand, weighted, learned.fold)
    return Pooling(origin.config, origin.config, expand, fuse, learned.fold)


def _fold(folder: Path, outcome: Outcome, pooling: Pooling, config: Config, job: Job) -> None:
    """Save what the pooling has become as a plain grouped checkpoint."""
    step = int(outcome.checkpoint)
    path = folder.absolute() / "learned" / "checkpoints" / outcome.checkpoint
    with checkpoint.Checkpoints(folder / "checkpoints", job.keep_last) as checkpoints:
        if checkpoints.latest is not None:
            return
        state = pooling.abstract(job.mesh, job.layout)
        shapes = {"params": state.params, "opt_state": state.opt_state}
        items = checkpoint.load(path, shapes | {"data": None, "config": None})
        items["params"], items["opt_state"] = jax.jit(_plain, static_argnums=2)(
            items["params"], items["opt_state"], pooling.fold
        )
        items["config"] |= {"model": config.__dict__}
        checkpoints.save(step, items, {"validation_loss": outcome.records[0]["value"]})


def _plain(tree: dict, opt_state: dict, fold: Callable) -> tuple[dict, dict]:
    old, params = learned.without_pools(tree), fold(tree)
    return params, optimizer_state.pool_moments(learned.without_pools(opt_state), old, params)


def _divergence(parent: Parent, origin: Parent, data: Training, job: Job) -> float:
    """KL(multi-head parent || network) on the validation text, nats per token."""
    divergence = loop.make_divergence(origin.config, parent.config, job.mesh)
    return divergence(load_params(origin, job), load_params(parent, job), data.validation())
