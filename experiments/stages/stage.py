"""What a stage is given and what it leaves."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.stages.network import network_config
from experiments.stages.text import Text
from experiments.workdir import write_whole
from gqa.checkpoints import checkpoint
from gqa.model.config import Config
from gqa.runtime import distributed
from gqa.runtime.errors import UserError
from gqa.runtime.sharding import WHOLE, Layout
from gqa.training import divergence, loop

NATS = "nats per token"  # the unit of every loss
DONE = "done.json"
DONE_KEYS = {"records", "checkpoint", "provenance", "seconds"}
# What a checkpoint's config (JSON) says beside `model`, and with what type.
INFO = {"vocabulary": str, "recipe": dict, "variant": dict, "task": str, "orders": dict}
JSON = {int | tuple[int, ...]: int | list}  # types that JSON does not have
OPTIONAL = ("task", "orders")
MOST = 10_000_000  # of any one thing in a network
RECIPE = {
    **dict.fromkeys(("steps", "batch_size", "num_microbatches", "every", "seed"), int),
    **dict.fromkeys(("inputs_length", "targets_length", "validation_examples"), int),
    **dict.fromkeys(("z_loss", "dropout_rate"), float),
    "task": str,
}


class Job(NamedTuple):
    """What all stages of a run share; some are sections of the config as dicts.

    `title` names the TensorBoard folder of the stage that is run; empty: as its own folder.
    """

    workdir: Path
    text: Text
    mesh: Mesh
    keep_last: int
    layout: Layout = WHOLE
    train: dict = divergence.Settings()._asdict()
    wandb: dict | None = None
    run_name: str = ""
    title: str = ""


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
    return distributed.by_primary(lambda: _read_done(folder / DONE))


def _read_done(path: Path) -> dict | None:
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
    config: Config
    info: dict


def open_parent(path: Path) -> Parent:
    """Read what a checkpoint says of itself.

    Raises:
        UserError: naming the first key that is missing, unknown or of another type.
    """
    path = checkpoint.find(path)
    info = checkpoint.load_config(path)
    _check_types(path, "config", info, {**INFO, "model": dict}, OPTIONAL)
    types = {f.name: JSON.get(f.type, f.type) for f in dataclasses.fields(Config)}
    _check_types(path, "config.model", info["model"], types)
    for key, value in info["model"].items():
        if types[key] is int and not 1 <= value <= MOST:
            raise UserError(f"checkpoint {path}: config.model.{key} is {value}; use 1 to {MOST}")
    recipe = {key: value for key, value in info["recipe"].items() if key in RECIPE}
    _check_types(path, "config.recipe", recipe, RECIPE)
    return Parent(path, network_config(info["model"], {}), info)


def _check_types(
    path: Path, name: str, values: dict, types: dict[str, type], optional: tuple[str, ...] = ()
) -> None:
    for key in sorted(values.keys() | types.keys()):
        if key not in types:
            problem = "is unknown"
        elif key not in values and key not in optional:
            problem = "is missing"
        elif key in values and not _is_a(values[key], types[key]):
            problem = f"is {values[key]!r:.40} instead of a value of type {_named(types[key])}"
        else:
            continue
        raise UserError(
            f"checkpoint {path}: {name}.{key} {problem}; use a checkpoint of this program"
        )


def _named(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _is_a(value: Any, kind: type) -> bool:
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def load_params(parent: Parent, job: Job) -> dict:
    """The parameters of a checkpoint where the job's layout has them."""
    return _load(parent, job, "params")["params"]


def load_state(parent: Parent, job: Job) -> tuple[loop.State, dict]:
    """All of a checkpoint: the training state, and where in the data it was."""
    items = _load(parent, job, "params", "opt_state", "data")
    step = jnp.int32(int(parent.path.name))
    return loop.State(step, items["params"], items["opt_state"]), items["data"]


def _load(parent: Parent, job: Job, *items: str) -> dict:
    if parent.info["vocabulary"] != job.text.tokenizer.hash:
        raise UserError(
            f"checkpoint {parent.path} was trained with another vocabulary than this config's "
            f"text in {job.text.folder}; use the config and workdir it came from"
        )
    shapes = loop.abstract(parent.config, job.mesh, job.layout)._asdict() | {"data": None}
    return checkpoint.load(parent.path, {name: shapes[name] for name in items})
