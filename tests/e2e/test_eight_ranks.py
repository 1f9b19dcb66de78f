"""Groups of eight ranks, as on a host of eight GPUs, of which one is killed while all of them serve:
with the fake model each one in turn, and with a small real one over gloo."""

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from e2e.conftest import Stack
from e2e.test_rank_groups import FAKE, LLAMA, ON_CPU, PROMPTS, ranks_of, save_model
from e2e.test_stack_fake import VOCAB
from pagewire.worker.fake import chain
from pagewire_protocol.sampling import Sampling
from worker.conftest import Driver

PATIENCE_S = 240.0
"""Eight processes that load torch on a busy machine take their time."""
RANKS = ["worker-0", *(f"worker-0.{rank}" for rank in range(1, 8))]
FAKE_COUNT = 700
COUNT = 80


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: list[int], count: int, begun: asyncio.Event
) -> list[int]:
    """The token ids of a greedy completion, which must be whole; `begun` with its first ones."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    tokens: list[int] = []
    async with session.post(f"{url}/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for raw in answer.content:
            if raw.startswith(b"data: {"):
                event = json.loads(raw[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    tokens += choice.get("token_ids") or []
                begun.set()
    assert len(tokens) == count
    return tokens


async def answers_while_killed(
    stack: Stack, prompts: list[list[int]], count: int, rank: str
) -> list[list[int]]:
    """The answers to `prompts`; `rank` is killed when all of them have begun."""
    before = ranks_of(stack)
    assert sorted(before) == RANKS
    begun = [asyncio.Event() for _ in prompts]
    timeout = aiohttp.ClientTimeout(PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        tasks = [
            asyncio.create_task(stream(session, stack.url, prompt, count, event))
            for prompt, event in zip(prompts, begun, strict=True)
        ]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), PATIENCE_S)
        assert not all(task.done() for task in tasks), "they ended before: nothing was tested"
        os.kill(before[rank], signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
    await asyncio.to_thread(stack.wait_serving, PATIENCE_S)
    after = ranks_of(stack)
    assert sorted(after) == RANKS
    assert not set(after.values()) & set(before.values()), "a rank outlived its group"
    return answers


@pytest.fixture(scope="module")
def fake_stack() -> Iterator[Stack]:
    stack = Stack(*FAKE, "--fake-step-ms", "4", "-tp", "8")
    try:
        yield stack.wait_ready()
    finally:
        assert stack.end() == 0


@pytest.mark.parametrize("rank", RANKS)
async def test_any_rank_of_eight_may_be_killed(rank: str, fake_stack: Stack) -> None:
    make = random.Random(rank)
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 99))] for _ in range(8)]
    answers = await answers_while_killed(fake_stack, prompts, FAKE_COUNT, rank)
    assert answers == [chain(prompt, FAKE_COUNT, VOCAB) for prompt in prompts]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head for each of eight ranks, and two KV heads for all."""
    return save_model(tmp_path_factory.mktemp("llama"), {**LLAMA, "num_attention_heads": 8})


@pytest.fixture(scope="module")
def alone(tiny: Path) -> list[list[int]]:
    """What one process says after the prompts."""
    greedy = Sampling(0, COUNT, temperature=0.0, ignore_eos=True)
    return Driver(tiny).generate(PROMPTS, [greedy] * len(PROMPTS), COUNT)


@pytest.mark.parametrize(
    ("flags", "killed"),
    [(("-tp", "8"), "worker-0.5"), (("-tp", "4", "-pp", "2"), "worker-0.6")],
    ids=["tensor-parallel", "tensor-and-pipeline-parallel"],
)
async def test_a_real_model_over_eight_ranks_survives_the_loss_of_one(
    flags: tuple[str, ...], killed: str, tiny: Path, alone: list[list[int]]
) -> None:
    """No request is lost, and each says what one process says undisturbed."""
    values: dict[str, Any] = {name: value for name, value in ON_CPU.items() if value is not True}
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    stack = Stack(str(tiny), *settings, "--skip-tokenizer-init", *flags)
    try:
        await asyncio.to_thread(stack.wait_line, " at http", PATIENCE_S)
        stack.wait_ready()
        assert await answers_while_killed(stack, PROMPTS, COUNT, killed) == alone
    finally:
        assert stack.end() == 0
