"""The part that pretraining, uptraining and fine-tuning share: from a stage's settings to `fit`.

The training loop itself is `gqa/training/loop.py`, which knows nothing of stages.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.stages.folder import NATS, Outcome, StageFolder, record
from experiments.stages.inputs import CheckpointInfo, Job
from experiments.stages.settings import Recipe
from experiments.stages.text import Training
from experiments.stages.typed_json import to_json
from gqa.checkpoints import checkpoint
from gqa.model.config import Config
from gqa.model.flops import train_flops
from gqa.runtime import distributed
from gqa.runtime.hardware import peak_flops
from gqa.runtime.mesh import Layout, check_batch
from gqa.runtime.sharding import put
from gqa.training import divergence, loop, optimizer, profiling, progress, training_step


@dataclass(frozen=True)
class Pooling:
    """A learned pooling: the tree that is trained in the place of a grouped network's parameters.

    Args:
        running_config: of the network that runs while training.
        expanded_config: of the network whose parameters `expand` takes.
        expand: makes the trained tree from parameters.
        view: (trained tree, step) -> the parameters that run at this step.
        fold: trained tree -> the grouped parameters that are left at the end.
    """

    running_config: Config
    expanded_config: Config
    expand: Callable[[dict], dict]
    view: Callable[[dict, jax.Array], dict]
    fold: Callable[[dict], dict]

    def abstract(self, mesh: Mesh, layout: Layout) -> training_step.State:
        """Return the shapes and placement of the training state."""
        return training_step.abstract(self.expanded_config, mesh, layout, self.start)

    def start(self, state: training_step.State) -> training_step.State:
        """Return the state to train from. Leaves that `expand` adds begin without moments."""
        params = self.expand(state.params)
        fresh = optimizer.adafactor().init(params)
        return state._replace(params=params, opt_state=_merge(fresh, state.opt_state))


def _merge(fresh: Any, old: Any) -> Any:
    """Return `fresh` with the subtrees of `old` wherever `old` has the same key."""
    if not isinstance(fresh, dict):
        return old
    return {key: _merge(fresh[key], old[key]) if key in old else fresh[key] for key in fresh}


@dataclass(frozen=True)
class TrainingSpec:
    """The network that a stage trains, and how it is trained.

    Args:
        info: the JSON of the checkpoints. Its network is the one that is validated, and that is
            left at the end.
        recipe: batches, learning rate and loss.
        steps: number of steps after `first_step`.
        keep: the checkpoint that is handed on: the "last", or the one with the "best" validation
            loss.
        pooling: for a pooling that is learned. Then the start and the checkpoints hold what
            `pooling.expand` makes of parameters.
        teacher: a network to stay near to.
    """

    info: CheckpointInfo
    recipe: Recipe
    steps: int
    first_step: int = 0
    keep: str = "last"
    pooling: Pooling | None = None
    teacher: training_step.Teacher | None = None


@dataclass(frozen=True)
class _StepSpec:
    """All that a compiled training step depends on, which is less than a `TrainingSpec`.

    For example, it lacks the task, so that fine-tunings of a network on two tasks can share a step.
    """

    config: Config
    pooling: Pooling | None
    teacher: training_step.Teacher | None
    schedule: str
    learning_rate: float
    warmup: int
    z_loss: float
    seed: int
    num_microbatches: int
    mesh: Mesh
    layout: Layout


def run_training(
    label: str,
    job: Job,
    folder: StageFolder,
    data: Training,
    start: Callable[[], training_step.State],
    spec: TrainingSpec,
    teacher_params: dict | None = None,
) -> Outcome:
    """Train in a stage's folder until step `spec.first_step + spec.steps`; resumes what was begun.

    Args:
        start: makes the state to begin with; not called where there is a checkpoint to resume.
        teacher_params: of `spec.teacher`, if there is one.
    """
    recipe, config, pooling = spec.recipe, spec.info.model, spec.pooling
    check_batch(recipe.batch_size, recipe.num_microbatches, job.layout)
    abstract, step = _compile(_step_spec(spec, job))

    # A teacher's parameters are an argument of the step. If the step captured them, the compiler
    # would build them into the program as constants.
    loss_arguments = () if teacher_params is None else (teacher_params,)

    # Validation losses are those of the grouped network, also while its pooling is being learned,
    # so that they can be compared with the losses of any other method.
    fold = (lambda params: params) if pooling is None else jax.jit(pooling.fold)
    validation_loss = training_step.make_validation(config, job.mesh)

    # A learned pooling may run more heads during training than are left at its end.
    running_config = config if pooling is None else pooling.running_config
    step_flops = train_flops(running_config, recipe.batch_size, **data.lengths)

    settings, checkpoints = _run_settings(spec, job), folder.checkpoints.absolute()
    with (
        _make_progress(label, job, folder, recipe.every, step_flops, config.dtype) as shown,
        profiling.profiled(
            lambda state, batch: step(state, batch, *loss_arguments),
            job.setup.train.profile,
            job.events if distributed.is_primary() else None,
        ) as train_step,
    ):
        computation = loop.Computation(
            start=lambda: put(start(), training_step.shardings(abstract)),
            abstract_state=abstract,
            train_step=train_step,
            validate=lambda params: validation_loss(fold(params), data.validation()),
            mesh=job.mesh,
        )
        counts = loop.fit(computation, settings, data.batches, checkpoints, shown)

    # `fit` has closed the checkpoints. They are opened again to choose one of them by its loss,
    # because a run that was finished earlier has its losses only on disk.
    with checkpoint.Checkpoints(checkpoints, settings.keep_last) as saved:
        chosen = saved.best if spec.keep == "best" else saved.latest
        loss = saved.metric(chosen)
    records = _records(loss, data.validation_size, chosen - spec.first_step, counts)
    return Outcome(records + _curve(folder, spec.first_step), str(chosen))


def _run_settings(spec: TrainingSpec, job: Job) -> loop.RunSettings:
    options = job.setup.train
    return loop.RunSettings(
        steps=spec.first_step + spec.steps,
        every=spec.recipe.every,
        config=to_json(spec.info),
        keep_last=job.setup.checkpoint.keep_last,
        divergence=divergence.Settings(options.on_divergence, options.max_rollbacks, options.spike),
    )


def _step_spec(spec: TrainingSpec, job: Job) -> _StepSpec:
    recipe = spec.recipe
    return _StepSpec(
        config=spec.info.model,
        pooling=spec.pooling,
        teacher=spec.teacher,
        schedule=recipe.schedule,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        z_loss=recipe.z_loss,
        seed=recipe.seed,
        num_microbatches=recipe.num_microbatches,
        mesh=job.mesh,
        layout=job.layout,
    )


# Stages that one process does in turn come ordered by network: the last step serves the next stage.
@functools.lru_cache(maxsize=1)
def _compile(spec: _StepSpec) -> tuple[training_step.State, Callable]:
    """Return the state's shapes and placement, and the step, which compiles at its first call."""
    if spec.pooling is None:
        config, view = spec.config, None
        abstract = training_step.abstract(config, spec.mesh, spec.layout)
    else:
        config, view = spec.pooling.running_config, spec.pooling.view
        abstract = spec.pooling.abstract(spec.mesh, spec.layout)

    if spec.schedule == "rsqrt":
        learning_rate = optimizer.rsqrt(spec.warmup, spec.learning_rate)
    else:
        learning_rate = optimizer.constant(spec.learning_rate)
    step = training_step.make_step(
        training_step.make_loss(config, spec.z_loss, spec.teacher),
        learning_rate,
        spec.seed,
        spec.num_microbatches,
        placed=training_step.shardings(abstract),
        view=view,
    )
    return abstract, step


def _records(loss: float, examples: int, steps: int, counts: divergence.Counts) -> list[dict]:
    return [
        record("validation_loss", loss, NATS, n=examples),
        record("steps", steps, "steps"),
        record("loss_spikes", counts.spikes, "times"),
        record("rollbacks", counts.rollbacks, "times"),
    ]


def _curve(folder: StageFolder, first_step: int) -> list[dict]:
    """Return the learning curve as records.

    Uptraining has none, because it may have begun at the end of a shorter uptraining, whose part of
    the curve lies in another folder.
    """
    if first_step:
        return []
    points = distributed.by_primary(lambda: progress.read_curve(folder.curve))
    return [record("learning_curve", loss, NATS, step=step) for step, loss in points]


def _make_progress(
    label: str, job: Job, folder: StageFolder, every: int, step_flops: float, dtype: str
) -> progress.Progress:
    """Return what prints, plots and tracks a training run, under the label that a person knows."""
    tracking, wandb = None, job.setup.wandb
    if wandb.mode != "off":
        # A stage that is resumed goes on in its Weights & Biases run; the same stage in another
        # workdir has a run of its own.
        place = hashlib.sha256(str(folder.path.absolute()).encode()).hexdigest()[:8]
        tracking = progress.Tracking(
            mode=wandb.mode,
            project=wandb.project,
            group=job.setup.run,
            name=label,
            id=f"{folder.name}-{place}",
            folder=job.workdir,
        )
    events = job.events if distributed.is_primary() else None
    return progress.Progress(
        label, events, every, step_flops, peak_flops(dtype), tracking, folder.curve
    )
