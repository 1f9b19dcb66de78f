"""Clients that do not read: they are given nothing more, which costs others neither time nor memory,
and miss nothing when they read again."""

import json
import socket
import time
import urllib.request
from typing import Any

import pytest
from e2e.test_stack_fake import VOCAB, gauges
from pagewire.worker.fake import chain

PROMPT = [5, 6, 7]
CHOICES = 4
TOKENS = 1500


def start(stack: Any, tokens: int, choices: int = CHOICES) -> socket.socket:
    """A client with the smallest buffer that the system gives, which does not read yet."""
    address = stack.url.removeprefix("http://").removesuffix("/v1").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(60)
    client.connect((address[0], int(address[1])))
    body = json.dumps(
        {
            "prompt": PROMPT,
            "max_tokens": tokens,
            "n": choices,
            "stream": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def wait(stack: Any, name: str, value: float, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while (present := gauges(stack).get(name)) != value:
        assert time.monotonic() < end, f"{name} is {present}, not {value}"
        time.sleep(0.1)


def rest(client: socket.socket) -> bytes:
    data = b""
    while piece := client.recv(1 << 20):
        data += piece
    return data


def test_what_is_not_read_is_not_generated_and_nothing_is_missed(fake_stack: Any) -> None:
    with start(fake_stack, TOKENS) as client:
        wait(fake_stack, "requests_parked", CHOICES)
        parked_at = gauges(fake_stack)
        assert parked_at["num_requests_running"] == parked_at["num_requests_waiting"] == 0
        assert parked_at["kv_blocks_free"] == parked_at["kv_blocks_total"]
        events = [
            json.loads(line.removeprefix(b"data: "))
            for line in rest(client).split(b"\n")
            if line.startswith(b"data: {")
        ]
    tokens: dict[int, list[int]] = {index: [] for index in range(CHOICES)}
    for event in events:
        for choice in event["choices"]:
            tokens[choice["index"]] += choice["token_ids"] or []
    assert set(map(tuple, tokens.values())) == {tuple(chain(PROMPT, TOKENS, VOCAB))}
    wait(fake_stack, "requests_parked", 0)


def test_many_that_read_nothing_cost_others_nothing(fake_stack: Any) -> None:
    clients = [start(fake_stack, 30_000) for _ in range(30)]
    try:
        wait(fake_stack, "requests_parked", 30 * CHOICES)
        body = json.dumps({"prompt": PROMPT, "max_tokens": 50, "return_token_ids": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{fake_stack.url}/completions", body, headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            (choice,) = json.load(answer)["choices"]
        assert choice["token_ids"] == chain(PROMPT, 50, VOCAB)
    finally:
        for client in clients:
            client.close()
    wait(fake_stack, "requests_parked", 0)
    wait(fake_stack, "kv_blocks_free", gauges(fake_stack)["kv_blocks_total"])


@pytest.mark.parametrize("wait_s", [0.0, 0.3])
def test_one_that_leaves_unread_leaves_nothing_behind(fake_stack: Any, wait_s: float) -> None:
    with start(fake_stack, 30_000):
        time.sleep(wait_s)
    wait(fake_stack, "num_requests_running", 0)
    wait(fake_stack, "requests_parked", 0)
