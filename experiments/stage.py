"""What a stage is given and what it leaves; the part that the three training stages share."""

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.text import Text, Training
from gqa import checkpoint, model, train
from gqa.errors import UserError
from gqa.flops import train_flops
from gqa.hardware import peak_flops
from gqa.progress import Progress
from gqa.sharding import replicate

DONE = "done.json"
DONE_KEYS = {"records", "checkpoint", "provenance", "seconds"}


def make_workdir(workdir: Path) -> None:
    """Raise a UserError unless there is, or can be, such a folder."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {error.strerror}; use a folder to write to"
        ) from error


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a file's lock; `what` it guards is for one process at a time.

    The lock goes with the process, however that ends.

    Raises:
        UserError: if another process has it, saying which.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{what} is in use by {file.read().strip() or 'another process'}; wait for it, "
                "stop it, or use another --workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{path}: no lock ({error.strerror}); start no second process", flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a file by another name first: a reader sees all of it or the one before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Job(NamedTuple):
    """What all stages of a run share."""

    workdir: Path
    text: Text
    mesh: Mesh
    keep_last: int


class Outcome(NamedTuple):
    """Results of a stage: records for results.jsonl and, if it trained, a checkpoint's name."""

    records: list[dict]
    checkpoint: str | None = None


def record(metric: str, value: float, unit: str, **more) -> dict[str, Any]:
    """One number of a stage; `more` may be low, high, n, task or variant."""
    return {"metric": metric, "value": value, "unit": unit, **more}


def finish(folder: Path, outcome: Outcome, provenance: dict, seconds: float | None) -> dict:
    """Write `done.json`: with it a stage is finished, without it not."""
    done = {**outcome._asdict(), "provenance": provenance, "seconds": seconds}
    write_whole(folder / DONE, json.dumps(done, indent=1))
    return done


def read_done(folder: Path) -> dict | None:
    """What `finish` wrote, or None.

    Raises:
        UserError: if that is not what the file holds.
    """
    path = folder / DONE
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(done, dict) or not done.keys() >= DONE_KEYS:
            raise ValueError("keys are missing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged; remove it to do the stage's last part again"
        ) from error
    return done


class Parent(NamedTuple):
    """A checkpoint to start from: its path, its network and the JSON beside its parameters."""

    path: Path
    config: model.Config
    info: dict


def open_parent(path: Path) -> Parent:
    """Read what a checkpoint says of itself."""
    path = checkpoint.find(path)
    info = checkpoint.load_config(path)
    return Parent(path, model.Config(**info["model"]), info)


def load_params(parent: Parent, job: Job) -> dict:
    """The parameters of a checkpoint on every device."""
    return _load(parent, job, "params")["params"]


def load_state(parent: Parent, job: Job) -> tuple[train.State, dict]:
    """All of a checkpoint: the training state, and where in the data it was."""
    items = _load(parent, job, "params", "opt_state", "data")
    step = jnp.int32(int(parent.path.name))
    return train.State(step, items["params"], items["opt_state"]), items["data"]


def _load(parent: Parent, job: Job, *items: str) -> dict:
    if parent.info["vocabulary"] != job.text.tokenizer.hash:
        raise UserError(
            f"checkpoint {parent.path} was trained with another vocabulary than this config's "
            f"text in {job.text.folder}; use the config and workdir it came from"
        )
    shapes = train.abstract(parent.config, job.mesh)._asdict() | {"data": None}
    return checkpoint.load(parent.path, {name: shapes[name] for name in items})


def run_training(
    name: str,
    job: Job,
    folder: Path,
    data: Training,
    *,
    start: Callable[[], train.State],
    config: model.Config,
    info: dict,
    recipe: dict,
    learning_rate: Callable,
    first_step: int = 0,
    steps: int,
    keep: str,
) -> Outcome:
    """`gqa.train.fit`, for `steps` after `first_step`, with what it needs made from settings.

    `keep` says which checkpoint is handed on: "last" or "best".
    """
    loss = train.make_loss(config, recipe["z_loss"])
    validation_loss = train.make_validation(config, job.mesh)
    step = train.make_step(loss, learning_rate, recipe["seed"], recipe["num_microbatches"])
    checkpoints = folder / "checkpoints"
    events = job.workdir / "tensorboard" / folder.name
    info = info | {"model": config.__dict__, "vocabulary": job.text.tokenizer.hash}
    step_flops = train_flops(config, recipe["batch_size"], **data.lengths)
    peak = peak_flops(config.dtype)
    with Progress(name, events, recipe["every"], step_flops, peak) as progress:
        train.fit(
            lambda: replicate(start(), job.mesh),
            train.abstract(config, job.mesh),
            step,
            data.batches,
            steps=first_step + steps,
            every=recipe["every"],
            validate=lambda params: validation_loss(params, data.validation()),
            config=info,
            folder=checkpoints,
            mesh=job.mesh,
            progress=progress,
            keep_last=job.keep_last,
        )
    with checkpoint.Checkpoints(checkpoints, job.keep_last) as saved:
        chosen = saved.best if keep == "best" else saved.latest
        value = saved.metric(chosen)
    records = [
        record("validation_loss", value, "nats per token", n=data.validation_size),
        record("steps", chosen - first_step, "steps"),
    ]
    jax.clear_caches()  # compiled steps of one network are no use to the next stage
    return Outcome(records, str(chosen))
