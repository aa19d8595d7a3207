"""The part that the three training stages share."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from experiments.stages.stage import NATS, Job, Outcome, record
from experiments.stages.text import Training
from gqa.checkpoints import checkpoint
from gqa.model.config import Config
from gqa.model.flops import train_flops
from gqa.runtime import distributed
from gqa.runtime.hardware import peak_flops
from gqa.runtime.sharding import Layout, check_batch, put
from gqa.training import divergence, loop, optimizer, progress

CURVE = "curve.jsonl"  # validation losses, in the stage's folder


class Pooling(NamedTuple):
    """What is trained in the place of a network's parameters, for a pooling that is learned.

    Args:
        config: of the network that runs while training.
        whole: of the one whose parameters are expanded.
        expand: makes what is trained from parameters.
        view: (trained, step) -> the parameters to run.
        fold: trained -> the parameters that are left at the end.
    """

    config: Config
    whole: Config
    expand: Callable[[dict], dict]
    view: Callable
    fold: Callable[[dict], dict]

    def abstract(self, mesh: Mesh, layout: Layout) -> loop.State:
        """Shapes and placement of what is trained."""
        return loop.abstract(self.whole, mesh, layout, self.start)

    def start(self, state: loop.State) -> loop.State:
        """The state to train from; only what is new begins without moments."""
        params = self.expand(state.params)
        fresh = optimizer.adafactor().init(params)
        return state._replace(params=params, opt_state=_merged(fresh, state.opt_state))


def _merged(fresh: Any, old: Any) -> Any:
    """`fresh` with whatever `old` has in the same place."""
    if not isinstance(fresh, dict):
        return old
    return {key: _merged(fresh[key], old[key]) if key in old else fresh[key] for key in fresh}


def run_training(
    name: str,
    job: Job,
    folder: Path,
    data: Training,
    *,
    start: Callable[[], loop.State],
    config: Config,
    info: dict,
    recipe: dict,
    learning_rate: Callable,
    first_step: int = 0,
    steps: int,
    keep: str,
    pooling: Pooling | None = None,
    teacher: loop.Teacher | None = None,
    given: tuple = (),
) -> Outcome:
    """`gqa.train.fit`, for `steps` after `first_step`, with what it needs made from settings.

    Args:
        config: of the network that is left at the end, and validated.
        keep: which checkpoint is handed on: "last" or "best".
        pooling: if that network's pooling is learned: `start` gives, and checkpoints hold, what
            `pooling.expand` makes of parameters.
        given: what each step takes after its batch: the parameters of the teacher, if there is one.
    """
    check_batch("batch_size", recipe["batch_size"], recipe["num_microbatches"], job.layout)
    numbers = (recipe[name] for name in ("z_loss", "seed", "num_microbatches"))
    what = (config, pooling, teacher, learning_rate, *numbers)
    abstract, step = _compiled(*what, job.mesh, job.layout)
    running = config if pooling is None else pooling.config
    fold = (lambda params: params) if pooling is None else jax.jit(pooling.fold)
    validation_loss = loop.make_validation(config, job.mesh)
    checkpoints = folder.absolute() / "checkpoints"
    step_flops = train_flops(running, recipe["batch_size"], **data.lengths)
    with _show(name, job, folder, recipe["every"], step_flops, config.dtype) as shown:
        rollbacks = loop.fit(
            lambda: put(start(), loop.shardings(abstract)),
            abstract,
            lambda state, batch: step(state, batch, *given),
            data.batches,
            steps=first_step + steps,
            every=recipe["every"],
            validate=lambda params: validation_loss(fold(params), data.validation()),
            config=info | {"model": config.__dict__, "vocabulary": job.text.tokenizer.hash},
            folder=checkpoints,
            mesh=job.mesh,
            progress=shown,
            mishaps=divergence.Settings(**job.train),
            keep_last=job.keep_last,
        )
    with checkpoint.Checkpoints(checkpoints, job.keep_last) as saved:
        chosen = saved.best if keep == "best" else saved.latest
        loss = saved.metric(chosen)
    records = _records(loss, data.validation_size, chosen - first_step, rollbacks)
    return Outcome(records + _curve(folder, first_step), str(chosen))


# A process that does stages in turn has them in the order of their networks.
@functools.lru_cache(maxsize=1)
def _compiled(
    config: Config,
    pooling: Pooling | None,
    teacher: loop.Teacher | None,
    learning_rate: Callable,
    z_loss: float,
    seed: int,
    num_microbatches: int,
    mesh: Mesh,
    layout: Layout,
) -> tuple[loop.State, Callable]:
    """The state's shapes and placement, and the step, compiled at its first call."""
    if pooling is None:
        abstract, view = loop.abstract(config, mesh, layout), None
    else:
        abstract, view = pooling.abstract(mesh, layout), pooling.view
        config = pooling.config
    loss, placed = loop.make_loss(config, z_loss, teacher), loop.shardings(abstract)
    step = loop.make_step(loss, learning_rate, seed, num_microbatches, placed=placed, view=view)
    return abstract, step


def _records(loss: float, examples: int, steps: int, rollbacks: int) -> list[dict]:
    records = [record("validation_loss", loss, NATS, n=examples), record("steps", steps, "steps")]
    return records + ([record("rollbacks", rollbacks, "times")] if rollbacks else [])


def _curve(folder: Path, first_step: int) -> list[dict]:
    """The learning curve; of uptraining none, since it may begin where a shorter one ended."""
    if first_step:
        return []
    points = distributed.by_primary(lambda: progress.read_curve(folder / CURVE))
    return [record("learning_curve", loss, NATS, step=step) for step, loss in points]


def _show(
    name: str, job: Job, folder: Path, every: int, step_flops: float, dtype: str
) -> progress.Progress:
    """What shows a training run, under names that a person knows again."""
    tracking = None
    if job.wandb and job.wandb["mode"] != "off":
        # The same for the same folder, and no other's.
        place = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]
        tracking = progress.Tracking(
            **job.wandb,
            group=job.run_name,
            name=name,
            id=f"{folder.name}-{place}",
            folder=job.workdir,
        )
    events = None
    if distributed.is_primary():
        events = job.workdir / "tensorboard" / (job.title or folder.name)
    return progress.Progress(
        name, events, every, step_flops, peak_flops(dtype), tracking, folder / CURVE
    )
