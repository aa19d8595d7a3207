"""The inputs of a stage: the job that it belongs to, and the checkpoint of a parent stage.

The outcome of a stage is in `folder.py`, the settings that determine it are in `settings.py`.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.stages.settings import LATER, Recipe, Setup
from experiments.stages.text import Text
from experiments.stages.typed_json import from_json
from experiments.stages.variant import Variant
from gqa.checkpoints import checkpoint, step_folders
from gqa.model.config import Config
from gqa.runtime.errors import UserError, renamed_fields
from gqa.runtime.mesh import Layout
from gqa.training import training_step

# The largest size of a network that a checkpoint is believed to have. A damaged number beyond it
# would cost minutes, or all memory, before anything else was found wrong.
LARGEST_SIZE = 10_000_000


@dataclass(frozen=True)
class Job:
    """The text, devices and options that the stages of a run share while one process runs them.

    Args:
        title: the name of the TensorBoard folder of the stage that is run.
    """

    workdir: Path
    setup: Setup
    text: Text
    mesh: Mesh
    layout: Layout
    title: str = ""

    @property
    def events(self) -> Path:
        """The folder in which TensorBoard finds the stage that is run."""
        return self.workdir / "tensorboard" / self.title


@dataclass(frozen=True)
class CheckpointInfo:
    """The description of a checkpoint's network: the JSON beside its arrays.

    Args:
        vocabulary: a hash of the vocabulary that the network was trained with.
        recipe: how it was pretrained or, if there is a `task`, fine-tuned.
        task: the task that it was fine-tuned on.
        head_orders: of each attention whose heads were reordered by a conversion, the order of each
            layer: see `gqa.conversion.Conversion`.
    """

    model: Config
    vocabulary: str
    recipe: Recipe
    variant: Variant
    task: str | None = None
    head_orders: dict[str, list[Any]] | None = None


@dataclass(frozen=True)
class Parent:
    """A checkpoint to start from: the path of its step folder, and the JSON beside its arrays."""

    path: Path
    info: CheckpointInfo

    @property
    def config(self) -> Config:
        """Its network."""
        return self.info.model

    @property
    def step(self) -> int:
        """The training step it was saved at."""
        return int(self.path.name)


def open_parent(path: Path) -> Parent:
    """Read the JSON beside a checkpoint's arrays.

    Args:
        path: a step folder, or a folder of checkpoints, of which the last is taken.

    Raises:
        UserError: naming the first key that is missing, unknown or of another type.
    """
    path = step_folders.find(path)
    values = checkpoint.load_config(path)
    try:
        _check_sizes(values.get("model"))
        if isinstance(values.get("model"), dict):
            values = values | {"model": LATER | values["model"]}
        # `Config` names its own fields in an error; the user looks for the key in the file.
        with renamed_fields("config.model."):
            info = from_json(CheckpointInfo, values, "config")
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}; use a checkpoint of this program") from error
    return Parent(path, info)


def _check_sizes(model: Any) -> None:
    if not isinstance(model, dict):
        return  # `from_json` says so
    for key, value in model.items():
        least = 0 if key.endswith("_token_id") else 1
        if type(value) is int and not least <= value <= LARGEST_SIZE:
            raise UserError(f"config.model.{key} is {value}; use {least} to {LARGEST_SIZE}")


def pretrain_recipe(parent: Parent, job: Job) -> Recipe:
    """Return the recipe of a multi-head parent, measured and split as this run's config says."""
    return replace(parent.info.recipe, **asdict(job.setup.pretrain))


def load_params(parent: Parent, job: Job) -> dict:
    """Load the parameters of a checkpoint, placed as the job's layout says."""
    return _load(parent, job, "params")["params"]


def load_state(parent: Parent, job: Job) -> tuple[training_step.State, dict]:
    """Load all of a checkpoint: the training state, and the place in the data it had reached."""
    items = _load(parent, job, "params", "opt_state", "data")
    return training_step.State(jnp.int32(parent.step), items["params"], items["opt_state"]), items[
        "data"
    ]


def _load(parent: Parent, job: Job, *items: str) -> dict:
    # With another vocabulary every shape may fit, while each token id means another piece of text.
    if parent.info.vocabulary != job.text.tokenizer.hash:
        raise UserError(
            f"checkpoint {parent.path} was trained with another vocabulary than this config's "
            f"text in {job.text.folder}; use the config and workdir it came from"
        )
    # None stands for an item that is JSON: the place in the data has no shape.
    shapes = training_step.abstract(parent.config, job.mesh, job.layout)._asdict() | {"data": None}
    return checkpoint.load(parent.path, {name: shapes[name] for name in items})
