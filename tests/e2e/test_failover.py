"""What clients see of services that die: new requests wait for the next life, requests that end
their workers are found out, and one replica that keeps failing leaves the others in peace."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from e2e import poisoned_stack as poisoned_program
from e2e.conftest import SERVE, Stack
from e2e.poisoned_stack import POISON, STATUS
from e2e.test_hung_services import streams_survive, wait
from e2e.test_stack_fake import VOCAB, ask, gauges, stream
from e2e.test_stack_life import FAKE
from pagewire.worker.fake import chain


@pytest.fixture(scope="module")
def pair(start_stack: Callable[..., Stack]) -> Stack:
    """Two of each but the scheduler."""
    fake = ("--device", "fake", "--skip-tokenizer-init", "--fake-vocab-size", str(VOCAB))
    two = ("--num-frontends", "2", "--num-tokenizers", "2", "--num-workers", "2")
    return start_stack(*fake, *two, "--fake-step-ms", "2").wait_ready()


# --- new requests while something is started again ---


async def requests_meanwhile(
    stack: Stack, kind: str, number: signal.Signals = signal.SIGKILL
) -> list[int]:
    """The statuses of requests, each on a connection of its own, that come every 20 ms for a while
    in which a service gets a signal."""
    await asyncio.to_thread(stack.wait_serving)
    body = {"prompt": [1, 2, 3], "max_tokens": 4}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one() -> int:
            async with session.post(f"{stack.url}/completions", json=body) as answer:
                await answer.read()
                return answer.status

        tasks: list[asyncio.Task[int]] = []
        for sent in range(100):
            if sent == 10:
                os.kill(stack.pid(kind), number)
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(0.02)
        return await asyncio.wait_for(asyncio.gather(*tasks), 60)


@pytest.mark.parametrize("kind", ["worker", "tokenizer", "scheduler"])
async def test_requests_that_come_during_a_restart_wait_for_it(kind: str, fake_stack: Any) -> None:
    assert set(await requests_meanwhile(fake_stack, kind)) == {200}


async def test_a_frontend_that_is_told_to_end_leaves_new_connections_to_the_other(
    pair: Stack,
) -> None:
    statuses = await requests_meanwhile(pair, "frontend", signal.SIGTERM)
    assert set(statuses) == {200}


# --- distrust ---


async def test_scores_of_long_prompts_beside_streams_cost_no_worker_its_place(
    fake_stack: Any,
) -> None:
    """More tokens than one step takes: the part of a prompt that a step did not run is not scored
    with it."""
    worker = fake_stack.pid("worker")
    body = {"prompt": [[7] * 8000] * 6, "prompt_logprobs": 0, "max_tokens": 1}

    def score() -> None:
        request = urllib.request.Request(
            f"{fake_stack.url}/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            choices = json.load(answer)["choices"]
        assert [len(choice["prompt_logprobs"]) for choice in choices] == [8000] * 6

    scoring = asyncio.create_task(asyncio.to_thread(score))
    async with aiohttp.ClientSession() as session:
        streams = (stream(session, fake_stack.url, [5, 6], 200) for _ in range(8))
        answers = await asyncio.gather(*streams)
    await scoring
    assert answers == [(chain([5, 6], 200, VOCAB), "length")] * 8
    assert fake_stack.pid("worker") == worker


# --- a request that ends its workers ---


@pytest.fixture(scope="module")
def poisoned_stack() -> Iterator[Stack]:
    fake = (*FAKE, "--fake-vocab-size", str(VOCAB), "--fake-step-ms", "2")
    stack = Stack(*fake, command=(poisoned_program.__file__, *SERVE[2:]))
    yield stack
    stack.end()


async def test_a_request_that_ends_each_worker_fails_and_the_others_go_on(
    poisoned_stack: Stack,
) -> None:
    stack = poisoned_stack
    await asyncio.to_thread(stack.wait_ready)

    def poison() -> Any:
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(stack, [POISON, 2, 3], 5)
        with caught.value as error:
            return error.code, json.load(error)["error"]["type"]

    async with aiohttp.ClientSession() as session:
        streams = [
            asyncio.create_task(stream(session, stack.url, [5, number], 1000))
            for number in range(8)
        ]
        await asyncio.sleep(0.3)
        assert await asyncio.to_thread(poison) == (500, "request_poisoned")
        assert not any(task.done() for task in streams), "they ended before it did"
        answers = await asyncio.wait_for(asyncio.gather(*streams), 60)
    assert answers == [(chain([5, number], 1000, VOCAB), "length") for number in range(8)]
    assert sum(f"exit code {STATUS}" in line and "starting" in line for line in stack.lines) == 3


# --- one replica of several ---


def pid_of(stack: Stack, name: str) -> int | None:
    """Of the present process of one replica."""
    for pid in stack.children():
        with contextlib.suppress(OSError):
            if f"--name={name}" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                return pid
    return None


async def test_a_replica_that_keeps_failing_costs_the_other_nothing(pair: Stack) -> None:
    """It is killed four times, each as soon as it is started, and named by /ready while it waits for
    its next life."""

    def failing() -> list[str]:
        return [entry["name"] for entry in pair.get("/ready").get("failing", [])]

    def kill_often() -> None:
        killed = set[int]()
        while len(killed) < 4:
            pid = wait(lambda: pid_of(pair, "worker-1"))
            if pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        assert wait(failing) == ["worker-1"]

    await asyncio.to_thread(wait, lambda: gauges(pair)["workers"] == 2)
    before = gauges(pair)["service_deaths_total"]
    await streams_survive(pair, kill_often, tokens=800)
    await asyncio.to_thread(wait, lambda: gauges(pair)["workers"] == 2)
    await asyncio.to_thread(wait, lambda: gauges(pair)["service_deaths_total"] == before + 4)
    await asyncio.to_thread(wait, lambda: not gauges(pair)["services_failing"])
    await asyncio.to_thread(wait, lambda: not failing())


@pytest.mark.parametrize("kind", ["worker", "tokenizer"])
async def test_streams_of_a_dead_service_go_on_at_its_survivor_at_once(
    kind: str, pair: Stack
) -> None:
    await asyncio.to_thread(wait, lambda: gauges(pair)["workers"] == 2)
    await streams_survive(pair, lambda: os.kill(pair.pid(kind), signal.SIGKILL))


# --- processes that were given up, and are back ---

GIVEN_UP_S = 0.8
IMPATIENT = f"""
import sys
from pagewire_protocol import structs
structs.SILENCE_S = {GIVEN_UP_S}
from pagewire.process import membership
from pagewire.scheduler import peers, state
membership.HEARTBEAT_S = state.HOUSEKEEPING_S = 0.2
peers.PAUSE_S = state.PAUSE_S = 0.5
from pagewire.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def unsupervised() -> Iterator[Any]:
    """A stack of four services that nobody watches, in which a peer that is silent for
    most of a second is given up."""
    fake = ("--device", "fake", "--fake-vocab-size", str(VOCAB), "--fake-step-ms", "10")
    with tempfile.TemporaryDirectory(prefix="pw-") as run_dir:
        services = {
            "scheduler": (),
            "worker": fake,
            "tokenizer": (),
            "frontend": ("--host", "127.0.0.1", "--port", "0"),
        }
        common = ("--run-dir", run_dir, "--watchdog-timeout", "0", "--skip-tokenizer-init")
        processes = {
            kind: subprocess.Popen(
                [sys.executable, "-c", IMPATIENT, kind, *common, *flags],
                stderr=subprocess.PIPE if kind == "frontend" else None,
                text=True,
            )
            for kind, flags in services.items()
        }
        try:
            frontend = processes["frontend"]
            assert frontend.stderr is not None
            line = next(line for line in frontend.stderr if "listening on" in line)
            url = f"http://{line.split('listening on ')[1].split()[0]}/v1"
            wait(lambda: is_healthy(url))
            yield url, processes
        finally:
            for process in processes.values():
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()
            assert frontend.stderr is not None
            frontend.stderr.close()


def is_healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url[:-3] + "/health") as answer:
        return answer.status == 200
    return False


@pytest.mark.parametrize("kind", ["frontend", "tokenizer", "worker", "scheduler"])
async def test_streams_end_as_they_should_when_a_service_was_frozen_and_given_up(
    kind: str, unsupervised: Any
) -> None:
    url, processes = unsupervised
    await asyncio.to_thread(wait, lambda: is_healthy(url))
    make = random.Random(kind)
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 50))] for _ in range(16)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [asyncio.create_task(stream(session, url, prompt, 100)) for prompt in prompts]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in streams)
        processes[kind].send_signal(signal.SIGSTOP)
        await asyncio.sleep(GIVEN_UP_S + 0.5)
        processes[kind].send_signal(signal.SIGCONT)
        answers = await asyncio.wait_for(asyncio.gather(*streams), 60)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == (chain(prompt, 100, VOCAB), "length")
