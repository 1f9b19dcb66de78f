"""POST /v1/completions and /v1/chat/completions: from a body to streams, and from their reply to an
answer or an event stream."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from aiohttp import web
from msgspec.structs import replace

from ..requests.errors import JSON, ApiError
from ..requests.request import Job, Stream
from .beams import search_all
from .body import read_body
from .events import SseReply
from .openai import ChatRequest, CompletionRequest, Request
from .params import Plan, plan_chat, plan_completion
from .parsing import parse
from .questions import resolve
from .reply import Reply
from .request_ids import adopt_request_id
from .responses import Shape
from .state import STATE, State

STREAMING: Final = web.RequestKey("streaming", bool)
"""Set on a request whose answer's head may be on its way: no other answer can follow."""
TENANT: Final = web.RequestKey("tenant", str)
"""What a request's key adds to its cache salt: the prefix cache shows nobody what holders of other
keys have sent."""
_EVENTS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


async def completions(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    parsed = parse(CompletionRequest, await read_body(request, state.max_body))
    _check(state, parsed)
    return await _counted(request, state, plan_completion(parsed, state.stack.model()))


async def chat_completions(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    parsed = parse(ChatRequest, await read_body(request, state.max_body))
    _check(state, parsed)
    return await _counted(request, state, plan_chat(parsed, state.stack.model()))


def _check(state: State, parsed: Request) -> None:
    state.check_model(parsed.model)
    state.check_ready()


async def _counted(request: web.Request, state: State, plan: Plan) -> web.StreamResponse:
    if state.force_usage and plan.stream:
        plan = replace(plan, include_usage=True)
    state.generating += 1
    try:
        return await _generate(request, state, plan)
    finally:
        state.generating -= 1


async def _generate(request: web.Request, state: State, plan: Plan) -> web.StreamResponse:
    shape = Shape(
        plan,
        ("chatcmpl-" if plan.chat else "cmpl-") + adopt_request_id(request, plan.request_id),
        state.names[0],
    )
    state.tally.params_n.observe(plan.n)
    jobs, echoes = await resolve(state, plan)
    jobs = _salted(jobs, state, request.get(TENANT, ""))
    loop = asyncio.get_running_loop()
    reply = (
        SseReply(shape, loop, echoes, state.flusher) if plan.stream else Reply(shape, loop, echoes)
    )
    cancel, timer = start(state, plan, jobs, reply), _limit(state, reply, loop)
    try:
        await _opened(state, reply, loop)
        if isinstance(reply, SseReply) and not (reply.error and not reply.outlet.pieces):
            return await _stream(request, reply)
        await reply.done
        if reply.error:
            raise reply.error
        return web.Response(body=reply.body(), content_type=JSON)
    finally:
        cancel()
        if timer:
            timer.cancel()


def _limit(
    state: State, reply: Reply, loop: asyncio.AbstractEventLoop
) -> asyncio.TimerHandle | None:
    """What ends the request when its time is up."""
    seconds = state.request_timeout_s
    if not seconds:
        return None
    message = f"The request was not answered within {seconds:g} s (--request-timeout); ask for fewer tokens, or try again later."
    return loop.call_later(seconds, reply.fail, ApiError(504, message))


def _salted(jobs: Sequence[Job], state: State, tenant: str) -> Sequence[Job]:
    if not tenant:
        return jobs
    salt = state.auth.salt(tenant, jobs[0].cache_salt)
    return [replace(job, cache_salt=salt) for job in jobs]


def start(state: State, plan: Plan, jobs: Sequence[Job], reply: Reply) -> Callable[[], Any]:
    """Set the jobs going; what ends them is returned. Raises ApiError when none can take them."""
    if plan.beams:
        return asyncio.create_task(search_all(state, plan, jobs, reply)).cancel
    streams: list[Stream] = []

    def cancel() -> None:
        for stream in streams:
            state.owner.cancel(stream)

    try:
        for job, choice in zip(jobs, reply.choices, strict=True):
            streams.append(state.owner.submit(job, choice))
    except BaseException:
        cancel()
        raise
    return cancel


async def _opened(state: State, reply: Reply, loop: asyncio.AbstractEventLoop) -> None:
    """A stream begins when its first choice does, and after the keep-alive interval in any case."""
    waits = isinstance(reply, SseReply) and state.keep_alive_s > 0
    timer = loop.call_later(state.keep_alive_s, reply.open) if waits else None
    try:
        await reply.opened
    finally:
        if timer:
            timer.cancel()


async def _stream(request: web.Request, reply: SseReply) -> web.StreamResponse:
    """Send the head through aiohttp, then let the reply's outlet write to the transport itself;
    this task sleeps until the end."""
    request[STREAMING] = True
    response = web.StreamResponse(headers=_EVENTS)
    chunked = request.version >= (1, 1)
    if chunked:
        response.enable_chunked_encoding()
    await response.prepare(request)
    await response.write(b"")
    transport = request.transport
    if transport is None:
        return response
    reply.outlet.pieces[:0] = reply.greet()
    reply.outlet.attach(transport, chunked)
    try:
        await reply.done
        reply.outlet.flush()
    finally:
        reply.outlet.detach()
    await response.write_eof()
    return response
