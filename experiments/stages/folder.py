"""A stage's folder: its files, the description of the stage, and the outcome of the stage.

    WORKDIR/stages/KIND-KEY/
        stage.json           the description: settings, parents, and what does not determine results
        lock                 held by the process that works on the stage
        checkpoints/STEP/    of a stage that trains or converts
        curve.jsonl          validation losses of a stage that trains
        predictions.jsonl    of a stage that scores
        learned/             a folder like this one, for an uptraining that learns its pooling
        done.json            the outcome; a stage is finished if and only if this file is there

No other module names these files.
"""

import contextlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.stages.settings import SETTINGS, Setup
from experiments.stages.typed_json import from_json, to_json
from experiments.workdir import write_whole
from gqa.runtime import distributed
from gqa.runtime.errors import UserError
from gqa.runtime.regular_files import read_json

NATS = "nats per token"  # the unit of every loss
# The largest stage.json or done.json that is read. Ten predictions and the replicates of a
# bootstrap have less than one megabyte.
MAX_BYTES = 2**26


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage: the contents of done.json.

    Args:
        records: numbers for results.jsonl, each made by `record`.
        checkpoint: name of the step folder that is handed on; None if the stage makes none.
        provenance: commit, device and time; empty until the stage is finished.
        seconds: how long the stage took; None if it was interrupted and resumed.
    """

    records: list[dict[str, Any]]
    checkpoint: str | None = None
    provenance: dict[str, str] | None = None
    seconds: float | None = None


def record(metric: str, value: float, unit: str, **extra: Any) -> dict[str, Any]:
    """Return one number of a stage; `extra` may be low, high, n, step, task or variant."""
    return {"metric": metric, "value": value, "unit": unit, **extra}


@dataclass(frozen=True)
class Course:
    """The lineage of a training stage, its length, and when it is validated.

    Args:
        lineage: a hash of all that determines the parameters at a step, but not of the steps.
        length: training steps, or alpha for an uptraining.
        every: steps between validations.
        validation_examples: how many examples a validation has at most.
    """

    lineage: str
    length: float
    every: int
    validation_examples: int


@dataclass(frozen=True)
class Description:
    """All that a worker needs to know of a stage: the contents of stage.json.

    Args:
        task: the task that the stage fine-tunes on or scores, if any.
        label: what a person calls the stage.
        title: the label as a folder's name, for TensorBoard.
        settings: an instance of `SETTINGS[kind]`.
        parents: names of the folders of the stages that this one builds on.
        texts: the hash of each text that the stage reads, as its key promises it: by
            TASK/training, for the splits train and validation, or TASK/test.
        course: of a stage that trains, from which a longer one may go on.
    """

    kind: str
    key: str
    task: str | None
    label: str
    title: str
    settings: Any
    setup: Setup
    parents: tuple[str, ...]
    texts: dict[str, str]
    course: Course | None


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage."""

    path: Path

    @classmethod
    def of(cls, workdir: Path, kind: str, key: str) -> "StageFolder":
        """Return the folder of the stage with this kind and key."""
        return cls(workdir / "stages" / f"{kind}-{key}")

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """KIND-KEY."""
        return self.path.name

    @property
    def workdir(self) -> Path:
        """The workdir that the stage belongs to."""
        return self.path.parent.parent

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are saved, each in a folder named by its step."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """The file that a process at work on the stage has locked."""
        return self.path / "lock"

    @property
    def curve(self) -> Path:
        """Validation losses by step."""
        return self.path / "curve.jsonl"

    @property
    def predictions(self) -> Path:
        """The network's answer to each example."""
        return self.path / "predictions.jsonl"

    @property
    def learned(self) -> "StageFolder":
        """The folder in which uptraining trains a network whose pooling is learned."""
        return StageFolder(self.path / "learned")

    @property
    def is_begun(self) -> bool:
        """Return whether there are checkpoints to go on from."""
        return self.checkpoints.exists()

    @property
    def _description_file(self) -> Path:
        return self.path / "stage.json"

    @property
    def _outcome_file(self) -> Path:
        return self.path / "done.json"

    def sibling(self, name: str) -> "StageFolder":
        """Return the folder of another stage of the same workdir by its name."""
        return StageFolder(self.path.parent / name)

    def finished_siblings(self, kind: str) -> list["StageFolder"]:
        """Return the folders of all finished stages of a kind in the same workdir.

        A stage whose outcome is damaged is not finished. This process reads alone.
        """
        finished = []
        for path in sorted(self.path.parent.glob(f"{kind}-*/{self._outcome_file.name}")):
            with contextlib.suppress(UserError):
                folder = StageFolder(path.parent)
                finished += [folder] if folder.load_outcome() else []
        return finished

    def write_description(self, description: Description) -> None:
        """Make the folder and write stage.json."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}; use a --workdir to write to"
            ) from error
        write_whole(self._description_file, json.dumps(to_json(description), indent=1))

    def read_description(self) -> Description:
        """Read stage.json in the primary process, and return its contents in every process.

        Raises:
            UserError: if it does not describe a stage of this program.
        """
        # Processes send each other JSON, so a description is taken apart to send it and made anew.
        values = distributed.by_primary(lambda: to_json(self.load_description()))
        return self._parse_description(values)

    def load_description(self) -> Description:
        """Do what `read_description` does, in this process alone."""
        try:
            values = read_json(self._description_file, MAX_BYTES)
        except UserError as error:
            raise UserError(f"{error}; it should be the description of a stage") from error
        return self._parse_description(values)

    def _parse_description(self, values: Any) -> Description:
        try:
            description = from_json(Description, values, "stage")
            kind = description.kind
            if kind not in SETTINGS:
                raise UserError(f"stage.kind is {kind!r}; use one of {', '.join(SETTINGS)}")
            # These become paths, which must not lead out of the workdir.
            for field, names in (("parents", description.parents), ("title", [description.title])):
                for name in names:
                    if not _is_plain_name(name):
                        raise UserError(
                            f"stage.{field} has {name!r:.80}, which is no name of a folder"
                        )
            # The type of `settings` depends on the kind, so `from_json` above has left them a dict.
            settings = from_json(SETTINGS[kind], description.settings, "stage.settings")
        except UserError as error:
            raise self._not_a_description(error) from error
        return replace(description, settings=settings)

    def _not_a_description(self, error: Exception) -> UserError:
        return UserError(f"{self._description_file}: not the description of a stage: {error}")

    def write_outcome(self, outcome: Outcome) -> None:
        """Write done.json: from then on the stage is finished."""
        write_whole(self._outcome_file, json.dumps(to_json(outcome), indent=1))

    def read_outcome(self) -> Outcome | None:
        """Read done.json in the primary, and return it in every process; None if there is none.

        Raises:
            UserError: if the file does not hold an outcome.
        """
        values = distributed.by_primary(self.load_outcome)
        return None if values is None else Outcome(**values)

    def load_outcome(self) -> dict[str, Any] | None:
        """Read done.json in this process alone, and return the fields of the outcome."""
        path = self._outcome_file
        # A link that leads nowhere is damage, whereas `exists` would say that nothing is there.
        if not os.path.lexists(path):
            return None

        try:
            values = read_json(path, MAX_BYTES)
            _check_outcome(from_json(Outcome, values, "outcome"))
        except UserError as error:
            raise UserError(
                f"{path} is damaged; remove it to do the stage's last part again"
            ) from error
        return values

    def discard_outcome(self) -> None:
        """Delete done.json, so that the stage is to be done again from its last checkpoint."""
        if distributed.is_primary():
            self._outcome_file.unlink(missing_ok=True)

    def result(self) -> Path:
        """Return the path of the checkpoint that the finished stage hands on.

        Raises:
            UserError: if the stage is not finished.
        """
        outcome = self.read_outcome()
        if outcome is None or outcome.checkpoint is None:
            raise UserError(f"the stage in {self} is not finished; run it first")
        return self.checkpoints / outcome.checkpoint


def _is_plain_name(name: str) -> bool:
    """Return whether a name is that of a file in a folder, and not a path that leads elsewhere."""
    return name not in ("", ".", "..") and not {"/", "\0"} & {*name}


def _check_outcome(outcome: Outcome) -> None:
    """Refuse values that no stage leaves; the types of the fields are right."""
    # This name becomes a path, which must not lead out of the folder of checkpoints.
    step = outcome.checkpoint
    if step is not None and not (step.isascii() and step.isdecimal()):
        raise UserError(f"outcome.checkpoint is {step!r:.80} instead of the name of a step")

    # JSON as Python reads it may hold NaN and infinity, which no time is.
    if outcome.seconds is not None and not 0 <= outcome.seconds < math.inf:
        raise UserError(f"outcome.seconds is {outcome.seconds}")

    # Records are dicts of any keys. The report needs these three, and True would pass for a number.
    for entry in outcome.records:
        number, words = entry.get("value"), [entry.get("metric"), entry.get("unit")]
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not all(isinstance(word, str) for word in words):
            raise UserError("outcome.records has an entry without metric, value and unit")
