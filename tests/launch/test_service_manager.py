"""systemd is told when the stack serves, that it lives, and that it stops."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Stack
from e2e.test_stack_life import FAKE
from pagewire.process.service_manager import ServiceManager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        yield listener


def test_a_stack_under_a_service_manager(manager: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "400000"}
    stack = Stack(*FAKE, "--host", "127.0.0.1", "--port", "0", environment=environment).wait_ready()
    said = [manager.recv(4096).decode()]
    while not said[-1].startswith("READY=1"):
        assert said[-1] == "WATCHDOG=1"
        said.append(manager.recv(4096).decode())
    assert "\nSTATUS=serving " in said[-1]
    assert manager.recv(4096) == b"WATCHDOG=1" == manager.recv(4096)
    stack.process.terminate()
    while said[-1] != "STOPPING=1":
        said.append(manager.recv(4096).decode())
    stack.end()


def test_nothing_is_sent_that_nobody_wants(manager: socket.socket) -> None:
    ServiceManager({}).say("READY=1")
    ServiceManager({"NOTIFY_SOCKET": "/no/such/socket"}).say("READY=1")
    other: dict[str, Any] = {
        "NOTIFY_SOCKET": manager.getsockname(),
        "WATCHDOG_USEC": "1000000",
        "WATCHDOG_PID": str(os.getpid() + 1),
    }
    ServiceManager(other).tick(100.0)
    mine = ServiceManager(other | {"WATCHDOG_PID": str(os.getpid())})
    for now in (100.0, 100.1, 100.6):
        mine.tick(now)
    manager.settimeout(0.05)
    assert [manager.recv(99), manager.recv(99)] == [b"WATCHDOG=1"] * 2
    with pytest.raises(TimeoutError):
        manager.recv(99)
