"""Routes, and what happens around every request: keys, request ids, cross-origin headers, errors as
JSON. Knows handlers, not what they do."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import HttpVersion10, web
from pagewire_protocol.agreed import LAUNCHER_AGENT

from ..requests.errors import RequestError
from . import anthropic, responses_api
from .anthropic import CountRequest, MessagesRequest
from .anthropic_answers import PREFIX as ANTHROPIC
from .anthropic_answers import error_body
from .auth import NO_TENANT
from .errors import JSON, ApiError, as_api_error, renamed
from .generate import STREAMING, TENANT, chat_completions, completions, messages, responses
from .openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .openapi import ROUTES, Route, openapi
from .pages import docs, docs_without_key, home
from .probes import (
    accepting,
    health,
    live,
    load,
    metrics,
    model,
    model_info,
    models,
    ready,
    server_info,
    version,
)
from .request_ids import HEADER, request_id
from .request_log import CLIENT_GONE, log_request
from .responses_api import ResponsesRequest
from .routes import method_of, route_of
from .sse import encode
from .state import STATE, State
from .tokens import (
    count_tokens,
    detokenize,
    render_chat,
    render_completion,
    tokenize,
    tokenizer_info,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger("pagewire.frontend")
RESPONSES: Final = "/v1/responses"
_UNAUTHORIZED: Final = b'{"error": "Unauthorized"}'


def make_app(state: State) -> web.Application:
    """The application that serves all routes, for the process whose parts are `state`."""
    app = web.Application(middlewares=[_guard], client_max_size=state.max_body)
    app[STATE] = state
    app.on_response_prepare.append(_finish_headers)
    described = _DESCRIPTION if state.has_docs else ()
    app[ROUTES] = routes = (*_API, *_PROBES, *_PAGES, *described)
    for route in routes:
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.path, route.handler)
    return app


_API: Final = (
    Route(
        "POST", "/v1/chat/completions", chat_completions, "An answer in a conversation", ChatRequest
    ),
    Route("POST", "/v1/completions", completions, "Text after a prompt", CompletionRequest),
    Route("POST", RESPONSES, responses, "OpenAI's Responses API", ResponsesRequest),
    Route("POST", "/v1/messages", messages, "Anthropic's Messages API", MessagesRequest),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        count_tokens,
        "The tokens of a request to it",
        CountRequest,
    ),
    Route("GET", "/v1/models", models, "The names that requests may use"),
    Route("GET", "/v1/models/{id:.+}", model, "One of them"),
    Route(
        "POST", "/tokenize", tokenize, "The tokens of a prompt or a conversation", TokenizeRequest
    ),
    Route("POST", "/detokenize", detokenize, "The text of tokens", DetokenizeRequest),
    Route(
        "POST",
        "/v1/chat/completions/render",
        render_chat,
        "The token ids of a conversation's prompt, without an answer",
        ChatRequest,
    ),
    Route(
        "POST",
        "/v1/completions/render",
        render_completion,
        "The token ids of prompts, without an answer",
        CompletionRequest,
    ),
    Route("GET", "/tokenizer_info", tokenizer_info, "The tokenizer's settings"),
    Route("GET", "/load", load, "How many requests this process owns"),
    *(
        Route("GET", f"{prefix}{name}", handler, f"What SGLang's router asks of a {subject}")
        for prefix in ("/", "/get_")  # SGLang's newer and older names
        for name, handler, subject in (
            ("server_info", server_info, "server"),
            ("model_info", model_info, "model"),
        )
    ),
)
_PROBES: Final = (
    Route(
        "GET", "/health", health, "200 when generation is possible, else 503 and what is loading"
    ),
    Route("GET", "/ping", health, "The same"),
    Route("POST", "/ping", health, "The same"),
    Route("GET", "/ready", ready, "The same, with a body"),
    Route("GET", "/live", live, "200 from any process that can answer"),
    Route("GET", "/accepting", accepting, "200 while new requests are welcome, then 404"),
    Route("GET", "/version", version, "The server's version"),
    Route("GET", "/metrics", metrics, "Metrics in Prometheus' text format"),
)
_PAGES: Final = (
    Route("GET", "/", home, "A page to chat with the model, for browsers"),
    Route("GET", "/v1", home, "The same"),
    Route("GET", "/v1/", home, "The same"),
)
_DESCRIPTION: Final = (
    Route("GET", "/openapi.json", openapi, "This description"),
    Route("GET", "/docs", docs, "This description as a page, for browsers"),
)
_OPEN: Final = frozenset({home, *(route.handler for route in _PROBES)})
"""The handlers that need no key. Any other route does, by default."""


# --- around every request ---


def handler_of(request: web.Request) -> object:
    """Of the request's route."""
    return request.match_info.handler


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Around every handler: refuse a request without a key, except for the probes; turn every
    failure into a body that clients can read."""
    state = request.app[STATE]
    began = state.clock()
    status = CLIENT_GONE
    try:
        response = _turned_away(state, request)
        if response is None:
            response = await handler(request)
        status = response.status
        return response
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception as error:
        response = _failed(request, error)
        status = response.status
        return response
    finally:
        if request.headers.get("User-Agent") != LAUNCHER_AGENT:
            state.counters.responded(method_of(request), route_of(request), status)
        if state.log_requests and handler_of(request) not in _OPEN:
            log_request(request, status, began, state.clock())


def _failed(request: web.Request, error: Exception) -> web.Response:
    """The answer to a request whose handler has raised `error`."""
    if isinstance(error, (ApiError, RequestError)):
        return _error(request, as_api_error(error))
    if isinstance(error, web.HTTPException):
        return _error(request, _of_http(request, error))
    log.error("request %s failed", request.path, exc_info=error)
    if STREAMING in request and request.transport:
        # The head of an answer has been sent: only a broken connection tells the client now.
        request.transport.abort()
    return _error(request, ApiError(500, "The server failed on this request; its log says why."))


def _turned_away(state: State, request: web.Request) -> web.Response | None:
    """The answer to a request that no handler is to see; None where it may pass. A preflight
    (OPTIONS) carries no key: a browser sends it before it may send one. Raises ApiError."""
    if request.version < HttpVersion10:
        raise ApiError(400, "The request has no HTTP version; send HTTP/1.1.")
    if request.method == "OPTIONS":
        if "Origin" in request.headers and "Access-Control-Request-Method" in request.headers:
            status, text, headers = state.cors.preflight(request.headers)
            return web.Response(text=text, status=status, headers=headers)
        return None
    handler = handler_of(request)
    if handler in _OPEN:
        return None
    tenant = state.auth.tenant(_keys(request)) if state.auth.required else NO_TENANT
    if tenant is not None:
        request[TENANT] = tenant
        return None
    if handler is docs:
        return docs_without_key()
    if request.path.startswith(ANTHROPIC):
        raise ApiError(401, "The API key is missing or wrong.")
    return web.Response(
        body=_UNAUTHORIZED,
        status=401,
        headers={"WWW-Authenticate": "Bearer"},
        content_type=JSON,
    )


def _keys(request: web.Request) -> list[str]:
    """The values of Authorization; without any, the key that Anthropic's clients send."""
    values = request.headers.getall("Authorization", [])
    if not values:
        values = [f"Bearer {key}" for key in request.headers.getall("x-api-key", [])]
    return values


async def _finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers[HEADER] = request_id(request)
    response.headers["Server"] = "pagewire"
    if request.app[STATE].stack.leaving:
        # The client's next request finds another process.
        response.headers["Connection"] = "close"
        response.force_close()
    if tenant := request.get(TENANT):
        state = request.app[STATE]
        response.headers.update(state.key_limits.headers(tenant, state.clock()))
    if origin := request.headers.get("Origin"):
        response.headers.update(request.app[STATE].cors.headers(origin))


def _error(request: web.Request, error: ApiError) -> web.Response:
    is_anthropic = request.path.startswith(ANTHROPIC)
    if is_anthropic:
        error = renamed(error, anthropic.NAMES)
    elif request.path == RESPONSES:
        error = renamed(error, responses_api.NAMES)
    body = encode(error_body(error)) if is_anthropic else error.body()
    return web.Response(body=body, status=error.status, headers=error.headers(), content_type=JSON)


def _of_http(request: web.Request, error: web.HTTPException) -> ApiError:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        failure = ApiError(405, f"{request.method} is not allowed here; use {allowed}.")
        failure.headers = lambda: {"Allow": allowed}
        return failure
    if error.status == 404:
        return ApiError(
            404,
            "There is no such route; generation is at /v1/completions and /v1/chat/completions.",
        )
    return ApiError(error.status, error.reason)
