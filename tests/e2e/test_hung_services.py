"""Services that stop or spin without ending: found by the progress that they no longer make, and
replaced, while the streams go on."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from e2e.conftest import children_of, gone
from e2e.test_stack_fake import VOCAB, stream
from e2e.test_stack_life import FAKE
from pagewire.worker.fake import chain


@pytest.fixture(scope="module")
def slow_stack(start_stack: Callable[..., Any]) -> Any:
    """Two milliseconds a token, so that streams are under way when something happens."""
    fake = (*FAKE, "--fake-vocab-size", str(VOCAB), "--fake-step-ms", "2")
    fake = (*fake, "--watchdog-timeout", "1")
    return start_stack(*fake).wait_ready()


async def streams_survive(stack: Any, accident: Callable[[], None], tokens: int = 600) -> None:
    """16 streams are under way when `accident` happens; each ends with its own tokens."""
    await asyncio.to_thread(stack.wait_serving)
    make = random.Random(5)
    prompts = [[make.randrange(VOCAB) for _ in range(make.randrange(1, 200))] for _ in range(16)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [
            asyncio.create_task(stream(session, stack.url, prompt, tokens)) for prompt in prompts
        ]
        await asyncio.sleep(0.4)
        assert not any(task.done() for task in streams), "nothing was under way"
        await asyncio.to_thread(accident)
        answers = await asyncio.wait_for(asyncio.gather(*streams), 60)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == (chain(prompt, tokens, VOCAB), "length")


@pytest.mark.parametrize("kind", ["worker", "tokenizer", "scheduler"])
async def test_a_stopped_service_is_replaced_and_its_streams_go_on(
    kind: str, slow_stack: Any
) -> None:
    victim = slow_stack.pid(kind)
    try:
        await streams_survive(slow_stack, lambda: os.kill(victim, signal.SIGSTOP))
        assert gone([victim], 0), "the stopped process is still there"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    assert any("no progress" in line and kind in line for line in slow_stack.lines)


def test_a_stopped_frontend_is_replaced(slow_stack: Any) -> None:
    slow_stack.wait_serving()
    victim = slow_stack.pid("frontend")
    os.kill(victim, signal.SIGSTOP)
    try:
        assert gone([victim], 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    slow_stack.wait_serving()


@pytest.mark.parametrize("kind", ["scheduler", "worker", "tokenizer", "frontend"])
def test_a_service_without_a_supervisor_is_ended_by_its_watchdog(kind: str) -> None:
    """As in a container: the process that the container manager sees ends with a reason."""
    device = {"worker": ("--device", "fake"), "frontend": ("--host", "127.0.0.1", "--port", "0")}
    with tempfile.TemporaryDirectory(prefix="pw-") as run_dir:
        words = [
            sys.executable,
            "-m",
            "pagewire",
            kind,
            "--watchdog-timeout",
            "0.5",
            "--run-dir",
            run_dir,
            *device.get(kind, ()),
        ]
        if kind != "scheduler":
            words.append("--skip-tokenizer-init")
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        try:
            inside = wait(lambda: list(children_of(process.pid)))
            wait(lambda: list(Path(run_dir).glob(f"{kind}*.sock")))
            time.sleep(0.5)
            os.kill(inside[0], signal.SIGSTOP)
            assert process.wait(30) == 1
            assert gone(inside, 1)
        finally:
            process.kill()
        assert process.stderr is not None
        assert "no progress" in process.stderr.read().strip().splitlines()[-1]
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_watchdog_passes_signals_on_and_ends_as_its_service_does(number: signal.Signals) -> None:
    with tempfile.TemporaryDirectory(prefix="pw-") as run_dir:
        words = [sys.executable, "-m", "pagewire", "scheduler", "--run-dir", run_dir]
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        try:
            inside = wait(lambda: list(children_of(process.pid)))
            wait(lambda: list(Path(run_dir).glob("scheduler.sock")))
            process.send_signal(number)
            assert process.wait(10) == 0
            assert gone(inside, 1)
        finally:
            process.kill()
            process.wait()


def wait(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := what():
            return result
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")
