"""What a request gets in a crowd is what it gets alone.

    python -m tests.faults.crowd --minutes 10 --report crowd.md
    python -m tests.faults.crowd --minutes 2 --flags="-pp 2 --no-enable-prefix-caching"

Requests that combine all that clients may ask for are sent one after the other, and then all at once,
in another order each time, to a stack of the fake model that has few slots and fewer blocks than they
want, so that requests wait, are preempted, share blocks and are put back. Some clients leave. Each
answer must be the one that came alone, and no service may have failed.
"""

import asyncio
import json
import random
import shlex
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from .reports import finish, parser_of  # isort: skip

import aiohttp
from e2e.conftest import Stack
from e2e.test_stack_fake import gauges
from faults.nemesis import GRAMMARS, HELD_VOCAB, model_flags

FLAGS: Final = (
    *("--fake-step-ms", "1", "--num-kv-blocks", "72", "--max-num-seqs", "12"),
    *("--max-num-batched-tokens", "96", "--max-model-len", "1024", "--num-tokenizers", "2"),
)
ROUND: Final = 96
"""Requests that are sent alone, and then at once."""
CROWDS: Final = 2
"""Orders in which they are."""
LEAVING: Final = 0.15
ANSWER_S: Final = 120.0
CHARACTERS: Final = "abcdefghijklmnopqrstuvwxyz 0123456789"


@dataclass
class Outcome:
    """What happened."""

    requests: int = 0
    """That were answered whole in a crowd."""
    left: int = 0
    preemptions: float = 0.0
    refused: Counter[int] = field(default_factory=Counter[int])
    """Statuses of answers that came alone and were no 200: combinations that are refused."""
    wrong: list[str] = field(default_factory=list[str])


def combination(make: random.Random) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request."""
    body: dict[str, Any] = {"max_tokens": make.choice((1, 2, 16, 17, 60, 200)), "seed": 1}
    if make.random() < 0.4:
        text = "".join(make.choices(CHARACTERS, k=make.randrange(1, 120)))
        body["messages"] = [{"role": "user", "content": text}]
        path = "chat/completions"
        if make.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": make.randrange(4)}
    else:
        shared = random.Random(make.randrange(3))
        prompt = [shared.randrange(3, HELD_VOCAB) for _ in range(make.choice((0, 15, 16, 160)))]
        prompt += [make.randrange(3, HELD_VOCAB) for _ in range(make.randrange(1, 200))]
        body["prompt"] = prompt if make.random() < 0.8 else [prompt, prompt[:7]]
        path = "completions"
        if make.random() < 0.3:
            body["logprobs"] = make.randrange(4)
        if make.random() < 0.1:
            body["echo"] = True
        if make.random() < 0.1:
            body["prompt_logprobs"] = make.randrange(3)
    options: tuple[tuple[float, dict[str, Any]], ...] = (
        (0.3, {"n": make.randrange(2, 5), "temperature": 1.0}),
        (0.3, {"structured_outputs": make.choice(GRAMMARS)}),
        (0.2, {"stop": ["a", "e1", "zz"][: make.randrange(1, 4)]}),
        (0.1, {"include_stop_str_in_output": True}),
        (0.1, {"stop_token_ids": [make.randrange(HELD_VOCAB) for _ in range(5000)]}),
        (0.1, {"min_tokens": min(5, body["max_tokens"])}),
        (0.1, {"ignore_eos": True}),
        (0.1, {"priority": make.randrange(-2, 3)}),
        (0.1, {"presence_penalty": 0.5, "repetition_penalty": 1.1}),
        (0.1, {"logit_bias": {"17": 1.5}}),
        (0.1, {"cache_salt": "salt"}),
        (0.5, {"return_token_ids": True}),
    )
    for share, fields in options:
        if make.random() < share:
            body |= fields
    return path, body


async def ask(
    session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any], leave_after: int = 0
) -> Any:
    """The choices, as far as they say what was generated, and the usage; (status, message) of what
    is refused; None where the client has left after so many events, unless that is 0."""
    async with session.post(f"{url}/{path}", json=body) as answer:
        if answer.status != 200:
            return answer.status, (await answer.json())["error"]["message"]
        if not body.get("stream"):
            said = await answer.json()
            usage = {name: said["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
            return said["choices"], usage
        events: dict[int, list[Any]] = {}
        count = 0
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return 500, str(event["error"])
            for choice in event["choices"]:
                events.setdefault(choice["index"], []).append(choice)
            count += 1
            if leave_after and count >= leave_after:
                return None
        return {index: joined(parts) for index, parts in events.items()}


def joined(parts: list[dict[str, Any]]) -> Any:
    """The text, tokens and end of one choice of a stream, however it was cut."""
    texts = [part.get("text") or (part.get("delta") or {}).get("content") or "" for part in parts]
    tokens = [token for part in parts for token in part.get("token_ids") or ()]
    reasons = [part["finish_reason"] for part in parts if part["finish_reason"]]
    stops = [part.get("stop_reason") for part in parts if part.get("stop_reason") is not None]
    return "".join(texts), tokens, reasons, stops


async def play(stack: Stack, make: random.Random, outcome: Outcome) -> None:
    """One round."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        requests: list[tuple[str, dict[str, Any], Any]] = []
        while len(requests) < ROUND:
            path, body = combination(make)
            if make.random() < 0.5 and "prompt_logprobs" not in body:
                body["stream"] = True
            alone = await ask(session, stack.url, path, body)
            if isinstance(alone, tuple) and isinstance(alone[0], int):
                outcome.refused[alone[0]] += 1
                if alone[0] >= 500:
                    outcome.wrong.append(f"alone: {alone} {shown(path, body)}")
                continue
            requests.append((path, body, alone))
        for _ in range(CROWDS):
            make.shuffle(requests)
            await asyncio.gather(
                *(_one(session, stack.url, request, make, outcome) for request in requests)
            )


async def _one(
    session: aiohttp.ClientSession,
    url: str,
    request: tuple[str, dict[str, Any], Any],
    make: random.Random,
    outcome: Outcome,
) -> None:
    path, body, alone = request
    leaves = bool(body.get("stream")) and make.random() < LEAVING
    try:
        said = await ask(session, url, path, body, make.randrange(1, 30) if leaves else 0)
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.wrong.append(f"{type(error).__name__}: {error} {shown(path, body)}")
        return
    if said is None:
        outcome.left += 1
        return
    outcome.requests += 1
    if said != alone:
        outcome.wrong.append(
            f"{str(said)[:400]}\n  instead of {str(alone)[:400]} {shown(path, body)}"
        )


def shown(path: str, body: dict[str, Any]) -> str:
    """A request on a line."""
    short = {name: value for name, value in body.items() if name != "stop_token_ids"}
    return f"({path} {json.dumps(short)[:600]})"


def attack(stack: Stack, seconds: float, most_rounds: int, seed: int) -> Outcome:
    """Rounds until the time is over, at least one."""
    make = random.Random(seed)
    outcome = Outcome()
    end = time.monotonic() + seconds
    for _ in range(most_rounds):
        asyncio.run(play(stack, make, outcome))
        if time.monotonic() > end or outcome.wrong:
            break
    figures = gauges(stack)
    outcome.preemptions = preemptions(stack)
    if figures["service_deaths_total"]:
        outcome.wrong.append(f"{figures['service_deaths_total']:.0f} services have ended")
    for name in ("num_requests_running", "num_requests_waiting"):
        if figures[name]:
            outcome.wrong.append(f"{name} is {figures[name]:.0f} with no request left")
    if figures["kv_blocks_free"] != figures["kv_blocks_total"]:
        outcome.wrong.append(
            f"{figures['kv_blocks_free']:.0f} of {figures['kv_blocks_total']:.0f} blocks are free"
        )
    return outcome


def preemptions(stack: Stack) -> float:
    """So far."""
    with urllib.request.urlopen(stack.url.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:num_preemptions_total")
    )


def report(outcome: Outcome) -> str:
    """The run in Markdown."""
    return (
        f"- {outcome.requests} answers in crowds of {ROUND}, {outcome.preemptions:.0f} preemptions, "
        f"{outcome.left} left by their clients; combinations that are refused: "
        f"{dict(outcome.refused) or 'none'}\n- not as alone: {len(outcome.wrong)}\n"
    )


def main() -> int:
    """0 when all was as alone."""
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--flags", default="", help="further ones of the stack")
    options = parser.parse_args()
    flags = (*model_flags(1.0), *FLAGS, *shlex.split(options.flags))
    stack = Stack(*flags).wait_ready()
    try:
        stack.wait_serving()
        outcome = attack(stack, 60 * options.minutes, 10**9, options.seed)
    finally:
        stack.end()
    return finish(f"- seed {options.seed}\n{report(outcome)}", outcome.wrong, options.report)


if __name__ == "__main__":
    sys.exit(main())
