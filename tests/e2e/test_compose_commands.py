"""The commands of the compose services, run as processes: the entry point, flags and health checks
of the images, without an engine."""

import contextlib
import http.client
import http.server
import json
import os
import re
import runpy
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pagewire.commands import doctor_container
from pagewire.hub import huggingface
from pagewire_protocol.structs import Peer, Role

ROOT = Path(__file__).parents[2]
TLS = ROOT / "tests" / "api" / "tls"
PATIENCE_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def interpolate(text: str, environment: dict[str, str]) -> str:
    """${NAME:-default} as compose reads it."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: environment.get(m[1]) or m[2], text)


class Stack:
    """The services of compose/default.yaml as children of the test."""

    def __init__(self, run_dir: str, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        bin_dir = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PAGEWIRE_RUN_DIR": run_dir,
            "PORT": str(port),
            "PATH": f"{bin_dir}:{os.environ['PATH']}",
        }
        self.settings = Path(run_dir) / "settings.yaml"
        self.settings.write_text(
            yaml.safe_dump({"max_model_len": 512, "max_num_seqs": 7, "num_workers": 3})
        )
        variables = {"MODEL": str(huggingface.demo_gguf()), "DEVICE": "fake"}
        self.services: dict[str, Any] = yaml.safe_load(
            interpolate((ROOT / "compose/default.yaml").read_text(), variables)
        )["services"]

    def start(self, service: str, *more: str) -> subprocess.Popen[bytes]:
        """As the image does: its entry point with the compose file's command. Later flags win over
        earlier ones."""
        words = [
            "sh",
            str(ROOT / "compose/entrypoint.sh"),
            service,
            *(self._here(word) for word in self.services[service]["command"]),
            "--shutdown-delay=0.3",
            *more,
        ]
        own = {
            name: value or ""
            for name, value in self.services[service]["environment"].items()
            if name.startswith("PAGEWIRE_")
        }
        return subprocess.Popen(words, env={**self.environment, **own})

    def _here(self, word: str) -> str:
        name, _, value = word.partition("=")
        return f"{name}={self.settings}" if name == "--config" else f"{name}={value}"

    def up(self) -> None:
        self.children["frontend"] = self.start(
            "frontend", "--host=127.0.0.1", f"--port={self.port}"
        )
        for service in ("tokenizer", "scheduler", "worker"):
            self.children[service] = self.start(service)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            dead = {
                name: child.returncode
                for name, child in self.children.items()
                if child.poll() is not None
            }
            assert not dead, f"ended: {dead}"
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise AssertionError("not ready in time")

    def complete(self, prompt: str) -> dict[str, Any]:
        body = json.dumps(
            {
                "model": self.model(),
                "prompt": prompt,
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
            }
        ).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def model(self) -> str:
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=10) as answer:
            return json.load(answer)["data"][0]["id"]

    def health(self, service: str) -> subprocess.CompletedProcess[str]:
        """The command of the service's health check."""
        _, _, *words = self.services[service]["healthcheck"]["test"]
        program = ["bash", str(ROOT / "compose/health.sh"), *words]
        return subprocess.run(
            program, env=self.environment, capture_output=True, text=True, timeout=30
        )

    def end(self, name: str) -> int:
        child = self.children.pop(name)
        child.send_signal(signal.SIGTERM)
        return child.wait(timeout=20)

    def down(self) -> None:
        for child in self.children.values():
            child.kill()
        for child in self.children.values():
            child.wait()


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="pw-") as run_dir:
        stack = Stack(run_dir, free_port())
        try:
            stack.up()
            stack.wait_ready()
            yield stack
        finally:
            stack.down()


def test_a_completion_goes_through_all_four(stack: Stack) -> None:
    answer = stack.complete("hello")
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"
    assert stack.complete("hello")["choices"] == answer["choices"]


@pytest.mark.parametrize("service", ["frontend", "tokenizer", "scheduler", "worker"])
def test_the_health_checks_pass(stack: Stack, service: str) -> None:
    until(lambda: stack.health(service).returncode == 0)  # a line is written once a second


def test_each_service_takes_its_own_of_the_settings_file(stack: Stack) -> None:
    """The tokenizer refuses what does not fit the file's max_model_len, which the worker has taken
    from it; num_workers is for another command."""
    with pytest.raises(urllib.error.HTTPError) as refusal:
        stack.complete("word " * 600)
    assert refusal.value.code == 400 and "512" in refusal.value.read().decode()


@pytest.mark.parametrize("service", ["frontend", "tokenizer", "scheduler", "worker"])
def test_an_unknown_setting_in_the_file_is_an_error_in_all(tmp_path: Path, service: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("max_model_length: 3\n")
    program = [sys.executable, "-m", "pagewire", service, f"--config={file}"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "unknown setting max_model_length; did you mean max-model-len?" in result.stderr


def test_a_health_check_leaves_no_socket_behind(stack: Stack) -> None:
    sockets = set(Path(stack.environment["PAGEWIRE_RUN_DIR"]).glob("*.sock"))
    assert stack.health("worker").returncode == 0
    assert set(Path(stack.environment["PAGEWIRE_RUN_DIR"]).glob("*.sock")) == sockets


def test_a_second_tokenizer_takes_over_while_the_stack_serves(stack: Stack) -> None:
    """`--scale tokenizer=2`, then the first container is stopped."""
    before = stack.complete("take over")["choices"]
    stack.children["second"] = stack.start("tokenizer", "--name=tokenizer-second")
    deadline = time.monotonic() + PATIENCE_S
    while "tokenizer-second" not in ready_tokenizers(stack):
        assert time.monotonic() < deadline, "the second tokenizer did not get ready"
        time.sleep(0.1)
    assert stack.end("tokenizer") == 0
    assert stack.complete("take over")["choices"] == before
    assert stack.health("tokenizer").returncode == 1, "this container's tokenizer is gone"


def ready_tokenizers(stack: Stack) -> list[str]:
    """What the scheduler lists, asked for as `pagewire doctor` does in a container."""
    peers = doctor_container.ask_scheduler(stack.environment["PAGEWIRE_RUN_DIR"]) or ()
    return [peer.name for peer in peers if peer.ready and peer.role is Role.TOKENIZER]


def listed(stack: Stack) -> dict[str, Peer]:
    """What the scheduler lists, by name."""
    peers = doctor_container.ask_scheduler(stack.environment["PAGEWIRE_RUN_DIR"]) or ()
    return {peer.name: peer for peer in peers}


def until(holds: Callable[[], Any]) -> Any:
    """Wait until it holds, and return what it is."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def asked(port: int, path: str) -> tuple[int, str]:
    """The status of a GET, and its header Connection; status 0 where nothing listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Connection", "")
    except OSError:
        return 0, ""
    finally:
        connection.close()


def test_a_frontend_that_is_told_to_end_serves_on_and_says_so(stack: Stack) -> None:
    """A balancer sees it in /accepting at once; whoever still comes is served; then the port is
    closed."""
    port = free_port()
    flags = ("--name=frontend-second", "--host=127.0.0.1", f"--port={port}", "--shutdown-delay=1.5")
    frontend = stack.start("frontend", *flags)
    try:
        until(lambda: asked(port, "/ready")[0] == 200)
        assert asked(port, "/accepting") == (200, "")
        frontend.send_signal(signal.SIGTERM)
        until(lambda: asked(port, "/accepting")[0] == 404)
        assert asked(port, "/ready")[0] == 503 and asked(port, "/live")[0] == 200
        assert asked(port, "/v1/models") == (200, "close")
        body = json.dumps({"prompt": "late", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
        until(lambda: asked(port, "/live")[0] == 0)
        assert frontend.wait(30) == 0
    finally:
        frontend.kill()
        frontend.wait()


def test_new_requests_wait_for_the_successor_of_an_only_worker(stack: Stack) -> None:
    """Which was stopped in order, as `docker compose restart worker` does."""
    before = stack.complete("successor")["choices"]
    answers: list[Any] = []
    assert stack.end("worker") == 0
    thread = threading.Thread(target=lambda: answers.append(stack.complete("successor")))
    thread.start()
    until(lambda: any("was stopped" in peer.stage for peer in listed(stack).values()))
    stack.children["worker"] = stack.start("worker")
    thread.join(PATIENCE_S)
    assert [answer["choices"] for answer in answers] == [before]


def test_a_second_scheduler_is_a_spare_that_takes_over(stack: Stack) -> None:
    before = stack.complete("spare")["choices"]
    spare = stack.start("scheduler", "--name=scheduler-spare")
    line = Path(stack.environment["PAGEWIRE_RUN_DIR"]) / "health-scheduler-spare"
    until(lambda: line.exists() and "ok, as a spare" in line.read_text())
    assert spare.poll() is None
    counted = scheduler_tokens(stack)
    assert counted > 0
    assert stack.end("scheduler") == 0
    stack.children["scheduler"] = spare
    assert stack.complete("spare")["choices"] == before
    until(lambda: scheduler_tokens(stack) > counted)


def scheduler_tokens(stack: Stack) -> float:
    """A count of the scheduler's, which no change of schedulers takes back."""
    with urllib.request.urlopen(f"{stack.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.search(r"^pagewire:scheduler_generation_tokens_total{.*} (\S+)$", text, re.M)
    assert found
    return float(found[1])


def test_why_a_service_cannot_start_is_listed(stack: Stack) -> None:
    """By the scheduler, and from there in /ready, `/` and the health check; each life counts."""
    name = "tokenizer-broken"
    for _ in range(2):
        broken = stack.start("tokenizer", f"--name={name}", "--model=/models/nope")
        assert broken.wait(60) == 1
    stage = until(lambda: (peer := listed(stack).get(name)) and peer.stage)
    assert stage.startswith("could not start: /models/nope does not exist"), stage
    assert stage.endswith("2 times"), stage


@pytest.fixture(scope="module")
def https_port() -> Iterator[int]:
    """Of a server that answers /live, over TLS alone."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/live" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "variables",
    [
        {
            "PAGEWIRE_SSL_CERTFILE": str(TLS / "cert.pem"),
            "PAGEWIRE_SSL_KEYFILE": str(TLS / "key.pem"),
        },
        {},
    ],
    ids=["by variables", "by flags"],
)
@pytest.mark.parametrize("name", ["PORT", "PAGEWIRE_PORT"])
def test_the_health_of_a_frontend_with_a_certificate(
    https_port: int, variables: dict[str, str], name: str
) -> None:
    ports = {"PAGEWIRE_PORT": "tcp://10.0.0.1:80", name: str(https_port)}
    result = http_health(variables | ports)
    assert result.returncode == 0, result.stdout + result.stderr


class Unready:
    """An HTTPS connection to a frontend whose stack is loading."""

    status = 503

    def request(self, method: str, path: str) -> None:
        assert (method, path) == ("GET", "/ready")

    def getresponse(self) -> "Unready":
        return self

    def read(self, size: int) -> bytes:
        return b"loading weights"


def test_a_frontend_with_a_certificate_that_is_not_ready_is_not_well() -> None:
    ask = runpy.run_path(str(ROOT / "compose" / "health_tls.py"))["ask"]
    assert ask(Unready(), "/ready") == "/ready answered 503: loading weights"


def test_health_without_a_frontend_is_one_line() -> None:
    result = http_health({"PORT": str(free_port())})
    assert result.returncode == 1
    assert result.stdout.startswith("nothing listens on port ") and not result.stderr
    assert result.stdout.count("\n") == 1


def http_health(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = ["bash", str(ROOT / "compose/health.sh"), "http"]
    variables["PAGEWIRE_HEALTH_TLS"] = str(ROOT / "compose/health_tls.py")
    kept = {key: value for key, value in os.environ.items() if not key.endswith("PORT")}
    return subprocess.run(program, env=kept | variables, capture_output=True, text=True, timeout=30)


def test_health_says_what_is_wrong_without_a_scheduler() -> None:
    with tempfile.TemporaryDirectory(prefix="pw-") as run_dir:
        environment = {**os.environ, "PAGEWIRE_RUN_DIR": run_dir}
        program = ["bash", str(ROOT / "compose/health.sh"), "scheduler"]
        result = subprocess.run(
            program, env=environment, capture_output=True, text=True, timeout=30
        )
    assert result.returncode == 1
    assert "has not started yet" in result.stdout


def test_every_service_ends_in_order_on_sigterm(stack: Stack) -> None:
    """Last, since nothing is left afterwards."""
    codes = {name: stack.end(name) for name in list(stack.children)}
    assert set(codes.values()) == {0}, codes
    with pytest.raises(urllib.error.URLError):
        stack.model()
