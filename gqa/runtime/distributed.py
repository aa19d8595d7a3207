"""Several processes as one program: how they find each other, what they agree on, how they end.

Every process runs the same code on its own devices. What needs all of them, a step on a batch that
is spread over all devices or a function here, they do in the same order. The primary alone writes
files and prints.
"""

import contextlib
import functools
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src.clusters import ClusterEnv  # JAX asks these, but only says so by failing
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gqa.runtime.errors import UserError

GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# JAX's names of clusters, and what says how many processes there are on each node, e.g. 1(x2).
CLUSTERS = {
    "slurm": "SLURM_STEP_TASKS_PER_NODE",
    "ompi": "OMPI_COMM_WORLD_LOCAL_SIZE",
    "gcetpu": None,
    "gketpu": None,
}
PATIENCE = 5.0  # seconds that a process which failed waits for the others to end as well


def initialize() -> None:
    """Join the processes started beside this one, before JAX looks for devices; else do nothing.

    They are what the variables `GIVEN` say, the tasks of a SLURM step, those of Open MPI's mpirun,
    or one on each host of a TPU slice.

    Raises:
        UserError: where the variables say too little, or the others cannot be reached.
    """
    how = _given() or _detected()
    if how is None:
        return
    # JAX's own preemption service would take SIGTERM away from `gqa.interrupt`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**how)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"the other processes cannot be joined: {said:.200}; set {', '.join(GIVEN)}"
        ) from error
    if not is_primary():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the end)


def _given() -> dict[str, Any] | None:
    """What the environment says of the processes."""
    address, count, index = (os.environ.get(name) for name in GIVEN)
    if (count, index) == (None, None) or (count, index) == ("1", "0"):
        return None
    count, index = count or "", index or ""
    if not (address and count.isdecimal() and index.isdecimal()):
        raise UserError(f"{', '.join(GIVEN)} go together: HOST:PORT and two numbers")
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _detected() -> dict[str, Any] | None:
    """How JAX is to find the processes of a cluster, where it started several."""
    for cluster in ClusterEnv._cluster_types:
        if cluster.name not in CLUSTERS or not cluster.is_env_present():
            continue
        if cluster.get_process_count() == 1:
            return None
        found: dict[str, Any] = {"cluster_detection_method": cluster.name}
        a_node = os.environ.get(CLUSTERS[cluster.name] or "", "")
        if re.match(r"1\b", a_node):
            found["local_device_ids"] = []  # all; JAX would give each process a single GPU
        return found
    return None


def is_several() -> bool:
    """Whether there is any other process."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Whether this is the process that writes and prints; a single one is."""
    return not is_several() or jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Return when every process has come to `what`."""
    if is_several():
        multihost_utils.sync_global_devices(what)


def by_primary(read: Callable[[], Any]) -> Any:
    """What `read` gives the primary, as JSON; all processes return that, or raise its UserError."""
    if not is_several():
        return read()
    said, failed = b"", None
    if is_primary():
        try:
            said = json.dumps({"value": read()}).encode()
        except UserError as error:
            failed, said = error, json.dumps({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    letters = np.frombuffer(said or bytes(size), np.uint8)
    told = json.loads(multihost_utils.broadcast_one_to_all(letters).tobytes())
    if failed is not None:
        raise failed
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


@contextlib.contextmanager
def primary_first(what: str) -> Iterator[None]:
    """Let the others do what is inside after the primary, and find what that has written."""
    if not is_primary():
        wait_for_all(what)
    yield
    if is_primary():
        wait_for_all(what)


def joined(state: dict) -> dict:
    """What each process has, as JSON: one for all where it is the same, else {"processes": all}."""
    if not is_several():
        return state
    said = json.dumps(state).encode()
    longest = int(maximum(len(said)))
    letters = np.frombuffer(said.ljust(longest), np.uint8)
    states = [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(letters)]
    return state if all(other == state for other in states) else {"processes": states}


def own(joined_state: dict) -> dict:
    """This process's part of what `joined` gave.

    Raises:
        UserError: where that was of another number of processes.
    """
    if "processes" not in joined_state:
        return joined_state
    states = joined_state["processes"]
    if len(states) != jax.process_count():
        raise UserError(
            f"{len(states)} processes each read text of their own up to this checkpoint; go on "
            f"with as many, not with {jax.process_count()}"
        )
    return states[jax.process_index()]


def maximum(values: np.ndarray | int) -> jax.Array | np.ndarray | int:
    """The largest over all processes, of each element; an array that is not waited for."""
    if not is_several():
        return values
    spread, reduce = _maximum()
    values = np.asarray(values, np.int32)
    rows = np.broadcast_to(values, (jax.local_device_count(), *values.shape))
    return reduce(jax.make_array_from_process_local_data(spread, rows))


@functools.cache
def _maximum() -> tuple[NamedSharding, Callable]:
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    spread, everywhere = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (["all"], []))
    return spread, jax.jit(lambda x: x.max(axis=0), out_shardings=everywhere)


def leave(status: int) -> None:
    """End this one of several processes with a status, which must not wait for the others.

    If they end as well, all do in order. If not, they stop since this one is missing: at once when
    it is the primary or on CPUs, else within JAX's 100 seconds.
    """
    if not is_several():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    timer = threading.Timer(PATIENCE, os._exit, [status])
    timer.daemon = True
    timer.start()
    jax.distributed.shutdown()
    os._exit(status)
