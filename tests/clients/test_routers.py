"""vLLM's and SGLang's routers in front of a stack. They decode every body into types of their own
and encode it again, with all defaults: an answer through them must be the one without them."""

import contextlib
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from clients.conftest import Endpoint

ROUTERS = ["vllm_router", "sglang_router"]
HAS_WHEELS = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is Mexico famous for?"}]},
    {"role": "assistant", "content": "Food."},
    {"role": "user", "content": "And what else?", "name": "Ann"},
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_model(url: str, model: str, router: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the router lists the model of the stack behind it."""
    end = time.monotonic() + 60
    while time.monotonic() < end and router.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer,
        ):
            if [card["id"] for card in json.load(answer)["data"]] == [model]:
                return
        time.sleep(0.1)
    raise AssertionError(f"the router lists no {model}:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module", params=ROUTERS)
def routed(
    request: pytest.FixtureRequest, endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    """A client of the router. Skips only where the router has no wheel."""
    module: str = request.param
    if not HAS_WHEELS and not importlib.util.find_spec(module):
        pytest.skip(f"{module} has no wheel for {sys.platform} on {platform.machine()}")
    port = free_port()
    log = tmp_path_factory.mktemp(module) / "log"
    command = [sys.executable, "-m", f"{module}.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--prometheus-port", str(free_port())]
    command += ["--worker-urls", endpoint.url, "--policy", "cache_aware"]
    # SGLang's router would look for the model's tokenizer at a hub.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    with log.open("wb") as output:
        router = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_model(url, endpoint.model, router, log)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as client:
            yield client
    finally:
        router.terminate()
        router.wait(20)


@pytest.fixture(scope="module")
def direct(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.base, api_key="EMPTY", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, model: str, stream: bool, **options: Any) -> tuple[str, str]:
    """The text and the finish reason."""
    options = {"temperature": 0, "max_tokens": 12, **options}
    made = client.chat.completions.create(model=model, messages=MESSAGES, stream=stream, **options)
    if not stream:
        return made.choices[0].message.content, made.choices[0].finish_reason
    choices = [chunk.choices[0] for chunk in made if chunk.choices]
    return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason


def complete(client: openai.OpenAI, model: str, stream: bool, **options: Any) -> tuple[str, str]:
    options = {"temperature": 0, "max_tokens": 12, **options}
    made = client.completions.create(model=model, prompt="Mexico is", stream=stream, **options)
    if not stream:
        return made.choices[0].text, made.choices[0].finish_reason
    choices = [chunk.choices[0] for chunk in made if chunk.choices]
    return "".join(choice.text for choice in choices), choices[-1].finish_reason


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("call", [chat, complete])
def test_an_answer_is_the_one_without_the_router(
    routed: openai.OpenAI, direct: openai.OpenAI, endpoint: Endpoint, call: Any, stream: bool
) -> None:
    text, reason = call(routed, endpoint.model, stream)
    assert text and reason == "length"
    assert (text, reason) == call(direct, endpoint.model, stream)
    options = {"seed": 5, "temperature": 0.9, "top_p": 0.8, "frequency_penalty": 0.1}
    options["extra_body"] = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}
    sampled = call(routed, endpoint.model, stream, **options)
    assert sampled == call(direct, endpoint.model, stream, **options)


def test_a_stream_reports_its_usage(routed: openai.OpenAI, endpoint: Endpoint) -> None:
    stream = routed.chat.completions.create(
        model=endpoint.model,
        messages=MESSAGES,
        stream=True,
        max_tokens=5,
        stream_options={"include_usage": True},
    )
    usage = list(stream)[-1].usage
    assert usage is not None and usage.completion_tokens == 5


def test_an_error_comes_through(routed: openai.OpenAI, endpoint: Endpoint) -> None:
    with pytest.raises(openai.BadRequestError, match=r"max_(completion_)?tokens"):
        complete(routed, endpoint.model, False, max_tokens=0)


def test_what_a_router_asks_a_server(endpoint: Endpoint) -> None:
    for path in ("/server_info", "/get_server_info", "/model_info", "/get_model_info"):
        with urllib.request.urlopen(endpoint.url + path, timeout=10) as answer:
            facts = json.load(answer)
        assert facts["served_model_name"] == endpoint.model
        assert facts["model_path"] == facts["tokenizer_path"] != endpoint.model
