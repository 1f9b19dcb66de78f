"""What a running stack can be reached by, and what it reaches: its own sockets and nothing else."""

import json
import select
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from faults.reports import descriptors_of

LISTENS = "0A"
"""The state of a TCP socket in /proc/net/tcp."""
ACCEPTS = 1 << 16
"""The flag of a listening socket in /proc/net/unix."""


def sockets_of(pids: list[int]) -> set[str]:
    """Inodes."""
    links = (link for pid in pids for link in descriptors_of(pid))
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def rows_of(table: str) -> list[list[str]]:
    """Of /proc/net, without the heading."""
    return [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]


def test_the_stack_listens_on_its_port_and_in_its_run_directory_only(fake_stack: Any) -> None:
    fake_stack.wait_serving()
    mine = sockets_of([fake_stack.process.pid, *fake_stack.children()])
    port = urlsplit(fake_stack.url).port
    listening = [
        row[1]
        for table in ("tcp", "tcp6")
        for row in rows_of(table)
        if row[9] in mine and row[3] == LISTENS
    ]
    loopback = f"0100007F:{port:04X}"
    assert set(listening) == {loopback}
    datagrams = [row for table in ("udp", "udp6", "raw") for row in rows_of(table)]
    assert not [row for row in datagrams if row[9] in mine]
    paths = {
        row[7] if len(row) > 7 else ""
        for row in rows_of("unix")
        if row[6] in mine and int(row[3], 16) & ACCEPTS
    }
    run_dir = fake_stack.run_dir()
    assert len(paths) >= 4, "each service has an inbox"
    assert all(Path(path).parent == run_dir for path in paths), paths
    assert run_dir.stat().st_mode & 0o777 == 0o700


@pytest.fixture(scope="module")
def chat_stack(start_stack: Callable[..., Any]) -> Any:
    """One with a tokenizer and a chat template."""
    flags = ("--device", "fake", "--num-frontends", "1", "--num-tokenizers", "1")
    return start_stack(*flags).wait_ready()


@pytest.fixture
def bait() -> Iterator[socket.socket]:
    """A listening socket that nobody has a reason to connect to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


SERVED = {"a server of Responses", "a tool"}
"""Tools that a hosting server runs are left out, with a line in the log; the parameters of others are
text for the model."""
UNKNOWN = {"an adapter", "a model"}


def bodies(url: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Requests that name `url` wherever a server might fetch it: path and body."""
    user = {"role": "user", "content": "hi"}

    def part(**fields: Any) -> tuple[str, dict[str, Any]]:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": [fields]}]}

    schema = {"type": "object", "properties": {"a": {"$ref": f"{url}/schema.json#/a"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    image = {"type": "image", "source": {"type": "url", "url": url}}
    return {
        "an image": part(type="image_url", image_url={"url": url}),
        "a sound": part(type="audio_url", audio_url={"url": url}),
        "a film": part(type="video_url", video_url={"url": url}),
        "a file": part(type="file", file={"file_data": url}),
        "a remote schema": (
            "/v1/completions",
            {"prompt": [1], "structured_outputs": {"json": schema}},
        ),
        "a response format": (
            "/v1/chat/completions",
            {
                "messages": [user],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": schema},
                },
            },
        ),
        "a tool": ("/v1/chat/completions", {"messages": [user], "tools": [tool], "max_tokens": 1}),
        "an image of Responses": (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
        ),
        "a server of Responses": (
            "/v1/responses",
            {
                "input": "hi",
                "max_output_tokens": 16,
                "tools": [{"type": "mcp", "server_label": "x", "server_url": url}],
            },
        ),
        "an image of Messages": (
            "/v1/messages",
            {"max_tokens": 1, "messages": [{"role": "user", "content": [image]}]},
        ),
        "a document of Messages": (
            "/v1/messages",
            {
                "max_tokens": 1,
                "messages": [{"role": "user", "content": [{**image, "type": "document"}]}],
            },
        ),
        "an adapter": ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": url}),
        "a model": ("/v1/completions", {"prompt": [1], "model": url}),
    }


@pytest.mark.parametrize("name", bodies(""))
def test_no_address_in_a_request_is_fetched(
    name: str, chat_stack: Any, bait: socket.socket
) -> None:
    path, body = bodies(f"http://127.0.0.1:{bait.getsockname()[1]}")[name]
    request = urllib.request.Request(
        chat_stack.url.removesuffix("/v1") + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        with error:
            status = error.code
    assert status == (200 if name in SERVED else 404 if name in UNKNOWN else 400)
    assert not select.select([bait], [], [], 0.1)[0], "the server has connected to it"
