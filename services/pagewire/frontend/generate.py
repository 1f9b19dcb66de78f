"""POST /v1/completions and /v1/chat/completions: from a body to streams, and from their reply to an
answer or an event stream."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from aiohttp import web
from msgspec.structs import replace

from ..requests.request import Job, OwnedRequest
from .answers import PLAIN
from .beams import start_beams
from .body import read_body
from .errors import JSON, ApiError
from .events import SseReply
from .openai import ChatRequest, CompletionRequest, Request
from .params import Plan, plan_chat, plan_completion
from .parsing import parse
from .reply import Echo, Reply
from .request_ids import adopt_request_id
from .request_log import REPLY
from .responses import formatter_for
from .state import STATE, State
from .tokenizer_queries import resolve

log = logging.getLogger("pagewire.frontend")
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
    """POST /v1/completions."""
    state = request.app[STATE]
    parsed = parse(CompletionRequest, await read_body(request, state.max_body))
    _check(state, parsed)
    return await _counted(request, state, plan_completion(parsed, state.stack.model()))


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    state = request.app[STATE]
    parsed = parse(ChatRequest, await read_body(request, state.max_body))
    _check(state, parsed)
    return await _counted(request, state, plan_chat(parsed, state.stack.model()))


def _check(state: State, parsed: Request) -> None:
    state.check_model(parsed.model)
    state.check_accepting()


async def _counted(request: web.Request, state: State, plan: Plan) -> web.StreamResponse:
    if state.force_usage and plan.rendering.stream:
        plan = replace(plan, rendering=replace(plan.rendering, include_usage=True))
    state.generating += 1
    try:
        return await _generate(request, state, plan)
    finally:
        state.generating -= 1


async def _generate(request: web.Request, state: State, plan: Plan) -> web.StreamResponse:
    request_id = adopt_request_id(request, plan.request_id)
    state.counters.params_n.observe(plan.choices.n)
    log.debug(
        "request %s: %s, %d choice(s) of %d prompt(s)",
        request_id,
        request.path,
        len(plan.jobs),
        len(plan.jobs) // plan.jobs_per_prompt,
    )
    jobs, echoes = await resolve(state, plan)
    jobs = _salted(jobs, state, request.get(TENANT, ""))
    reply = new_reply(state, plan, request_id, echoes)
    request[REPLY] = reply
    loop = asyncio.get_running_loop()
    cancel = start(state, plan, jobs, reply)
    timer = _limit_time(state, reply, loop)
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


def new_reply(state: State, plan: Plan, request_id: str, echoes: Sequence[Echo]) -> Reply:
    """The empty answer to a plan, an SseReply where it is streamed. `echoes`: one for each
    prompt."""
    formatter = formatter_for(plan.rendering, request_id, state.names[0])
    make_parser = state.chat_parser if formatter.has_structure else PLAIN
    loop = asyncio.get_running_loop()
    if plan.rendering.stream:
        return SseReply(formatter, loop, echoes, state.flusher, make_parser)
    return Reply(formatter, loop, echoes, make_parser)


def _limit_time(
    state: State, reply: Reply, loop: asyncio.AbstractEventLoop
) -> asyncio.TimerHandle | None:
    """A timer that ends the request with an error after --request-timeout; None without that."""
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


def start(state: State, plan: Plan, jobs: Sequence[Job], reply: Reply) -> Callable[[], None]:
    """Submit the jobs, whose output goes to `reply`. Returns a function that cancels those still
    running. Raises RequestError when no tokenizer can take them."""
    if plan.choices.beams:
        return start_beams(state, plan.choices.beams, jobs, reply)
    requests: list[OwnedRequest] = []
    reply.requests = requests

    def cancel() -> None:
        for request in requests:
            state.owner.cancel(request)

    try:
        for job, choice in zip(jobs, reply.choices, strict=True):
            requests.append(state.owner.submit(job, choice))
    except BaseException:
        cancel()
        raise
    return cancel


async def _opened(state: State, reply: Reply, loop: asyncio.AbstractEventLoop) -> None:
    """A stream begins when its first choice does, and after the keep-alive interval in any case."""
    is_kept_alive = isinstance(reply, SseReply) and state.keep_alive_s > 0
    timer = loop.call_later(state.keep_alive_s, reply.open) if is_kept_alive else None
    try:
        await reply.opened
    finally:
        if timer:
            timer.cancel()


async def _stream(request: web.Request, reply: SseReply) -> web.StreamResponse:
    """Send the head through aiohttp, then let the reply's outlet write to the transport itself;
    this task sleeps until the reply is done."""
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
    reply.outlet.pieces[:0] = reply.first_events()
    reply.outlet.attach(transport, chunked)
    try:
        await reply.done
        reply.outlet.flush()
    finally:
        reply.outlet.detach()
    await response.write_eof()
    return response
