"""Stacks to test against: `pagewire serve` as a process of its own, as a user starts it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

START_S = 90.0
SERVE = ("-m", "pagewire", "serve", "--host", "127.0.0.1", "--port", "0")
KINDS = ("frontend", "tokenizer", "scheduler", "worker")


class Stack:
    """A running `pagewire serve`. Its lines are kept, so that a failing test can show them."""

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        command: tuple[str, ...] = SERVE,
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._came:
                self.lines.append(line.rstrip())
                self._came.notify_all()
        with self._came:
            self.lines.append("<end>")
            self._came.notify_all()

    def wait_line(self, text: str, timeout_s: float = START_S) -> str:
        def found() -> str | None:
            return next((line for line in self.lines if text in line or line == "<end>"), None)

        with self._came:
            assert self._came.wait_for(found, timeout_s), f"no line with {text!r}:\n" + "\n".join(
                self.lines
            )
            line = found()
        assert line is not None and line != "<end>", (
            f"the stack ended before {text!r}:\n" + "\n".join(self.lines)
        )
        return line

    def wait_ready(self) -> "Stack":
        self.url = self.wait_line(" at http").rpartition(" at ")[2]
        return self

    def children(self) -> dict[int, str]:
        """Process id -> kind of service, of the services that live."""
        return children_of(self.process.pid)

    def pid(self, kind: str) -> int:
        return next(pid for pid, name in self.children().items() if name == kind)

    def matchers(self, kind: str) -> list[int]:
        """The process ids of the matcher processes of the services of a kind."""
        services = [pid for pid, name in self.children().items() if name == kind]
        pids: list[int] = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    is_matcher = "pagewire.grammar.process" in (entry / "cmdline").read_text()
                    if is_matcher and fields[0] != "Z" and int(fields[1]) in services:
                        pids.append(int(entry.name))
        return pids

    def run_dir(self) -> Path:
        pid = next(iter(self.children()))
        flags = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return Path(next(flag for flag in flags if flag.startswith("--run-dir=")).partition("=")[2])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.url, api_key="EMPTY", max_retries=0, timeout=60, **options
        )

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=10) as answer:
            return json.load(answer)

    def wait_serving(self, timeout_s: float = 30.0) -> None:
        """Until /health says 200 again."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(
                    self.url.removesuffix("/v1") + "/health", timeout=5
                ) as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise AssertionError("the stack did not come back:\n" + "\n".join(self.lines))

    def end(self) -> int:
        """The exit code. Raises AssertionError where a service was sent what it could not decode,
        for services only send what fits, and where one has failed by a fault of its own."""
        code = self._end()
        dropped = [line for line in self.lines if "cannot be decoded" in line]
        assert not dropped, dropped
        failed = next((i for i, line in enumerate(self.lines) if "Traceback" in line), None)
        assert failed is None, "\n".join(self.lines[max(0, failed - 1) : failed + 40])
        return code

    def _end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self._reader.join(5)
            if self.process.stdout is not None:
                self.process.stdout.close()


def children_of(parent: int) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_text().split("\0")
                kind = next((word for word in words if word in KINDS), "")
                # Between fork and exec a child has the command line of its parent.
                if int(after_name[1]) == parent and after_name[0] != "Z" and kind:
                    found[int(entry.name)] = kind
    return found


def gone(pids: list[int], within_s: float) -> bool:
    """Whether all these processes end in time."""
    end = time.monotonic() + within_s
    while any(_lives(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="session")
def start_stack() -> Iterator[Callable[..., Stack]]:
    """A function that starts a stack with the given flags; all are ended with the session."""
    stacks: list[Stack] = []

    def start(*arguments: str, environment: dict[str, str] | None = None) -> Stack:
        stacks.append(Stack(*arguments, environment=environment))
        return stacks[-1]

    yield start
    with contextlib.ExitStack() as each:
        for stack in stacks:
            each.callback(stack.end)


@pytest.fixture(scope="session")
def fake_stack(start_stack: Callable[..., Stack]) -> Stack:
    """Token ids in and out, a hash for a model."""
    one_each = ("--num-frontends", "1", "--num-tokenizers", "1")
    fake = (
        "--device",
        "fake",
        "--skip-tokenizer-init",
        "--fake-vocab-size",
        "1000",
        "--fake-step-ms",
        "2",
    )
    return start_stack(*fake, *one_each).wait_ready()


@pytest.fixture(scope="session")
def demo_stack(start_stack: Callable[..., Stack]) -> Stack:
    """The demo model on the CPU."""
    return start_stack("--max-model-len", "2048", "--max-num-seqs", "16").wait_ready()


@pytest.fixture(scope="session")
def oracle() -> Any:
    """The demo model in transformers, in float32, and its tokenizer."""
    import torch
    from pagewire.hub.huggingface import demo_gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = demo_gguf()
    kwargs: dict[str, Any] = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **kwargs).eval()
    return model, AutoTokenizer.from_pretrained(path.parent, **kwargs)


@pytest.fixture(scope="session")
def watch_gone() -> Callable[[list[int], float], bool]:
    return gone
