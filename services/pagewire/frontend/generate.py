"""POST /v1/completions and /v1/chat/completions: from a body to streams, and from their reply to an answer or an event stream."""

import asyncio
import secrets
from typing import Final

from aiohttp import web

from .errors import JSON, ApiError, bad
from .openai import ChatRequest, CompletionRequest, Request, parse
from .params import Plan, plan_chat, plan_completion
from .reply import Reply, SseReply
from .responses import Shape
from .state import STATE, State
from .stream import Stream

BODY_S: Final = 60.0
"""How long a client may take to send its request."""
STREAMING: Final = "streaming"
"""Set on a request whose answer's head may be on its way: no other answer can follow."""
_EVENTS: Final = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def completions(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    parsed = parse(CompletionRequest, await read_body(request, state.max_body))
    _check(state, parsed)
    return await _generate(request, state, plan_completion(parsed, state.stack.model()))


async def chat_completions(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    parsed = parse(ChatRequest, await read_body(request, state.max_body))
    _check(state, parsed)
    return await _generate(request, state, plan_chat(parsed, state.stack.model()))


def _check(state: State, parsed: Request) -> None:
    state.check_model(parsed.model)
    state.check_ready()


async def read_body(request: web.Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises ApiError."""
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(415, f"Content-Encoding {encoding[:64]!r} is not supported; send the body uncompressed.")
    too_large = ApiError(413, f"The request body is larger than {limit} bytes ({limit >> 20} MiB); --max-body-mb sets the limit.")
    if (request.content_length or 0) > limit:
        raise too_large
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except TimeoutError:
        raise ApiError(408, f"The request body did not arrive within {BODY_S:.0f} s.") from None
    except (web.PayloadAccessError, web.RequestPayloadError, ConnectionResetError, ValueError):
        raise bad("The request body could not be read.") from None


async def _generate(request: web.Request, state: State, plan: Plan) -> web.StreamResponse:
    shape = Shape(plan, ("chatcmpl-" if plan.chat else "cmpl-") + secrets.token_hex(16), state.names[0])
    loop = asyncio.get_running_loop()
    reply = SseReply(shape, loop, state.flusher) if plan.stream else Reply(shape, loop)
    streams: list[Stream] = []
    try:
        for job, choice in zip(plan.jobs, reply.choices, strict=True):
            streams.append(state.owner.submit(job, choice))
        await reply.opened
        if isinstance(reply, SseReply) and not (reply.error and not reply.outlet.pieces):
            return await _stream(request, reply)
        await reply.done
        if reply.error:
            raise reply.error
        return web.Response(body=reply.body(), content_type=JSON)
    finally:
        for stream in streams:
            state.owner.cancel(stream)


async def _stream(request: web.Request, reply: SseReply) -> web.StreamResponse:
    """Send the head through aiohttp, then let the reply's outlet write to the transport itself; this task sleeps until the end."""
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
