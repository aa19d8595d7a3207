"""Let a training stage begin with the checkpoints of a finished one that went the same way.

Two stages go the same way if they differ only in how long they train, or in when and on how many
examples they are validated. The learning rate at a step does not depend on the number of steps, so
that a step of the shorter stage is that step of the longer one, bit for bit. A stage of the same
length that is measured otherwise has nothing left to train, and is only validated again.
"""

import json
import os
import shutil

from experiments.stages.folder import Course, StageFolder
from experiments.workdir import write_whole
from gqa.checkpoints import checksums
from gqa.runtime import distributed
from gqa.runtime.errors import UserError
from gqa.training import progress


def take(folder: StageFolder) -> None:
    """Copy the checkpoints of the longest stage that went the same way, if the folder has none."""
    # A folder with checkpoints is a stage that was interrupted: it goes on from its own.
    course = folder.read_description().course
    if course is None or _steps(folder):
        return
    with distributed.primary_first("head start"):
        if distributed.is_primary():
            _take(folder, course)


def _take(folder: StageFolder, course: Course) -> None:
    # Find the finished stages that this one could have begun as.
    kind = folder.name.partition("-")[0]
    candidates = []
    for sibling in folder.finished_siblings(kind):
        other = _course(sibling)
        if other is None or other.lineage != course.lineage or other.length > course.length:
            continue

        # A fine-tuning keeps its best checkpoint, and validates its last step in any case. If this
        # stage would not validate that step, a better one for this stage may be gone. Example: step
        # 25, the last and best, has displaced step 20, and this stage validates every 10 steps.
        if kind == "finetune" and other.length % course.every:
            continue
        is_measured_alike = other.validation_examples == course.validation_examples
        candidates.append((other.length, is_measured_alike, sibling.name))
    if not candidates:
        return

    # Of the longest candidates, one that was measured alike spares the validations. The name only
    # makes the choice the same every time.
    length, is_measured_alike, name = max(candidates)
    source = folder.sibling(name)
    steps = _steps(source)

    def is_due(step: int) -> bool:
        """Return whether this stage would validate at a step as the other one has done."""
        is_end = length == course.length and step == steps[-1]
        return is_measured_alike and (step % course.every == 0 or is_end)

    # The learning curve has only points that this stage would have measured itself.
    for step in steps:
        _copy(source, folder, step, is_measured=is_due(step))
    points = progress.read_curve(source.curve) if source.curve.exists() else []
    lines = [json.dumps(point) for point in points if is_due(point[0])]
    write_whole(folder.curve, "\n".join(lines))
    print(f"{folder.name}: begins with the checkpoints of {name}", flush=True)


def _course(sibling: StageFolder) -> Course | None:
    """Return the course of another stage; None if another version of this program described it."""
    try:
        return sibling.load_description().course
    except UserError:
        return None


def _steps(folder: StageFolder) -> list[int]:
    names = [path.name for path in folder.checkpoints.glob("*")]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def _copy(source: StageFolder, target: StageFolder, step: int, *, is_measured: bool) -> None:
    """Copy a checkpoint, without its metrics if it is not measured; a kill leaves no half of it."""
    path = target.checkpoints / str(step)
    temporary = path.with_name(f"{step}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source.checkpoints / str(step), temporary, copy_function=_link)

    # The metrics are from a validation that this stage would not make. Without metrics the
    # checkpoint counts as one of an interrupted run: only a place to go on from.
    if not is_measured:
        checksums.amend(temporary, None)
    temporary.rename(path)


def _link(source: str, target: str) -> None:
    """Copy a file of a checkpoint, which nobody writes to, by a second name if that is possible."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
