"""What groups whose ranks are Ray actors are tested on: a stand-in for Ray, and, by request, clusters
of Ray nodes on this machine."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parent / "stand_in"
START_S = 120.0
on_cluster = pytest.mark.skipif(
    not os.environ.get("PAGEWIRE_TEST_RAY_CLUSTER"),
    reason="a Ray cluster needs a machine for itself: set PAGEWIRE_TEST_RAY_CLUSTER=1",
)


def with_stand_in(**variables: str) -> dict[str, str]:
    """An environment in which the stand-in is Ray."""
    path = os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, **variables}


@contextlib.contextmanager
def cluster(*cpus: int) -> Iterator[dict[str, str]]:
    """A cluster of nodes with so many CPUs each, the first of which is this machine's; the
    variables by which a driver finds it."""
    directory = tempfile.mkdtemp(prefix="pw-ray-", dir="/tmp")
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        head = ("--head", "--port=0", "--include-dashboard=false", f"--temp-dir={directory}")
        log = Path(directory, "log-0")
        nodes.append(_start_node(log, variables, cpus[0], "127.0.0.1", *head))
        address = _wait_for(r"--address='([\d.:]+)'", log, nodes[0])[1]
        for number, count in enumerate(cpus[1:], 1):
            log = Path(directory, f"log-{number}")
            # Ray takes 127.0.0.1 for the machine's other address.
            own = f"127.0.0.{1 + number}"
            nodes.append(_start_node(log, variables, count, own, f"--address={address}"))
            _wait_for("Ray runtime started", log, nodes[-1])
        yield {**variables, "RAY_ADDRESS": address}
    finally:
        for node in reversed(nodes):
            _end_node(node)
        shutil.rmtree(directory, ignore_errors=True)


def _start_node(
    log: Path, variables: dict[str, str], cpus: int, address: str, *flags: str
) -> "subprocess.Popen[bytes]":
    command = [
        str(Path(sys.executable).with_name("ray")), "start", f"--num-cpus={cpus}", "--num-gpus=0",
        f"--node-ip-address={address}", "--object-store-memory=100000000", "--block", *flags,
    ]  # fmt: skip
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,
        )


def _wait_for(pattern: str, log: Path, node: "subprocess.Popen[bytes]") -> "re.Match[str]":
    end = time.monotonic() + START_S
    while not (match := re.search(pattern, log.read_text())):
        assert node.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    return match


def _end_node(node: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGTERM)
        try:
            node.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait(10)
