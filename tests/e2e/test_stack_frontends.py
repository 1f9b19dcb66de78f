"""A stack with several frontends behind one socket: requests reach more than one, and /metrics is
the same whichever answers."""

import re
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

FAKE = (
    "--device",
    "fake",
    "--skip-tokenizer-init",
    "--num-frontends",
    "3",
    "--num-tokenizers",
    "2",
)
REQUESTS, TOKENS = 24, 5


def generated(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        found = re.search(
            r"^vllm:generation_tokens_total\S* (\S+)", answer.read().decode(), re.MULTILINE
        )
    assert found
    return float(found[1])


def test_counts_are_those_of_all_frontends(start_stack: Callable[..., Any]) -> None:
    stack = start_stack(*FAKE).wait_ready()
    assert any("with 3 frontend(s) and 2 tokenizer(s)" in line for line in stack.lines)
    client, url = stack.client(), stack.url.removesuffix("/v1")

    name = client.models.list().data[0].id

    def ask(number: int) -> int:
        return client.completions.create(
            model=name, prompt=[7, number + 1], max_tokens=TOKENS
        ).usage.completion_tokens

    with ThreadPoolExecutor(REQUESTS) as pool:
        assert list(pool.map(ask, range(REQUESTS))) == [TOKENS] * REQUESTS
    end = time.monotonic() + 10
    while (seen := {generated(url) for _ in range(12)}) != {float(REQUESTS * TOKENS)}:
        assert time.monotonic() < end, f"/metrics says {seen}"
        time.sleep(0.2)
    assert stack.end() == 0
