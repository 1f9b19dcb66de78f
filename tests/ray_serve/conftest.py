"""The application on a Ray cluster of its own, for all tests of this folder."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MARK = "PAGEWIRE_TEST_CLUSTER"
"""A variable of all processes of a cluster, by which they are known."""
COMMAND_S = 240.0
"""Beside other tests, on two cores, Ray takes its time."""
END_S = 20.0
OUT = "answer: "
PREFIX = "/llm"
STACK = {
    "device": "fake",
    "skip_tokenizer_init": True,
    "fake_vocab_size": 1000,
    "fake_step_ms": 20,
    "num_frontends": 1,
    "num_tokenizers": 1,
    "watchdog_timeout": 20,
    "graceful_shutdown_wait_loop_s": 0.2,
    "ingress": {"num_replicas": 1, "graceful_shutdown_wait_loop_s": 0.2},
}

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings():
        # Ray and what it brings use old names of pydantic.
        warnings.simplefilter("ignore")
        import pagewire.ray  # noqa: F401


class Cluster:
    """The program of cluster.py."""

    def __init__(self) -> None:
        # The paths of Ray's sockets, which begin with this, must be shorter than 108 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="pw-ray-", dir="/tmp"))
        self._log = (self.directory / "log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("cluster.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                MARK: str(self.directory),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_SERVE_LOG_TO_STDERR": "0",
            },
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}{PREFIX}"
        self._port = port

    def start(self) -> None:
        """Start Ray, and the application with one replica."""
        self.do("start", str(self.directory), self._port)
        self.deploy(1)

    def do(self, command: str, *arguments: Any) -> Any:
        """What the command returns."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(COMMAND_S, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith(OUT):
                    return json.loads(line.removeprefix(OUT))
        finally:
            timer.cancel()
        raise AssertionError(f"{command} failed:\n{self.log()}")

    def deploy(self, num_replicas: int) -> None:
        self.do("deploy", {**STACK, "num_replicas": num_replicas}, PREFIX)

    def log(self) -> str:
        return (self.directory / "log").read_text()[-6000:]

    def end(self) -> None:
        """End the cluster. Raises AssertionError where one of its processes goes on."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        end = time.monotonic() + END_S
        while (left := processes(self.directory)) and time.monotonic() < end:
            time.sleep(0.05)
            self._process.poll()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self._process.wait(END_S)
        self._process.stdout.close()
        self._log.close()
        log = self.log()
        shutil.rmtree(self.directory, ignore_errors=True)
        assert not left, f"{len(left)} processes had to be killed: {left.values()}\n{log}"


def processes(directory: Path) -> dict[int, str]:
    """The processes of a cluster with their command lines."""
    mark = f"{MARK}={directory}".encode()
    alive: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    alive[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    return alive


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()
