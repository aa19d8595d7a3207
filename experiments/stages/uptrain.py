"""Continue pretraining a converted checkpoint for alpha times its steps (paper, section 2.1).

Recipe, learning-rate schedule, text and the place in the text are the multi-head parent's. So the
network goes on as if it had been converted between two steps of pretraining.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.stages.folder import NATS, Outcome, StageFolder, record
from experiments.stages.inputs import (
    Job,
    Parent,
    load_params,
    load_state,
    open_parent,
    pretrain_recipe,
)
from experiments.stages.settings import UptrainSettings
from experiments.stages.text import Training, training
from experiments.stages.training import Pooling, TrainingSpec, run_training
from experiments.stages.typed_json import to_json
from gqa import conversion
from gqa.checkpoints import checkpoint
from gqa.conversion import grouping, learned, optimizer_state
from gqa.runtime import distributed
from gqa.training import training_step


def run(
    label: str, settings: UptrainSettings, folder: StageFolder, parents: list[Path], job: Job
) -> Outcome:
    """Train the first of the parents; the last parent is the multi-head network.

    A network that was not converted has one parent: its own pretraining. It is uptrained as a
    control, if it is multi-head, or as a network that is trained from scratch.
    """
    variant = settings.variant
    converted, origin = open_parent(parents[0]), open_parent(parents[-1])
    recipe = pretrain_recipe(origin, job)
    model = dataclasses.replace(converted.config, remat=job.setup.remat)
    data = training(job.text, recipe)
    steps = round(variant.alpha * recipe.steps)

    pooling, teacher, teacher_params = None, None, None
    if variant.method in learned.METHODS:
        pooling = _make_pooling(variant.method, converted, origin, steps)
    if variant.beta:
        teacher = training_step.Teacher(origin.config, variant.beta)
        teacher_params = load_params(origin, job)

    def start() -> training_step.State:
        # A learned pooling trains the multi-head parameters themselves.
        parent = converted if pooling is None else origin
        state, data_state = load_state(parent, job)
        # The batches that the parent has seen are not repeated.
        data.batches.set_state(distributed.state_of_this_process(data_state))
        return state if pooling is None else pooling.start(_permute_heads(state, converted))

    spec = TrainingSpec(
        info=dataclasses.replace(converted.info, model=model, variant=variant),
        recipe=recipe,
        steps=steps,
        first_step=origin.step,
        pooling=pooling,
        teacher=teacher,
    )

    # The checkpoints of a learned pooling hold its weights beside all heads, which no later stage
    # reads. They lie in a folder of their own, and a plain grouped checkpoint is made at the end.
    training_folder = folder if pooling is None else folder.learned
    outcome = run_training(label, job, training_folder, data, start, spec, teacher_params)
    if pooling is not None:
        _save_folded(folder, outcome, pooling, converted, job)

    # The divergence is that from a multi-head parent, which a network from scratch does not have.
    if variant.is_from_scratch:
        return outcome
    uptrained = open_parent(folder.checkpoints / str(outcome.checkpoint))
    divergence = _divergence(uptrained, origin, data, job)
    records = [*outcome.records, record("kl_to_parent", divergence, NATS)]
    return dataclasses.replace(outcome, records=records)


def _permute_heads(state: training_step.State, converted: Parent) -> training_step.State:
    """Put the parent's heads in the order of the conversion, so that neighbours share a group."""
    head_orders = converted.info.head_orders or {}
    orders = {attention: np.array(order) for attention, order in head_orders.items()}
    opt_state = optimizer_state.permute_heads(state.opt_state, state.params, orders)
    params = grouping.permute_heads(state.params, orders)
    return state._replace(params=params, opt_state=opt_state)


def _make_pooling(method: str, converted: Parent, origin: Parent, steps: int) -> Pooling:
    """Return the pooling that a learned method trains, from step `origin.step` on."""
    heads = {
        name: getattr(converted.config, f"num_kv_heads_{name}") for name in conversion.ATTENTIONS
    }
    expand = functools.partial(learned.expand, num_kv_heads=heads, method=method)

    # "weighted" runs the grouped network in every step. "fuse" begins as the multi-head network and
    # ends as the grouped one, so it runs all heads and blends them by the share of steps done.
    def weighted(tree: dict, step: Array) -> dict:
        del step
        return learned.fold(tree)

    def fuse(tree: dict, step: Array) -> dict:
        return learned.blend(tree, (step - origin.step).astype(jnp.float32) / steps)

    if method == "weighted":
        return Pooling(converted.config, origin.config, expand, weighted, learned.fold)
    return Pooling(origin.config, origin.config, expand, fuse, learned.fold)


def _save_folded(
    folder: StageFolder, outcome: Outcome, pooling: Pooling, converted: Parent, job: Job
) -> None:
    """Save the network that a learned pooling ended as, as a plain grouped checkpoint."""
    step = int(str(outcome.checkpoint))
    trained = folder.learned.checkpoints.absolute() / str(step)
    with checkpoint.Checkpoints(folder.checkpoints, job.setup.checkpoint.keep_last) as checkpoints:
        if checkpoints.latest is not None:
            return  # a run that was killed after saving it

        # The trained tree has leaves that no plain network has, so the pooling gives its shapes.
        state = pooling.abstract(job.mesh, job.layout)
        shapes = {"params": state.params, "opt_state": state.opt_state}
        items = checkpoint.load(trained, shapes | {"data": None, "config": None})
        items["params"], items["opt_state"] = jax.jit(_fold, static_argnums=2)(
            items["params"], items["opt_state"], pooling.fold
        )
        items["config"] |= {"model": to_json(converted.config)}
        checkpoints.save(step, items, {"validation_loss": outcome.records[0]["value"]})


def _fold(tree: dict, opt_state: dict, fold: Callable) -> tuple[dict, dict]:
    # `pool_moments` compares the shapes of heads with those of groups, so the pooling weights and
    # their moments are removed first.
    old, params = learned.without_pools(tree), fold(tree)
    return params, optimizer_state.pool_moments(learned.without_pools(opt_state), old, params)


def _divergence(parent: Parent, origin: Parent, data: Training, job: Job) -> float:
    """Return KL(multi-head parent || network) on the validation text, in nats per token."""
    divergence = training_step.make_divergence(origin.config, parent.config, job.mesh)
    return divergence(load_params(origin, job), load_params(parent, job), data.validation())
