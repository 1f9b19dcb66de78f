"""Runs what five tutorials for vLLM tell a reader to do: their commands, programs and requests,
with `pagewire` in the place of `vllm`.

The models are where the tutorials' downloads would have put them, small and with random weights
(tiny_models.py); host and port are the test's. docs/tutorials.md says which test shows what.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from clients.conftest import call_openai, old_client
from e2e.conftest import Stack
from tutorials import tiny_models

__all__ = ["call_openai", "old_client"]
BIN = Path(sys.executable).parent
PROGRAMS = Path(__file__).parent / "programs"
SECRETS = ("VLLM_API_KEY", "PAGEWIRE_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class Served(Stack):
    """A command of a tutorial that starts a server. Its host and port are taken over by the test's:
    the last ones given count."""

    def __init__(self, command: str, environment: dict[str, str]) -> None:
        program, *words = shlex.split(command)
        own = words if program.startswith("python") else [str(BIN / program), *words]
        super().__init__(
            "--host", "127.0.0.1", "--port", "0", environment=environment, command=tuple(own)
        )

    def post(self, path: str, body: dict[str, Any], key: str = "EMPTY") -> requests.Response:
        return requests.post(
            self.url + path, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60
        )


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME with every model that the tutorials call by its repository's name."""
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="session")
def environment(home: Path) -> dict[str, str]:
    """No network, no secrets, and a cache with the models."""
    return {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **dict.fromkeys(SECRETS, ""),
    }


@pytest.fixture(scope="session")
def downloaded(home: Path) -> Callable[..., Path]:
    """downloaded(repository) puts it in the cache; downloaded(repository, path) where a tutorial's
    own download would. Once each."""
    made: dict[tuple[str, Path | None], Path] = {}

    def get(repository: str, path: Path | None = None) -> Path:
        key = (repository, path)
        if key not in made:
            made[key] = (
                tiny_models.save_model(path, repository)
                if path
                else tiny_models.in_hub_cache(home, repository)
            )
        return made[key]

    return get


@pytest.fixture(scope="session")
def qwen1(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first tutorial's model, as a path that ends in a slash."""
    return f"{tiny_models.save_qwen1(tmp_path_factory.mktemp('input0') / 'Qwen-1_8B-Chat')}/"


@pytest.fixture(scope="module")
def serve(environment: dict[str, str]) -> Iterator[Callable[..., Served]]:
    """serve(command, **variables): a tutorial's server, ready. It ends with the tutorial: each
    holds a GiB of memory."""
    started: list[Served] = []

    def start(command: str, **variables: str) -> Served:
        started.append(Served(command, {**environment, **variables}))
        started[-1].wait_ready()
        return started[-1]

    yield start
    for stack in started:
        stack.end()


@pytest.fixture(scope="session")
def run(environment: dict[str, str]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """run(command, **variables): a tutorial's command to its end. Programs are looked for in
    programs/."""

    def call(command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        program, *words = shlex.split(command)
        words = [str(PROGRAMS / word) if word.endswith(".py") else word for word in words]
        full = [sys.executable if program.startswith("python") else str(BIN / program), *words]
        own = {**os.environ, **environment, **variables}
        return subprocess.run(
            full, capture_output=True, text=True, timeout=100, env=own, check=False
        )

    return call


@pytest.fixture(scope="session")
def in_process(environment: dict[str, str]) -> Iterator[None]:
    """The environment for programs that run inside the test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
