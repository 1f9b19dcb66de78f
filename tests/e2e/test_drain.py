"""SIGTERM to `pagewire serve`: what runs is finished, what comes is told so, and the exit code is
0."""

import contextlib
import json
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any


def ask(stack: Any, count: int) -> Any:
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": count, "return_token_ids": True}).encode()
    request = urllib.request.Request(
        f"{stack.url}/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_running_requests_are_finished(start_stack: Callable[..., Any]) -> None:
    fake = (
        "--device",
        "fake",
        "--skip-tokenizer-init",
        "--fake-vocab-size",
        "1000",
        "--fake-step-ms",
        "10",
    )
    one_each = ("--num-frontends", "1", "--num-tokenizers", "1")
    stack = start_stack(*fake, *one_each, "--shutdown-timeout", "20").wait_ready()
    answers: list[Any] = []
    running = [threading.Thread(target=lambda: answers.append(ask(stack, 150))) for _ in range(8)]
    for thread in running:
        thread.start()
    while stack.get("/load")["server_load"] < 8:
        pass
    stack.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(urllib.error.URLError):
        while True:
            try:
                stack.get("/health")
            except urllib.error.HTTPError as error:
                assert error.code == 503 and json.load(error)["status"] == "draining"
                break
            except json.JSONDecodeError:
                pass  # 200, without a body: the signal has not been heard yet
    for thread in running:
        thread.join(20)
    assert [len(answer["choices"][0]["token_ids"]) for answer in answers] == [150] * 8
    assert stack.process.wait(10) == 0
