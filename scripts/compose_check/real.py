"""The deployment as a user has it: the worker's own image, the demo model fetched by the containers
themselves into fresh volumes, greedy answers through the gateway, and a few faults under them."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from . import faults
from .clients import Clients
from .engine import Deployment
from .faults import Act, Stage, strike
from .report import Report

READY_S: Final = 600.0
SCALE: Final = {"frontend": 2, "tokenizer": 2, "worker": 1}
TOKENS: Final = 48
SUBJECTS: Final = ("the sea", "mountains", "bread", "the moon", "rivers", "winter")
FAULTS: Final[tuple[tuple[str, Act], ...]] = (
    ("kill worker", faults.kill("worker")),
    ("hang worker", faults.hang("worker")),
    ("restart worker", faults.restart("worker")),
    ("recreate worker", faults.recreate("worker")),
    ("kill tokenizer", faults.kill("tokenizer")),
    ("restart tokenizer", faults.restart("tokenizer")),
    ("kill scheduler", faults.kill("scheduler")),
    ("hang scheduler", faults.hang("scheduler")),
    ("restart frontend", faults.restart("frontend")),
    ("everything but frontends killed", faults.everything_killed),
    ("upgrade", faults.upgraded),
)


@dataclass
class Answers:
    """What the clients got under faults."""

    whole: int = 0
    same: int = 0
    """Of those, how many had the very text that the prompt had without faults."""
    problems: list[str] = field(default_factory=list[str])


async def run_all(report: Report, port: int, keep: bool) -> None:
    """Start it, ask it, strike it."""
    deployment = Deployment(port, is_real=True)
    stage = Stage(deployment, Clients(deployment.url, 0), dict(SCALE), READY_S)
    try:
        began = time.monotonic()
        await stage.up()
        await stage.settled()
        print(f"ready {time.monotonic() - began:.1f} s after `up`, with fresh volumes", flush=True)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=READY_S)) as session:
            await _chat(deployment, session, report)
            prompts = [
                f"Once upon a time there was a story about {subject}" for subject in SUBJECTS
            ]
            references = {prompt: await _stream(deployment, session, prompt) for prompt in prompts}
            answers = Answers()
            stopping = asyncio.Event()
            clients = [
                asyncio.create_task(_client(deployment, session, prompt, text, answers, stopping))
                for prompt, text in references.items()
            ]
            for name, act in FAULTS:
                fault = await strike(stage, name, act)
                report.check(
                    f"real worker: {name}",
                    not fault.failed,
                    fault.failed or f"{fault.back_s:.1f} s",
                )
            stopping.set()
            await asyncio.gather(*clients)
        report.check(
            f"{answers.whole} greedy answers of {TOKENS} tokens under {len(FAULTS)} faults",
            answers.whole > 0 and not answers.problems,
            f"{answers.same} with the same text as without faults; {'; '.join(answers.problems[:3])}",
        )
    finally:
        if not keep:
            await deployment.close()


async def _chat(deployment: Deployment, session: aiohttp.ClientSession, report: Report) -> None:
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 32,
    }
    async with session.post(f"{deployment.url}/v1/chat/completions", json=body) as answer:
        text = (await answer.json())["choices"][0]["message"]["content"]
    report.check("the demo model knows the capital of France", "Paris" in text, text[:80])


async def _stream(deployment: Deployment, session: aiohttp.ClientSession, prompt: str) -> str:
    """The text of a greedy stream of TOKENS tokens. Raises ValueError where it ends otherwise."""
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, count = "", 0
    async with session.post(f"{deployment.url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise ValueError(f"{answer.status} {(await answer.text())[:100]}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(str(event["error"])[:100])
            text += "".join(choice["text"] for choice in event["choices"])
            count = (event.get("usage") or {}).get("completion_tokens", count)
    if count != TOKENS:
        raise ValueError(f"{count} tokens")
    return text


async def _client(
    deployment: Deployment,
    session: aiohttp.ClientSession,
    prompt: str,
    reference: str,
    answers: Answers,
    stopping: asyncio.Event,
) -> None:
    while not stopping.is_set():
        try:
            text = await _stream(deployment, session, prompt)
        except (ValueError, aiohttp.ClientError, ConnectionError) as error:
            answers.problems.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.5)
        else:
            answers.whole += 1
            answers.same += text == reference
