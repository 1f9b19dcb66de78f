"""Routes, and what happens around every request: keys, request ids, errors as JSON. Knows handlers, not what they do."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from aiohttp import web

from pagewire.version import __version__

from .errors import JSON, ApiError, unknown_model
from .generate import STREAMING, chat_completions, completions
from .metrics import CONTENT_TYPE, render
from .state import STATE, State

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger("pagewire.frontend")
MAX_REQUEST_ID: Final = 128
_UNAUTHORIZED: Final = b'{"error": "Unauthorized"}'


def make_app(state: State) -> web.Application:
    app = web.Application(middlewares=[_guard], client_max_size=state.max_body)
    app[STATE] = state
    app.on_response_prepare.append(_finish_headers)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{id:.+}", model)
    for path, handler in PROBES.items():
        app.router.add_get(path, handler)
    return app


# --- around every request ---


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse without a key, except for the probes; turn every failure into a body that clients can read."""
    state = request.app[STATE]
    try:
        if request.match_info.handler not in _OPEN and not state.auth.allows(request.headers.getall("Authorization", [])):
            response: web.StreamResponse = _unauthorized()
        else:
            response = await handler(request)
    except ApiError as error:
        response = _error(error)
    except web.HTTPException as error:
        response = _error(_of_http(request, error))
    except (asyncio.CancelledError, ConnectionError):
        state.tally.responded(499)
        raise
    except Exception:
        log.exception("request %s failed", request.path)
        if STREAMING in request and request.transport:
            request.transport.abort()
        response = _error(ApiError(500, "The server failed on this request; its log says why."))
    state.tally.responded(response.status)
    return response


async def _finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    given = request.headers.get("X-Request-Id", "")
    usable = given.isascii() and given.isprintable() and 0 < len(given) <= MAX_REQUEST_ID
    response.headers["X-Request-Id"] = given if usable else uuid.uuid4().hex
    response.headers["Server"] = "pagewire"


def _error(error: ApiError) -> web.Response:
    return web.Response(body=error.body(), status=error.status, headers=error.headers(), content_type=JSON)


def _unauthorized() -> web.Response:
    return web.Response(body=_UNAUTHORIZED, status=401, headers={"WWW-Authenticate": "Bearer"}, content_type=JSON)


def _of_http(request: web.Request, error: web.HTTPException) -> ApiError:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        failure = ApiError(405, f"{request.method} is not allowed here; use {allowed}.")
        failure.headers = lambda: {"Allow": allowed}
        return failure
    if error.status == 404:
        return ApiError(404, "There is no such route; generation is at /v1/completions and /v1/chat/completions.")
    return ApiError(error.status, error.reason)


# --- routes ---


async def models(request: web.Request) -> web.Response:
    state = request.app[STATE]
    return _json({"object": "list", "data": [_card(state, name) for name in state.names]})


async def model(request: web.Request) -> web.Response:
    state, name = request.app[STATE], request.match_info["id"]
    if name not in state.names:
        raise unknown_model(name, state.names)
    return _json(_card(state, name))


def _card(state: State, name: str) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": state.started,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "pagewire",
        "root": state.names[0],
        "parent": None,
        "max_model_len": state.stack.model().max_model_len or None,
        "permission": [permission],
    }


async def health(request: web.Request) -> web.Response:
    """200 and nothing when generation is possible; else 503 and what is loading."""
    request.app[STATE].check_ready()
    return web.Response()


async def ready(request: web.Request) -> web.Response:
    request.app[STATE].check_ready()
    return _json({"status": "ready"})


async def live(request: web.Request) -> web.Response:
    """An answer at all is the proof; the lag says how close to none."""
    return _json({"status": "live", "event_loop_lag_ms": round(1000 * request.app[STATE].lag_s, 3)})


async def version(request: web.Request) -> web.Response:
    return _json({"version": __version__})


async def metrics(request: web.Request) -> web.Response:
    return web.Response(body=render(request.app[STATE]), headers={"Content-Type": CONTENT_TYPE})


def _json(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type=JSON)


PROBES: Final[dict[str, Handler]] = {"/health": health, "/live": live, "/ready": ready, "/version": version, "/metrics": metrics}
_OPEN: Final = frozenset(PROBES.values())
"""The handlers that need no key. Any other route does, by default."""
