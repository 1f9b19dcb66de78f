"""A replica's stack, without Ray."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from e2e.conftest import gone
from pagewire.ray import local_stack
from pagewire.ray.arguments import new_parser, parse, plan_of
from pagewire.ray.forwarding import ForwardedRequest, Head, StackUnreachable
from pagewire.ray.local_stack import LocalStack, StackFailed
from ray_serve.conftest import STACK

HEALTH = ForwardedRequest("GET", "/health", (), b"")


def new_stack(failures: list[str], **settings: Any) -> LocalStack:
    flags = plan_of({**STACK, **settings}).stack_flags
    return LocalStack(parse(new_parser(), flags), lambda line: None, failures.append)


@asynccontextmanager
async def running(failures: list[str] | None = None, **settings: Any) -> AsyncIterator[LocalStack]:
    stack = new_stack([] if failures is None else failures, **settings)
    try:
        await stack.start()
        yield stack
    finally:
        await stack.close()


async def whole(stack: LocalStack, request: ForwardedRequest) -> Head:
    (head,) = [piece async for piece in stack.answer(request)]
    assert isinstance(head, Head)
    return head


async def test_a_stack_repairs_itself_before_it_counts_as_unhealthy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as stack:
        await stack.check_health()
        assert (await whole(stack, HEALTH)).status == 200
        first = stack.pids()
        os.kill(first["worker-0"], signal.SIGKILL)
        await stack.check_health()
        while stack.pids().get("worker-0") in (None, first["worker-0"]):
            await asyncio.sleep(0.02)
        while (await whole(stack, HEALTH)).status != 200:
            await asyncio.sleep(0.02)
        await stack.check_health()
        os.kill(stack.pids()["frontend-0"], signal.SIGSTOP)
        monkeypatch.setattr(local_stack, "PROBE_TIMEOUT_S", 0.05)
        monkeypatch.setattr(local_stack, "REPAIR_S", 0.0)
        with pytest.raises(StackFailed, match="served nothing for 0 s: the frontend does not"):
            await stack.check_health()
        os.kill(stack.pids()["frontend-0"], signal.SIGKILL)
        pids = list(stack.pids().values())
    assert await asyncio.to_thread(gone, pids, 5.0)
    with pytest.raises(StackFailed):
        await stack.check_health()


async def test_a_frontend_that_dies_before_it_answers_is_said_so() -> None:
    body = b'{"prompt": [1, 2], "max_tokens": 1000}'
    headers = (("Content-Type", "application/json"),)
    async with running(fake_step_ms=50, watchdog_timeout=0) as stack:
        answer = stack.answer(ForwardedRequest("POST", "/v1/completions", headers, body))
        first = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0.3)
        os.kill(stack.pids()["frontend-0"], signal.SIGKILL)
        with pytest.raises(StackUnreachable, match="the stack's frontend did not answer: "):
            await first


async def test_the_end_of_all_services_is_told_once_and_only_when_nobody_asked() -> None:
    failures: list[str] = []
    async with running(failures) as stack:
        assert stack._services is not None
        stack._services._supervisor.fail("the scheduler died 5 times")
        while not failures:
            await asyncio.sleep(0.02)
        with pytest.raises(StackFailed, match="the scheduler died 5 times"):
            await stack.check_health()
    assert failures == ["the scheduler died 5 times"]
    async with running(failures):
        pass
    assert len(failures) == 1


async def test_why_a_stack_cannot_start_is_said() -> None:
    failures: list[str] = []
    stack = new_stack(failures, api_keys_file="/no/such/file")
    with pytest.raises((OSError, ValueError), match="/no/such/file"):
        await stack.start()
    await stack.close()
    stack = new_stack(failures, device="cpu", model="/no/such/model")
    with pytest.raises(Exception, match="/no/such/model"):
        await stack.start()
    await stack.close()
    assert not failures
