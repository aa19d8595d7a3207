"""Checkpoints on disk: the only file that knows Orbax.

A checkpoint is a step folder with separate items: params, opt_state, data (the iterator's state)
and config (JSON: the network, and whatever its writer adds). An unfinished save has another name
and is never seen as a step.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from gqa.errors import UserError


class Checkpoints:
    """The checkpoints of one training run: the last `keep_last` and the best are kept."""

    def __init__(self, folder: Path, keep_last: int = 1, best: str = "validation_loss"):
        policies = ocp.training.preservation_policies
        self._best = best
        self._orbax = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep_last),
                    policies.BestN(get_metric_fn=lambda m: m[best], reverse=True, n=1),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """The last step saved, or None."""
        return self._orbax.latest.step if self._orbax.latest else None

    @property
    def best(self) -> int | None:
        """The step with the lowest `best` metric, the later one if equal; or None."""
        steps = self._orbax.checkpoints
        return min(steps, key=lambda s: (s.metrics[self._best], -s.step)).step if steps else None

    def metric(self, step: int) -> float:
        """The `best` metric of a saved step."""
        return next(s.metrics[self._best] for s in self._orbax.checkpoints if s.step == step)

    def save(self, step: int, items: dict[str, Any], metrics: dict[str, float]) -> None:
        """Start saving the items of a step; returns before the files are written."""
        self._orbax.save_checkpointables_async(step, items, force=True, metrics=metrics)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The items of a step, arrays placed as in `abstract`; None there loads JSON."""
        return _load(Path(self._orbax.directory) / str(step), abstract)


def find(path: str | Path) -> Path:
    """The step folder that `path` means: itself, or the last step in it.

    Raises:
        UserError: if there is no finished checkpoint.
    """
    path = Path(path).absolute()
    if (path / "params").is_dir():
        return path
    steps = [p for p in path.glob("*") if p.name.isdigit() and (p / "params").is_dir()]
    if not steps:
        raise UserError(f"no checkpoint in {path}; name a step folder (with params/) or its parent")
    return max(steps, key=lambda p: int(p.name))


def load_config(path: str | Path) -> dict:
    """The config item (JSON) of a checkpoint."""
    return _load(find(path), {"config": None})["config"]


def load(path: str | Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Items of a checkpoint, e.g. only params, placed as in `abstract`; None there loads JSON.

    Raises:
        UserError: naming the first parameters that are missing, extra or of another shape.
    """
    step = find(path)
    if "params" in abstract:
        _check_shapes(step, abstract["params"])
    return _load(step, abstract)


def _load(step: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    return ocp.load_checkpointables(step, abstract)


def _check_shapes(step: Path, expected: Any) -> None:
    """Compare names and shapes before Orbax does: its message would not name the parameter."""
    metadata = ocp.metadata(step, "params").metadata
    have, want = _shapes(metadata), _shapes(expected)
    lines = [f"- {n} {have[n]}" for n in have if want.get(n) != have[n]]
    lines += [f"+ {n} {want[n]}" for n in want if have.get(n) != want[n]]
    if lines:
        more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise UserError(
            f"checkpoint {step} does not fit the config (- is in it, + is expected): "
            + ", ".join(lines[:6])
            + more
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape) for p, x in leaves}


class Damaged(UserError):
    pass
