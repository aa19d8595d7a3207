"""What one process says of itself, and which others it is told of."""

import socket

import jax
import pytest

from gqa.runtime import distributed
from gqa.runtime.errors import UserError


@pytest.mark.parametrize(
    ("address", "count", "index", "joined"),
    [
        (None, None, None, None),
        (None, "1", "0", None),  # a single process needs nobody
        ("host:1", "1", "0", None),
        ("host:1", None, None, None),
        ("host:1", "2", "0", (2, 0)),
        ("host:1", "12", "11", (12, 11)),
        ("host:1", "2", "1", (2, 1)),
    ],
)
def test_the_environment_says_who_is_joined(monkeypatch, address, count, index, joined):
    for name, value in zip(distributed.GIVEN, (address, count, index), strict=True):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    found = distributed._given()
    if joined is None:
        assert found is None
        return
    assert (found["num_processes"], found["process_id"]) == joined
    assert found["coordinator_address"] == found["coordinator_bind_address"] == address
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "inside:2")
    assert distributed._given()["coordinator_bind_address"] == "inside:2"
    assert found["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize("port", [0, 65536, 99999])
def test_a_port_that_there_is_not_is_refused(monkeypatch, port):
    for name, value in zip(distributed.GIVEN, (f"127.0.0.1:{port}", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"ADDRESS=127.0.0.1:{port}: use a port from 1 to 65535"):
        distributed._given()


def test_an_address_on_which_nobody_can_listen_is_refused(monkeypatch):
    """JAX would end the process with a segmentation fault."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        addresses = ["host.invalid:1234", "192.0.2.1:1234", "no host:1234", f"127.0.0.1:{port}"]
        for address in addresses:
            how = {"coordinator_bind_address": address, "process_id": 0}
            with pytest.raises(UserError, match=f"process 0 cannot listen on {address}: .*; set"):
                distributed._check_listening(how)
            distributed._check_listening(how | {"process_id": 1})
    distributed._check_listening(how)
    distributed._check_listening(how | {"coordinator_bind_address": f"localhost:{port}"})


def test_a_single_process_is_the_primary_and_waits_for_nobody():
    assert distributed.is_primary()
    assert not distributed.is_several()
    distributed.wait_for_all("nothing")
    assert distributed.by_primary(lambda: 7) == 7
    assert distributed.maximum(5) == 5
    state = {"position": 3}
    assert distributed.gather_states(state) is state
    with distributed.primary_first("nothing"):
        pass


def test_a_process_takes_its_own_part(monkeypatch):
    states = {"processes": [{"position": n} for n in (4, 5, 6)]}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert distributed.state_of_this_process(states) == {"position": 4 + index}
        assert distributed.state_of_this_process({"position": 1}) == {"position": 1}
    for count in (1, 2, 4):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        with pytest.raises(UserError, match=rf"^3 processes each .* not with {count}$"):
            distributed.state_of_this_process(states)
