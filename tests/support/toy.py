"""A training run of a few numbers, for what the loop does around its steps: it compiles at once."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gqa.checkpoints.checkpoint import Checkpoints
from gqa.runtime import distributed, sharding
from gqa.runtime.mesh import make_mesh
from gqa.training import loop, training_step
from gqa.training.divergence import Settings
from gqa.training.progress import Progress


class Batches:
    """An endless stream that is a function of its position; `poison` is added to some losses.

    Of several processes each has its rows; and if `apart` a state of its own.
    """

    def __init__(self, poison=None, apart=False):
        self.position, self.poison = 0, poison or {}
        self.own = {"process": [jax.process_index()] * (1 + jax.process_index())} if apart else {}

    def __next__(self):
        self.position += 1
        x = np.random.default_rng(self.position).normal(size=(4, 8)).astype(np.float32)
        poison = np.full(4, self.poison.get(self.position, 0.0), np.float32)
        rows = slice(jax.process_index(), None, jax.process_count())
        return {"x": x[rows], "poison": poison[rows]}

    def get_state(self):
        return {"position": self.position} | self.own

    def set_state(self, state):
        self.position = state["position"]
        assert state == self.get_state()


def replicated(tree, mesh):
    """A copy of every array on every device; each process gives the same arrays."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return sharding.put(tree, jax.tree.map(lambda _: whole, tree))


def start():
    return training_step.State(jnp.int32(0), {"w": jnp.zeros(8)}, {"m": jnp.zeros(8)})


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, batch):
    w, m = state.params["w"], 0.9 * state.opt_state["m"]
    m += w - batch["x"].mean(axis=0) + batch["poison"].mean()
    loss = jnp.square(w[None] - batch["x"]).mean() + batch["poison"].mean()
    names = ("accuracy", "learning_rate", "input_tokens", "tokens")
    metrics = dict.fromkeys(names, jnp.float32(1)) | {"loss": loss}
    return training_step.State(state.step + 1, {"w": w - 0.1 * m}, {"m": m}), metrics


def validate(params):
    return float(jnp.square(params["w"] - 0.1).sum())


def abstract_state():
    def placed(x):
        replicated = jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

    return jax.tree.map(placed, jax.eval_shape(start))


def fit(
    folder: Path,
    steps: int,
    every: int,
    *,
    poison=None,
    settings=Settings(spike=0.0),  # noqa: B008
    keep_last=2,
    validate=validate,
    alive=lambda step: None,
    apart=False,
):
    """Train in `folder`; `alive` is called with every step whose metrics were read."""

    class Watched(Progress):
        def step(self, number, metrics):
            super().step(number, metrics)
            alive(number)

    events = folder / "events" if distributed.is_primary() else None
    with Watched("toy", events, every, 1.0, None) as progress:
        computation = loop.Computation(
            start=lambda: replicated(start(), make_mesh()),
            abstract_state=abstract_state(),
            train_step=train_step,
            validate=validate,
            mesh=make_mesh(),
        )
        run_settings = loop.RunSettings(steps, every, {"model": {}}, keep_last, settings)
        batches = Batches(poison, apart)
        return loop.fit(computation, run_settings, batches, folder / "checkpoints", progress)


def outcome(folder: Path) -> dict:
    """All that a run leaves: every checkpoint's contents, metrics, and which is the best."""
    state = abstract_state()
    items = {"params": state.params, "opt_state": state.opt_state, "data": None, "guard": None}
    with Checkpoints(folder / "checkpoints", 2) as saved:
        steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
        found = {s: jax.tree.map(np.asarray, saved.restore(s, items)) for s in steps}
        metrics = {step: saved.metric(step) for step in steps}
        return {"checkpoints": found, "metrics": metrics, "best": saved.best, "last": saved.latest}


def assert_same(found: dict, expected: dict) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)
