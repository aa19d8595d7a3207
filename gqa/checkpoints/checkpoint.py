"""Checkpoints on disk: the only file that knows Orbax.

A checkpoint is a step folder (step_folders.py). Its items are arrays, `params` and `opt_state`,
and JSON in Orbax's metadata: `config` (the network, and what its writer adds), `data` (the state of
the data iterator) and `guard` (the state of the divergence check). Orbax gives an unfinished save
another name, so it is never taken for a step.

A finished checkpoint gets a seal (checksums.py), and nothing is read before its files have been
compared with the seal. Several processes save together into one folder; only the primary process
seals, renames and deletes, and tells the others which steps there are.

Signals are deferred while Orbax runs, because Orbax would wrap the exception that a signal raises
in an error of its own.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from gqa.checkpoints import checksums, orbax_metadata, pieces, step_folders, stored_arrays
from gqa.runtime import distributed, hardware, signals
from gqa.runtime.errors import (
    CheckpointError,
    DamagedCheckpoint,
    UserError,
    reporting_full_disk,
)
from gqa.runtime.sharding import local_bytes, share_copies

# The items that are arrays; all others are JSON.
ARRAYS = ("params", "opt_state")


class Checkpoints:
    """The checkpoints of one training run.

    A checkpoint with metrics is a result of the run: the last `keep_last` of them and the best are
    kept. One without metrics comes from an interrupted run; it is kept to resume from until the
    next one with metrics is saved.
    """

    def __init__(self, folder: Path, keep_last: int = 1, best: str = "validation_loss"):
        step_folders.check_path(folder)
        self._folder, self._keep_last, self._best = folder.absolute(), keep_last, best
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pending: Future | None = None
        self._metrics = dict(_by_primary(self._open))

        # A thread of its own finishes the save under way, while training goes on.
        self._pool = ThreadPoolExecutor(1, "checkpoint")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        expected = kind is None or issubclass(kind, UserError) or not issubclass(kind, Exception)
        if distributed.is_several() and not expected:
            # The error may follow from the end of another process. A save under way would wait for
            # that process for ever.
            self._pool.shutdown(wait=False)
            return
        try:
            if kind is None:
                self.wait()
            # After an error the other processes may not come to the barrier of `wait`, so each
            # completes its own part of the save alone.
            elif self._pending is not None:
                self._pending.result()
        finally:
            self._pool.shutdown()

    def _open(self) -> list[tuple[int, dict[str, float] | None]]:
        """Tidy up after a kill; return each step and its metrics."""
        step_folders.clear(self._folder)
        steps = step_folders.finished(self._folder)

        # The kill may have come between the last save and its seal.
        if steps and not checksums.is_sealed(steps[-1]):
            checksums.write(steps[-1], None)
        metrics = [(int(step.name), checksums.metrics(step)) for step in steps]

        # The best checkpoint could not be found among metrics that lack the one it is chosen by.
        for step, values in metrics:
            if values is not None and self._best not in values:
                raise DamagedCheckpoint(self.path(step), f"its metrics have no {self._best}")

        return metrics

    def wait(self) -> None:
        """Wait until the last save is finished and sealed; raise its error if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            distributed.wait_for_all("checkpoint saved")

    @property
    def latest(self) -> int | None:
        """The last step saved, or None."""
        self.wait()
        return max(self._metrics, default=None)

    @property
    def measured(self) -> int | None:
        """The last step saved with metrics, or None."""
        self.wait()
        return max(self._results(), default=None)

    @property
    def best(self) -> int | None:
        """The step with the lowest `best` metric, the later one if equal; or None."""
        self.wait()
        return self._find_best()

    def path(self, step: int) -> Path:
        """Return the folder of a step."""
        return self._folder / str(step)

    def metric(self, step: int) -> float:
        """Return the `best` metric of a step that was saved with metrics."""
        self.wait()
        return self._metrics[step][self._best]

    def save(
        self, step: int, items: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        """Start saving the items of a step; return before the files are written.

        Raises:
            OutOfDiskError: when the disk is full, here or in `wait`; earlier checkpoints stay.
        """
        self.wait()
        path = self.path(step)

        arrays = {name: value for name, value in items.items() if name in ARRAYS}
        text = {name: value for name, value in items.items() if name not in ARRAYS}

        # Where each process has a copy of an array, only one process writes it.
        if distributed.is_several():
            arrays = share_copies(arrays)

        with signals.deferred(), _reporting_full_disk(path):
            response = ocp.save_checkpointables_async(path, arrays, custom_metadata=text)
            self._pending = self._pool.submit(self._finish, step, response, metrics)

    def write(self, step: int, source: pieces.Source, items: dict[str, Any]) -> None:
        """Save the parameters of a source block by block, and the other items.

        The checkpoint has no metrics yet. Returns when all files are written.

        Raises:
            OutOfDiskError: when the disk is full; earlier checkpoints stay.
        """
        self.wait()
        path = self.path(step)

        # A kill leaves this name, which `step_folders.clear` deletes.
        unfinished = path.with_name(f"{step}.tmp")

        arrays = {name: value for name, value in items.items() if name in ARRAYS}
        text = {name: value for name, value in items.items() if name not in ARRAYS}
        # Orbax writes its metadata for arrays of one number each; the blocks then replace these.
        arrays["params"] = pieces.placeholders(source)
        with _reporting_full_disk(path):
            with signals.deferred():
                ocp.save_checkpointables(unfinished, arrays, custom_metadata=text)
            if distributed.is_primary():
                for name in source.chunks:
                    pieces.write(source, name, unfinished / "params")
                checksums.write(unfinished, None)
                unfinished.rename(path)
        distributed.wait_for_all("write")

        self._metrics[step] = None

    def measure(self, step: int, metrics: dict[str, float]) -> None:
        """Give metrics to a step that was saved without."""
        self.wait()
        path = self.path(step)

        with _reporting_full_disk(path):
            if distributed.is_primary():
                checksums.amend(path, metrics)
        self._metrics[step] = metrics
        self._tidy()

    def discard_after(self, step: int | None) -> None:
        """Delete all checkpoints after a step, or all if `step` is None."""
        self.wait()
        self._delete([s for s in self._metrics if step is None or s > step])

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Return items of a step: arrays placed as in `abstract`, JSON where that has None."""
        self.wait()
        return _load(self.path(step), abstract)

    def _finish(self, step: int, response: Any, metrics: dict[str, float] | None) -> None:
        """Wait for Orbax in a thread of its own, seal the checkpoint, and delete old ones."""
        path = self.path(step)
        with _reporting_full_disk(path):
            response.result()
            if distributed.is_primary():
                checksums.write(path, metrics)
        self._metrics[step] = metrics
        self._tidy()

    def _results(self) -> dict[int, dict[str, float]]:
        return {step: values for step, values in self._metrics.items() if values is not None}

    def _find_best(self) -> int | None:
        results = self._results()
        return min(results, key=lambda s: (results[s][self._best], -s), default=None)

    def _tidy(self) -> None:
        """Delete every checkpoint but the last results, the best, and the one to resume from."""
        # The last step of all is the one to resume from, with or without metrics.
        keep = {*sorted(self._results())[-self._keep_last :], self._find_best(), max(self._metrics)}
        self._delete([step for step in self._metrics if step not in keep])

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            if distributed.is_primary():
                step_folders.delete(self.path(step))
            del self._metrics[step]


def load_config(path: str | Path) -> dict:
    """Return the JSON item `config` of a checkpoint.

    Raises:
        CheckpointError: if there is none.
        DamagedCheckpoint: when a file is not as it was saved.
    """
    return load(path, {"config": None})["config"]


def load(path: str | Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Return items of a checkpoint.

    Args:
        abstract: by the names of the items that are wanted: for arrays a tree of
            `jax.ShapeDtypeStruct` with shardings, which say where to place them; for JSON, None.

    Raises:
        CheckpointError: naming the first parameters that are missing, extra or of another shape,
            or one that is not finite.
        DamagedCheckpoint: when a file is not as it was saved.
    """
    step = step_folders.find(path)
    items = _load(step, abstract)
    _check_finite(step, {name: items[name] for name in ARRAYS if name in items})
    return items


def _load(step: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Load as `load` does, also numbers that are not finite.

    Training resumes from these, because its divergence check knows how to go back.
    """
    # The arrays that are wanted have a tree of shapes; the JSON items have None.
    arrays = {name: tree for name, tree in abstract.items() if tree is not None}
    _by_primary(lambda: checksums.verify(step, arrays))

    metadata = orbax_metadata.read(step)
    names = [name for name in abstract if name not in arrays]
    text = {name: orbax_metadata.json_item(step, metadata, name) for name in names}

    # Formats, names and shapes are small to read. They are checked before any number is.
    for name, tree in arrays.items():
        _by_primary(functools.partial(orbax_metadata.check, step, metadata, name))
        with _reading(step):
            _by_primary(functools.partial(stored_arrays.check_headers, step / name))
        _check_shapes(step, name, tree)
    nbytes = sum(map(local_bytes, jax.tree.leaves(arrays)))
    hardware.check_memory(nbytes, f"checkpoint {step}")

    # Nothing has been decompressed so far. The files could still hold far more than the shapes say.
    for name, tree in arrays.items():
        most = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        with _reading(step):
            _by_primary(functools.partial(stored_arrays.check_all, step / name, most))
    with signals.deferred(), _reading(step):
        return text | (ocp.load_checkpointables(step, arrays) if arrays else {})


@contextlib.contextmanager
def _reading(step: Path) -> Iterator[None]:
    """Raise a CheckpointError for any error of Orbax or TensorStore while they read.

    The seal has shown that the files are as they were saved. If they cannot be read nevertheless,
    another program saved them. Orbax logs a warning of each such error before it raises the error;
    these warnings are silenced.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {step} cannot be read; use one that this program saved. "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        logger.setLevel(level)


def _check_finite(step: Path, items: dict[str, Any]) -> None:
    """Refuse NaN and infinite numbers before anything is computed with them."""
    leaves = {name: x for name, x in _leaves(items).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    # One program for all arrays. Its results are on all processes, so all of them raise.
    finite = jax.jit(lambda arrays: {name: jnp.isfinite(x).all() for name, x in arrays.items()})
    for name, is_finite in finite(leaves).items():
        if not is_finite:
            raise CheckpointError(
                f"checkpoint {step}: {name} has NaN or infinite numbers; use another checkpoint"
            )


def _by_primary(read: Callable[[], Any]) -> Any:
    """Call `distributed.by_primary`, but raise a DamagedCheckpoint as such in all processes."""

    def tell() -> dict:
        try:
            return {"value": read()}
        except DamagedCheckpoint as damaged:
            return {"step": str(damaged.step), "fault": damaged.fault}

    # As an exception it would be a plain UserError in the other processes, and callers that repair
    # damage would not catch it.
    told = distributed.by_primary(tell)
    if "fault" in told:
        raise DamagedCheckpoint(Path(told["step"]), told["fault"])
    return told["value"]


def _reporting_full_disk(path: Path) -> contextlib.AbstractContextManager:
    """Raise an OutOfDiskError for a disk that fills up while checkpoint `path` is saved."""
    return reporting_full_disk(f"saving checkpoint {path}", "earlier checkpoints are intact")


def _check_shapes(step: Path, item: str, expected: Any) -> None:
    """Compare names, shapes and kinds of numbers; Orbax's message would not name the parameter."""
    with signals.deferred(), _reading(step):
        metadata = ocp.metadata(step, item).metadata
        if metadata is None:
            raise ValueError(f"the arrays of {item} are not those of its metadata")
        have, want = _described(metadata), _described(expected)

    lines = [f"- {n} {have[n]}" for n in have if want.get(n) != have[n]]
    lines += [f"+ {n} {want[n]}" for n in want if have.get(n) != want[n]]
    if lines:
        more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise CheckpointError(
            f"checkpoint {step} does not fit the config (- is in it, + is expected): "
            + ", ".join(lines[:6])
            + more
        )


def _described(tree: Any) -> dict[str, str]:
    """Return the shape of every array in a tree by its path; with the dtype, unless it is floating.

    Orbax would silently convert whole numbers to floating ones, so their dtypes must agree.
    """
    texts = {}
    for name, x in _leaves(tree).items():
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        texts[name] = f"{tuple(x.shape)}" if floating else f"{tuple(x.shape)} {x.dtype}"
    return texts


def _leaves(tree: Any) -> dict[str, Any]:
    """Return every array in a tree by its path, such as "decoder/norm/scale"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
