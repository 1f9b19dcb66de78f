"""What a server reports of itself: whether it is alive, what it is loading, which models it has, how
busy it is. Generates nothing."""

from typing import Any

import msgspec
from aiohttp import web
from msgspec.structs import asdict
from pagewire_protocol.sampling import SamplingDefaults

from pagewire.version import __version__

from .errors import JSON, ApiError, unknown_model
from .metrics import CONTENT_TYPE, render
from .state import STATE, State


async def models(request: web.Request) -> web.Response:
    """GET /v1/models."""
    state = request.app[STATE]
    return _json({"object": "list", "data": [_card(state, name) for name in state.names]})


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/NAME. Raises ApiError 404."""
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
        "root": state.model_path,
        "parent": None,
        "max_model_len": state.stack.model().max_model_len or None,
        "permission": [permission],
        **_recommended(state.stack.model().sampling_defaults),
    }


def _recommended(defaults: SamplingDefaults) -> dict[str, Any]:
    """What the model recommends, by the names of requests, where it recommends anything."""
    stated = {name: value for name, value in asdict(defaults).items() if value is not None}
    return {"sampling_defaults": stated} if stated else {}


async def server_info(request: web.Request) -> web.Response:
    """GET /server_info, /get_server_info: what SGLang's router asks of a server, by SGLang's
    names."""
    state = request.app[STATE]
    info = {
        "model_path": state.model_path,
        "tokenizer_path": state.tokenizer_path,
        "served_model_name": state.names[0],
        "context_length": state.stack.model().max_model_len or None,
        "version": __version__,
        "status": "ready" if state.stack.ready(state.clock()) else "starting",
    }
    return _json(info)


async def model_info(request: web.Request) -> web.Response:
    """GET /model_info, /get_model_info: what SGLang's router asks of a model, by SGLang's names."""
    state = request.app[STATE]
    info = {
        "model_path": state.model_path,
        "tokenizer_path": state.tokenizer_path,
        "served_model_name": state.names[0],
        "is_generation": True,
    }
    return _json(info)


async def load(request: web.Request) -> web.Response:
    """GET /load: how many requests this process owns."""
    return _json({"server_load": len(request.app[STATE].owner)})


async def health(request: web.Request) -> web.Response:
    """GET or POST /health, /ping: 200 and nothing when generation is possible; else 503 and what is
    loading."""
    request.app[STATE].check_ready()
    return web.Response()


async def ready(request: web.Request) -> web.Response:
    """GET /ready: as /health, with a body, which names services that fail again and again."""
    state = request.app[STATE]
    state.check_ready()
    failing = state.stack.failing()
    return _json({"status": "ready", **({"failing": failing} if failing else {})})


async def live(request: web.Request) -> web.Response:
    """GET /live: 200 from any process that can answer, with how late its event loop is."""
    return _json({"status": "live", "event_loop_lag_ms": round(1000 * request.app[STATE].lag_s, 3)})


async def accepting(request: web.Request) -> web.Response:
    """GET /accepting: 200 from any process that takes requests, also while a model loads. Raises
    ApiError 404 from one that was told to end, which balancers take for the wish to get no new
    ones (HAProxy: disable-on-404)."""
    stack = request.app[STATE].stack
    if stack.leaving or stack.draining:
        raise ApiError(404, "This process was told to end and takes no new requests.")
    return _json({"status": "accepting"})


async def version(request: web.Request) -> web.Response:
    """GET /version."""
    return _json({"version": __version__})


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics, in Prometheus' text format."""
    return web.Response(body=render(request.app[STATE]), headers={"Content-Type": CONTENT_TYPE})


def _json(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type=JSON)
