"""The stack around a fake model whose next token is a hash of all before it: every token that
arrives is checked."""

import asyncio
import json
import os
import random
import signal
import time
import urllib.error
import urllib.request
from typing import Any

import aiohttp
import pytest
from pagewire.worker.fake import chain, next_token

VOCAB = 1000
HEARD_S = 60.0


def ask(stack: Any, prompt: list[int], count: int, **extra: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": count, "return_token_ids": True, **extra}
    request = urllib.request.Request(
        f"{stack.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: list[int], count: int
) -> tuple[list[int], str]:
    """The token ids of a streamed completion and why it ended."""
    body = {"prompt": prompt, "max_tokens": count, "stream": True, "return_token_ids": True}
    tokens, reason = list[int](), ""
    async with session.post(f"{url}/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for raw in answer.content:
            if raw.startswith(b"data: {"):
                event = json.loads(raw[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    tokens += choice.get("token_ids") or []
                    reason = choice["finish_reason"] or reason
    return tokens, reason


def test_the_reference_hash_agrees_with_itself() -> None:
    said = chain([1, 2, 3], 5, VOCAB)
    tokens = [1, 2, 3]
    for token in said:
        assert token == next_token(tokens, VOCAB)
        tokens.append(token)
    assert chain([1, 2, 4], 5, VOCAB) != said and chain([2, 1, 3], 5, VOCAB) != said


def test_four_services_are_processes_of_their_own(fake_stack: Any) -> None:
    assert sorted(fake_stack.children().values()) == [
        "frontend",
        "scheduler",
        "tokenizer",
        "worker",
    ]


def test_a_completion_follows_the_chain(fake_stack: Any) -> None:
    answer = ask(fake_stack, [5, 6, 7], 40)
    assert answer["choices"][0]["token_ids"] == chain([5, 6, 7], 40, VOCAB)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {**answer["usage"], "prompt_tokens": 3, "completion_tokens": 40}


def test_scoring_a_prompt_generates_nothing(fake_stack: Any) -> None:
    prompt = [5, *chain([5], 3, VOCAB), 77]
    answer = ask(fake_stack, prompt, 0, echo=True, prompt_logprobs=0)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length" and not choice["token_ids"]
    assert answer["usage"]["completion_tokens"] == 0
    ranks = [next(iter(entry.values()))["rank"] for entry in choice["prompt_logprobs"][1:]]
    assert ranks == [1, 1, 1, 2]


def test_a_prompt_that_fills_the_context_is_scored_and_no_token_counted(fake_stack: Any) -> None:
    before = generated(fake_stack)
    with urllib.request.urlopen(f"{fake_stack.url}/models", timeout=60) as answer:
        context = json.load(answer)["data"][0]["max_model_len"]
    for extra in ({"echo": True, "logprobs": 0}, {"prompt_logprobs": 0}):
        answer = ask(fake_stack, [7] * context, 0, **extra)
        (choice,) = answer["choices"]
        rows = (
            choice["prompt_logprobs"]
            if "prompt_logprobs" in extra
            else choice["logprobs"]["tokens"]
        )
        assert len(rows) == context and choice["finish_reason"] == "length"
        assert answer["usage"] == {
            **answer["usage"],
            "prompt_tokens": context,
            "completion_tokens": 0,
            "total_tokens": context,
        }
    assert generated(fake_stack) == before
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(fake_stack, [7] * context, 1, echo=True, logprobs=0)
    with caught.value as error:
        assert f"{context + 1} tokens" in json.load(error)["error"]["message"]


def generated(stack: Any) -> float:
    """Tokens generated so far, as /metrics counts them."""
    with urllib.request.urlopen(stack.url.removesuffix("/v1") + "/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total")
    )


def test_a_stop_token_ends_a_completion(fake_stack: Any) -> None:
    expected = chain([9, 9], 20, VOCAB)
    stop = expected[7]
    answer = ask(fake_stack, [9, 9], 20, stop_token_ids=[stop])
    assert answer["choices"][0]["token_ids"] == expected[: expected.index(stop) + 1]
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == (
        "stop",
        stop,
    )


def test_a_token_outside_the_vocabulary_is_refused_with_the_numbers(fake_stack: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(fake_stack, [1, VOCAB], 4)
    with caught.value as error:
        assert error.code == 400
        assert str(VOCAB) in json.load(error)["error"]["message"]


async def test_a_hundred_streams_get_their_own_tokens(fake_stack: Any) -> None:
    make = random.Random(1)
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 300))] for _ in range(100)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        answers = await asyncio.gather(
            *(stream(session, fake_stack.url, prompt, 50) for prompt in prompts)
        )
    for prompt, (tokens, reason) in zip(prompts, answers, strict=True):
        assert tokens == chain(prompt, 50, VOCAB)
        assert reason == "length"


def gauges(stack: Any) -> dict[str, float]:
    """The scheduler's numbers from /metrics, by name without prefix and labels: as they are now or
    later, not those that the frontend heard before."""
    now = time.time()
    end = time.monotonic() + HEARD_S
    while (figures := _heard(stack)).get("stats_timestamp_seconds", 0.0) < now:
        assert time.monotonic() < end, f"no frontend heard of the scheduler for {HEARD_S} s"
        time.sleep(0.02)
    return figures


def _heard(stack: Any) -> dict[str, float]:
    with urllib.request.urlopen(stack.url.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (
        line.rsplit(" ", 1)
        for line in lines
        if line.startswith(("pagewire:scheduler_", "vllm:num_requests_"))
    )
    return {
        name.partition("{")[0].rpartition(":")[2].removeprefix("scheduler_"): float(value)
        for name, value in pairs
    }


async def test_clients_that_hang_up_leave_nothing_behind_and_disturb_nobody(
    fake_stack: Any,
) -> None:
    """200 streams, of which every second is cut off at a random moment, some before their first
    token."""
    await asyncio.to_thread(fake_stack.wait_serving)
    make = random.Random(7)
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 400))] for _ in range(200)]

    async def one(place: int, session: aiohttp.ClientSession) -> tuple[list[int], str] | None:
        task = asyncio.create_task(stream(session, fake_stack.url, prompts[place], 300))
        if place % 2 == 0:
            return await task
        done, _ = await asyncio.wait([task], timeout=make.random() ** 2)
        if done:
            return task.result()
        task.cancel()
        return None

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True)
    ) as session:
        answers = await asyncio.wait_for(asyncio.gather(*(one(i, session) for i in range(200))), 60)
    assert sum(answer is None for answer in answers) > 30, (
        "too few were cut off: nothing was tested"
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer is not None:
            assert answer == (chain(prompt, 300, VOCAB), "length")
    for _ in range(50):
        found = await asyncio.to_thread(gauges, fake_stack)
        if not found["num_requests_running"] and not found["num_requests_waiting"]:
            break
        await asyncio.sleep(0.2)
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (0, 0)
    assert found["kv_blocks_free"] == found["kv_blocks_total"] > 0


@pytest.mark.parametrize("kind", ["tokenizer", "worker", "scheduler"])
async def test_streams_survive_the_death_of_a(kind: str, fake_stack: Any) -> None:
    """Every stream goes on, with no token lost, doubled or wrong, through kill -9 in the middle."""
    await asyncio.to_thread(fake_stack.wait_serving)
    make = random.Random(kind)
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 200))] for _ in range(16)]
    victim = fake_stack.pid(kind)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [
            asyncio.create_task(stream(session, fake_stack.url, prompt, 600)) for prompt in prompts
        ]
        await asyncio.sleep(0.4)
        running = sum(not task.done() for task in streams)
        os.kill(victim, signal.SIGKILL)
        answers = await asyncio.wait_for(asyncio.gather(*streams), 60)
    assert running == 16, "the streams ended before the kill: nothing was tested"
    for prompt, (tokens, reason) in zip(prompts, answers, strict=True):
        assert tokens == chain(prompt, 600, VOCAB)
        assert reason == "length"
    await asyncio.to_thread(fake_stack.wait_serving)
    assert victim not in fake_stack.children()
