"""The frontend as a process: sockets, signals, its last words."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading

import pytest
from pagewire.config import FrontendConfig

PROGRAM = """
import sys
from pagewire.config import FrontendConfig, ModelConfig, RunConfig
from pagewire.frontend.service import run
from pagewire.process import logs
logs.set_up("info", "text", "frontend")
fd, port, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.exit(run(RunConfig(run_dir=directory), ModelConfig(model="m"), FrontendConfig(host="127.0.0.1", port=port, socket_fd=fd)))
"""


def start(tmp, fd: int = -1, port: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(fd), str(port), str(tmp)]
    return subprocess.Popen(
        command, pass_fds=(fd,) if fd >= 0 else (), stderr=subprocess.PIPE, text=True
    )


def get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


@pytest.fixture
def run_dir():
    with tempfile.TemporaryDirectory(prefix="pw", dir="/tmp") as name:
        yield name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_share_a_socket_and_end_in_order(run_dir, number: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        processes = [start(run_dir, listener.fileno()) for _ in range(2)]
        assert get(port, "/live") == 200 and get(port, "/health") == 503
        for process in processes:
            while "listening" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(number)
        ends = [(process.communicate(timeout=10)[1], process.returncode) for process in processes]
    assert ends == [("", 0), ("", 0)]
    assert not [name for name in os.listdir(run_dir) if name.startswith("frontend")]


def test_a_busy_port_is_one_clear_line(run_dir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(run_dir, port=taken.getsockname()[1])
        port = taken.getsockname()[1]
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and errors.count("\n") == 1
    assert f"127.0.0.1:{port}" in errors and "in use" in errors and "--port" in errors


def is_refused(server) -> bool:
    """Whether new connections are, or further requests on those that are still open."""
    with socket.socket() as client:
        return client.connect_ex((server.http.base_url.host, server.http.base_url.port)) != 0


def test_a_drain_lets_requests_finish_and_takes_no_more(serve) -> None:
    with serve(config=FrontendConfig(shutdown_timeout=20)) as server:
        answers = []
        body = {"prompt": "slow", "max_tokens": 20, "temperature": 0}
        running = threading.Thread(target=lambda: answers.append(server.complete(**body)))
        running.start()
        server.settle(lambda: len(server.owner) == 1)
        closing = threading.Thread(target=server.frontend.close)
        closing.start()
        # Its own port is closed: whoever balances between several finds another one at once.
        server.settle(lambda: is_refused(server))
        running.join(10)
        closing.join(10)
        assert (
            answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 20
        )


def test_a_drain_waits_for_a_search_between_its_rounds(serve) -> None:
    with serve(config=FrontendConfig(shutdown_timeout=20)) as server:
        answers = []
        body = {
            "prompt": "one two",
            "max_tokens": 200,
            "use_beam_search": True,
            "n": 2,
            "ignore_eos": True,
        }
        running = threading.Thread(target=lambda: answers.append(server.complete(**body)))
        running.start()
        server.settle(lambda: bool(server.stack.generates()))
        server.frontend.close()
        running.join(10)
        assert answers[0].status_code == 200, answers[0].text


def test_a_drain_ends_streams_in_words(serve) -> None:
    with serve(config=FrontendConfig(shutdown_timeout=0.3)) as server:
        lines: list[str] = []

        def read() -> None:
            with server.http.stream(
                "POST", "/v1/completions", json={"prompt": "hang", "stream": True}
            ) as answer:
                lines.extend(answer.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        server.settle(lambda: len(server.owner) == 1)
        server.frontend.close()
        reader.join(5)
        assert lines[-2] == "data: [DONE]" and json.loads(lines[-4][6:])["error"]["code"] == 503
        server.settle(lambda: len(server.stack.cancels()) == 1)
