"""POST /v1/completions and /v1/chat/completions: from a body to streams, and from their reply to an
answer or an event stream."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from aiohttp import web
from msgspec.structs import replace

from ..requests.errors import timed_out
from ..requests.parameters import MAX_INT32
from ..requests.request import OwnedRequest, prompt_size
from .anthropic import log_ignored
from .anthropic_answers import MessagesFormatter, MessagesWriter
from .beams import start_beams
from .body import HeldBody, read_body
from .errors import JSON
from .events import SseReply
from .params import Plan
from .reading import BodyType
from .rendering import Rendering
from .reply import Echo, Reply
from .request_ids import adopt_request_id
from .request_log import REPLY
from .response_answers import ResponsesFormatter, ResponsesWriter
from .responses import ResponseFormatter, formatter_for
from .state import STATE, State
from .tokenizer_queries import resolve
from .turns import Turn
from .typed_events import EventWriter, TypedSseReply

log = logging.getLogger("pagewire.frontend")
STREAMING: Final = web.RequestKey("streaming", bool)
"""Set on a request whose answer's head may be on its way: no other answer can follow."""
TENANT: Final = web.RequestKey("tenant", str)
"""What a request's key adds to its cache salt: the prefix cache shows nobody what holders of other
keys have sent."""
IGNORED_KEYWORDS: Final = "X-Ignored-Schema-Keywords"
"""A header of answers whose schemas are not held strictly."""
_EVENTS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions."""
    return await _answer(request, "completion")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    return await _answer(request, "chat")


async def responses(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses."""
    return await _answer(request, "responses")


async def messages(request: web.Request) -> web.StreamResponse:
    """POST /v1/messages."""
    return await _answer(request, "messages")


async def _answer(request: web.Request, body_type: BodyType) -> web.StreamResponse:
    state = request.app[STATE]
    tenant = request[TENANT]
    state.admission.check()
    lease = state.key_limits.admit(tenant, state.clock())
    try:
        plan: Plan = await read_plan(request, state, body_type)
        log_ignored(plan.ignored, state.ignored)
        state.check_accepting()
        per_prompt = plan.choices.executions
        prompt_tokens = sum(map(prompt_size, plan.prompts))
        state.admission.check(per_prompt * len(plan.prompts), per_prompt * prompt_tokens)
        lease.charge(prompt_tokens)
        if lease.priority:
            # A request may let others pass, and overtakes none that its key may not.
            own = max(0, plan.priority)
            plan = replace(plan, priority=min(MAX_INT32, lease.priority + own))
        if tenant:
            plan = replace(plan, cache_salt=state.auth.salt(tenant, plan.cache_salt))
        if state.force_usage and plan.rendering.stream:
            plan = replace(plan, rendering=replace(plan.rendering, include_usage=True))
        return await _generate(request, state, plan)
    finally:
        if lease.is_counted:
            reply = request.get(REPLY)
            lease.close(*(reply.used_tokens() if reply else (0, 0)))


async def read_plan(request: web.Request, state: State, body_type: BodyType) -> Any:
    """What the request's body asks for. Raises ApiError or RequestError."""
    with HeldBody(state.large_bodies) as held:
        body = await read_body(request, state.max_body, held)
        return await state.body_readers.read(body_type, body, state.served())


async def _generate(request: web.Request, state: State, plan: Plan) -> web.StreamResponse:
    request_id = adopt_request_id(request, plan.request_id)
    state.counters.params_n.observe(plan.choices.n)
    if log.isEnabledFor(logging.DEBUG):
        log.debug(
            "request %s: %s, %d choice(s) of %d prompt(s)",
            request_id,
            request.path,
            len(plan.prompts) * plan.choices.per_prompt,
            len(plan.prompts),
        )
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None
    running = Running(state)
    try:
        plan, echoes = await resolve(state, plan)
        reply = new_reply(state, plan, request_id, echoes)
        request[REPLY] = reply
        timer = _limit_time(state, reply, loop)
        await running.start(plan, reply)
        await _opened(state, reply, loop)
        if isinstance(reply, SseReply) and not (reply.error and not reply.outlet.pieces):
            return await _stream(request, reply)
        await reply.done
        if reply.error:
            raise reply.error
        body = await reply.body()
        return web.Response(body=body, content_type=JSON, headers=_headers(reply))
    finally:
        running.end()
        if timer:
            timer.cancel()


def new_reply(state: State, plan: Plan, request_id: str, echoes: Sequence[Echo]) -> Reply:
    """The empty answer to a plan, an SseReply where it is streamed. `echoes`: one for each
    prompt."""
    rendering = plan.rendering
    loop = asyncio.get_running_loop()
    formatter, writer = _form_of(rendering, request_id, state.names[0])
    if not rendering.stream:
        return Reply(formatter, loop, echoes)
    if writer is not None:
        return TypedSseReply(formatter, loop, echoes, state.flusher, state.owner.park, writer)
    return SseReply(formatter, loop, echoes, state.flusher, state.owner.park)


def _form_of(
    rendering: Rendering, request_id: str, model: str
) -> tuple[ResponseFormatter, EventWriter | None]:
    """What makes the bodies of an answer, and what its events where these have names."""
    if rendering.api == "messages":
        messages = MessagesFormatter(rendering, request_id, model)
        return messages, MessagesWriter(messages)
    if rendering.api == "responses":
        items = ResponsesFormatter(rendering, request_id, model)
        return items, ResponsesWriter(items)
    return formatter_for(rendering, request_id, model), None


def _limit_time(
    state: State, reply: Reply, loop: asyncio.AbstractEventLoop
) -> asyncio.TimerHandle | None:
    """A timer that ends the request with an error after --request-timeout; None without that."""
    seconds = state.request_timeout_s
    if not seconds:
        return None
    message = f"The request was not answered within {seconds:g} s (--request-timeout); ask for fewer tokens, or try again later."
    return loop.call_later(seconds, reply.fail, timed_out(message))


class Running:
    """What runs for one HTTP request, from here to `end`."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._requests: list[OwnedRequest] = []
        self._cancel_beams: Callable[[], None] | None = None
        state.generating += 1

    async def start(self, plan: Plan, reply: Reply) -> None:
        """Submit the jobs, whose output goes to `reply`, a few at a time: each carries its
        prompt. Raises RequestError when no tokenizer can take them."""
        if plan.choices.beams:
            jobs = [job for prompt in plan.prompts for job in plan.jobs(prompt)]
            self._cancel_beams = start_beams(self._state, plan.choices.beams, jobs, reply)
            return
        reply.requests = self._requests
        timeout_s = self._state.request_timeout_s
        choices = iter(reply.choices)
        turn = Turn()
        for prompt in plan.prompts:
            for job in plan.jobs(prompt):
                request = self._state.owner.submit(job, next(choices), timeout_s)
                self._requests.append(request)
                if turn.is_over():
                    await turn.next()

    def end(self) -> None:
        """The answer is complete, or given up: cancel what still runs. Once."""
        self._state.generating -= 1
        if self._cancel_beams:
            self._cancel_beams()
        for request in self._requests:
            self._state.owner.cancel(request)


async def _opened(state: State, reply: Reply, loop: asyncio.AbstractEventLoop) -> None:
    """A stream begins when its first choice does, and after the keep-alive interval in any case."""
    is_kept_alive = isinstance(reply, SseReply) and state.keep_alive_s > 0
    timer = loop.call_later(state.keep_alive_s, reply.open) if is_kept_alive else None
    try:
        await reply.opened
    finally:
        if timer:
            timer.cancel()


def _headers(reply: Reply) -> dict[str, str]:
    return {IGNORED_KEYWORDS: reply.ignored} if reply.ignored else {}


async def _stream(request: web.Request, reply: SseReply) -> web.StreamResponse:
    """Send the head through aiohttp, then let the reply's outlet write to the transport itself;
    this task sleeps until the reply is done."""
    request[STREAMING] = True
    response = web.StreamResponse(headers={**_EVENTS, **_headers(reply)})
    chunked = request.version >= (1, 1)
    if chunked:
        response.enable_chunked_encoding()
    else:
        response.force_close()  # nothing but the end of the connection says where the stream ends
    try:
        await response.prepare(request)
        await response.write(b"")
    except ConnectionResetError:
        return response  # the client has left
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
    with contextlib.suppress(ConnectionResetError):  # the client has left
        await response.write_eof()
    return response
