"""Two running stacks for clients to talk to, and clients that want other versions than the rest: the
OpenAI client that the tutorials pin, and instructor.

The model is a hash behind the demo's tokenizer: clients do not care what is said, only how. The
second stack wants a key, and its chat template refuses a system message, as Gemma's does.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Stack

OLD = ("openai==1.17.1", "httpx<0.28")
"""The pinned client, and the last httpx that it works with."""
INSTRUCTOR = ("instructor==1.17.0", "openai==3.3.0", "jiter==0.14.0", "rich==14.3.4")
"""Without what they need in turn, which is here for other clients."""
SMALL = (
    "--device",
    "fake",
    "--max-model-len",
    "4096",
    "--num-frontends",
    "1",
    "--num-tokenizers",
    "1",
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
)
KEY = "sk-very-secret"


@dataclass(frozen=True)
class Endpoint:
    url: str
    """Without a path."""
    model: str
    key: str = "EMPTY"

    @property
    def base(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Endpoint]]:
    stacks: list[Stack] = []

    def begin(model: str, key: str, *flags: str) -> Endpoint:
        environment = {"PAGEWIRE_API_KEY": "", "VLLM_API_KEY": "" if key == "EMPTY" else key}
        stacks.append(Stack(*SMALL, "--served-model-name", model, *flags, environment=environment))
        return Endpoint(stacks[-1].wait_ready().url.removesuffix("/v1"), model, key)

    yield begin
    for stack in stacks:
        stack.end()


@pytest.fixture(scope="session")
def endpoint(start: Callable[..., Endpoint]) -> Endpoint:
    return start("google/gemma-2b", "EMPTY")


@pytest.fixture(scope="session")
def guarded(start: Callable[..., Endpoint]) -> Endpoint:
    """Its key comes from the environment, as in the tutorials."""
    return start("/input0/Qwen-1_8B-Chat/", KEY, "--chat-template", NO_SYSTEM)


def installed(pytestconfig: pytest.Config, name: str, *packages: str) -> Path:
    """A directory with these packages, kept between runs. Skips only where pip cannot get them."""
    assert pytestconfig.cache is not None
    directory = Path(pytestconfig.cache.mkdir(name))
    complete = directory / "complete"
    if not complete.exists():
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        command = [*pip, "--target", str(directory), *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            pytest.skip(f"pip could not install {name}: {reason}")
        complete.touch()
    return directory


@pytest.fixture(scope="session")
def old_client(pytestconfig: pytest.Config) -> Path:
    """The pinned client."""
    return installed(pytestconfig, "openai-1.17.1", *OLD)


@pytest.fixture(scope="session")
def instructor_path(pytestconfig: pytest.Config) -> Path:
    """instructor, with what it wants in other versions than the other clients."""
    return installed(pytestconfig, "instructor-1.17.0", "--no-deps", *INSTRUCTOR)


@pytest.fixture(params=["today", "1.17.1"])
def call_openai(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Runs a program with one of the two clients; what it prints comes back."""
    path = str(request.getfixturevalue("old_client")) if request.param == "1.17.1" else ""

    def call(program: str, *arguments: str) -> str:
        script = Path(__file__).parent / program
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    call.version = request.param  # type: ignore[attr-defined]
    return call
