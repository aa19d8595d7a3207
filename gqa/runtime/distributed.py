"""Run several processes as one program: how they meet, what they agree on, how they end.

Every process runs the same code on its own devices. Whatever needs all processes, such as a step on
a batch that is spread over all devices or a function of this module, must be called by all of them
in the same order. Only process 0, the primary, writes files and prints.
"""

import contextlib
import functools
import json
import os
import re
import socket
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
# Where the primary listens, if the others reach it under an address that its machine does not have.
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
# JAX's names of clusters, each with the variable that tells the processes per node, e.g. 1(x2).
CLUSTERS = {
    "slurm": "SLURM_STEP_TASKS_PER_NODE",
    "ompi": "OMPI_COMM_WORLD_LOCAL_SIZE",
    "gcetpu": None,
    "gketpu": None,
}
MAX_PORT = 65535
PATIENCE = 5.0  # seconds that a process which failed waits for the others to end as well


def initialize() -> None:
    """Join the processes that were started beside this one; do nothing if there are none.

    The processes are described by the environment variables `GIVEN`, or they are the tasks of a
    SLURM step or of Open MPI's mpirun, or one on each host of a TPU slice. This function must be
    called before JAX looks for devices.

    Raises:
        UserError: if the variables say too little, or the other processes cannot be reached.
    """
    how = _given() or _detected()
    if how is None:
        return
    _check_listening(how)

    # JAX's preemption service would take SIGTERM away from `gqa.runtime.signals`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**how)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"the other processes cannot be joined: {said:.200}; set {', '.join(GIVEN)}"
        ) from error

    # All processes run the same code, but every line should be printed once.
    if not is_primary():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open to the end)


def _given() -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize` that the environment gives, if any."""
    address, count, index = (os.environ.get(name) for name in GIVEN)
    if (count, index) == (None, None) or (count, index) == ("1", "0"):
        return None

    count, index = count or "", index or ""
    numbers = all(text.isdecimal() and len(text) < 10 for text in (count, index))
    if not (address and re.fullmatch(r".+:\d{1,5}", address) and numbers):
        raise UserError(f"{', '.join(GIVEN)} go together: HOST:PORT and two numbers")
    if not 0 < int(address.rpartition(":")[2]) <= MAX_PORT:
        raise UserError(f"{GIVEN[0]}={address}: use a port from 1 to {MAX_PORT}")
    return {
        "coordinator_address": address,
        # JAX would listen on every interface, where anybody who reaches it could join.
        "coordinator_bind_address": os.environ.get(BIND, address),
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _check_listening(how: dict[str, Any]) -> None:
    """Refuse an address on which the primary cannot listen; JAX would end the process by a signal.

    Raises:
        UserError: naming the address.
    """
    address = how.get("coordinator_bind_address")
    if address is None or how["process_id"]:
        return
    host, _, port = address.rpartition(":")
    try:
        places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise _not_listening(address, error) from error

    # A name such as localhost has an address for each version of IP, and one of them is enough.
    errors = []
    for family, kind, protocol, _, place in places:
        try:
            with socket.socket(family, kind, protocol) as listener:
                # Else a port of a program that has just ended would count as taken.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(place)
                return
        except OSError as error:
            errors.append(error)
    raise _not_listening(address, errors[-1]) from errors[-1]


def _not_listening(address: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"process 0 cannot listen on {address}: {reason}; set {GIVEN[0]} to an address of this "
        f"machine with a free port, or {BIND} if the others reach it under another one"
    )


def _detected() -> dict[str, Any] | None:
    """Return the arguments with which JAX finds the processes that a cluster started, if any."""
    for cluster in ClusterEnv._cluster_types:
        if cluster.name not in CLUSTERS or not cluster.is_env_present():
            continue
        if cluster.get_process_count() == 1:
            return None

        arguments: dict[str, Any] = {"cluster_detection_method": cluster.name}
        # JAX would give each process a single GPU. A process that is alone on its node takes all.
        processes_per_node = os.environ.get(CLUSTERS[cluster.name] or "", "")
        if re.match(r"1\b", processes_per_node):
            arguments["local_device_ids"] = []
        return arguments
    return None


def is_several() -> bool:
    """Return whether other processes belong to this program."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Return whether this process is the one that writes and prints; a single process is."""
    return not is_several() or jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process has called this function with the same name."""
    if is_several():
        multihost_utils.sync_global_devices(name)


def by_primary(read: Callable[[], Any]) -> Any:
    """Call `read` in the primary, and return in all processes the value that it returned there.

    Args:
        read: returns a value that JSON can hold. A UserError that it raises is raised everywhere.
    """
    if not is_several():
        return read()

    # An error of the primary is sent like a value. Otherwise the others would wait for ever.
    message, error = b"", None
    if is_primary():
        try:
            message = json.dumps({"value": read()}).encode()
        except UserError as raised:
            error, message = raised, json.dumps({"error": str(raised)}).encode()

    # Only arrays of one shape can be broadcast: first the length, then the bytes. The others pass
    # zeros of that length, which the primary's bytes replace.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    sent = np.frombuffer(message or bytes(size), np.uint8)
    received = json.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())
    if error is not None:
        raise error
    if "error" in received:
        raise UserError(received["error"])
    return received["value"]


@contextlib.contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Let the other processes enter after the primary has left, so that they read its files.

    Args:
        name: of this place in the program, the same in all processes.
    """
    # Both calls are the same barrier: the others reach it before their turn, the primary after.
    if not is_primary():
        wait_for_all(name)
    yield
    if is_primary():
        wait_for_all(name)


def gather_states(state: dict) -> dict:
    """Gather a state of JSON values from all processes; `state_of_this_process` undoes it.

    Returns:
        The state itself if it is the same in all processes, else {"processes": the states of all}.
    """
    if not is_several():
        return state
    text = json.dumps(state).encode()
    longest = int(maximum(len(text)))
    # Only arrays of one shape can be gathered. JSON ignores the spaces at the end.
    padded = np.frombuffer(text.ljust(longest), np.uint8)
    states = [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
    return state if all(other == state for other in states) else {"processes": states}


def state_of_this_process(gathered: dict) -> dict:
    """Return this process's state out of the result of `gather_states`.

    Raises:
        UserError: if the state was gathered from another number of processes.
    """
    if "processes" not in gathered:
        return gathered
    states = gathered["processes"]
    if len(states) != jax.process_count():
        raise UserError(
            f"{len(states)} processes each read text of their own up to this checkpoint; go on "
            f"with as many, not with {jax.process_count()}"
        )
    return states[jax.process_index()]


def maximum(values: np.ndarray | int) -> jax.Array | np.ndarray | int:
    """Return the maximum over all processes, elementwise.

    Returns:
        An array that JAX may still be computing: the caller does not wait for the others yet.
    """
    if not is_several():
        return values

    # One row for each device, because an array is spread over devices and not over processes.
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
    """End this process with a status, if it is one of several; do nothing otherwise.

    The status must not wait for the other processes. If they end as well within `PATIENCE` seconds,
    all disconnect in order. If not, this process leaves, and the others stop because it is missing:
    at once if it was the primary or on CPUs, otherwise when JAX notices, after up to 100 seconds.
    """
    if not is_several():
        return

    # `os._exit` would lose what is still buffered. `shutdown` waits for the other processes, which
    # may never end, so a timer ends this one.
    sys.stdout.flush()
    sys.stderr.flush()
    timer = threading.Timer(PATIENCE, os._exit, [status])
    timer.daemon = True
    timer.start()
    jax.distributed.shutdown()
    os._exit(status)
