"""GET /openapi.json: the routes and their requests in OpenAPI's format, made from the Structs that
decode bodies and from the table of parameters, so that it says what the server does."""

import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import msgspec
from aiohttp import web
from msgspec import Struct

from pagewire.version import __version__

from ..requests.messages import LABELS, SWITCHES
from ..requests.parameters import PARAMETERS, Parameter
from .anthropic import CountRequest, MessagesRequest
from .errors import JSON, TYPES
from .neutral import NEUTRAL
from .openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Request,
    TokenizeRequest,
)
from .responses_api import ResponsesRequest
from .state import STATE

Schema = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Route(Struct, frozen=True):
    """One route of the server."""

    method: str
    path: str
    """As aiohttp's router takes it."""
    handler: Handler
    summary: str
    request: type[Struct] | None = None
    """What its body must be."""


ROUTES: Final = web.AppKey("routes", tuple[Route, ...])
_OPEN_REQUESTS: Final[tuple[type[Struct], ...]] = (
    ResponsesRequest,
    MessagesRequest,
    CountRequest,
)
_OTHER_NAMES: Final = {"max_completion_tokens": "max_tokens", "top_logprobs": "logprobs"}
"""Fields whose bounds are those of a parameter of another name."""
_SIZES: Final = {
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum"),
    "string": ("minLength", "maxLength"),
}
_EMPTY: Final[tuple[Any, ...]] = ("", [], {})
_FAILURES: Final = (400, 401, 404, 413, 415, 429, 503)
_EXAMPLES: Final[Mapping[type[Struct], Schema]] = {
    ChatRequest: {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 64,
    },
    CompletionRequest: {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8},
    TokenizeRequest: {"prompt": "The capital of France is"},
    DetokenizeRequest: {"tokens": [1, 2, 3]},
    ResponsesRequest: {"input": "What is the capital of France?", "max_output_tokens": 64},
    MessagesRequest: {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 64,
    },
    CountRequest: {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
}


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json."""
    has_keys = request.app[STATE].auth.required
    return web.Response(body=document(request.app[ROUTES], has_keys), content_type=JSON)


@functools.cache
def document(routes: tuple[Route, ...], has_keys: bool) -> bytes:
    """The description of `routes`, as JSON. `has_keys`: the server wants a key."""
    schemas = _schemas({route.request for route in routes if route.request})
    paths: dict[str, Schema] = {}
    for route in routes:
        methods = paths.setdefault(route.path.replace(":.+", ""), {})
        methods[route.method.lower()] = _operation(route)
    components: Schema = {"schemas": schemas}
    body: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Pagewire", "version": __version__},
        "paths": paths,
        "components": components,
    }
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        body["security"] = [{"key": []}]
    return msgspec.json.encode(body)


def _operation(route: Route) -> Schema:
    operation: Schema = {"summary": route.summary, "responses": {"200": {"description": "OK"}}}
    if "{id" in route.path:
        schema = {"type": "string"}
        parameter = {"name": "id", "in": "path", "required": True, "schema": schema}
        operation["parameters"] = [parameter]
    if route.request is None:
        return operation
    content: Schema = {"application/json": {}}
    if issubclass(route.request, Request) or "stream" in route.request.__struct_fields__:
        content["text/event-stream"] = {}
        operation["description"] = (
            "With `stream`, server-sent events in place of one JSON object; the last is [DONE]."
        )
    operation["responses"]["200"]["content"] = content
    for status in _FAILURES:
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        operation["responses"][str(status)] = {"description": TYPES[status], "content": error}
    body: Schema = {"schema": {"$ref": f"#/components/schemas/{route.request.__name__}"}}
    if route.request in _EXAMPLES:
        body["example"] = _EXAMPLES[route.request]
    operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    return operation


def _schemas(requests: Iterable[type[Struct]]) -> dict[str, Schema]:
    requests = sorted(requests, key=lambda request: request.__name__)
    template = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components(requests, ref_template=template)
    for request in requests:
        if request in _OPEN_REQUESTS:  # further fields have no effect
            continue
        schema = schemas[request.__name__]
        properties: dict[str, Schema] = schema["properties"]
        for name in properties:
            row = PARAMETERS.get(_OTHER_NAMES.get(name, name))
            if row is not None and issubclass(request, Request):
                _bound(properties[name], row)
        if "early_stopping" in properties:
            properties["early_stopping"] = {"enum": [True, False, "never", None], "default": False}
        if request is ChatRequest:
            for name in ("max_tokens", "max_completion_tokens"):  # what the context leaves
                properties[name]["default"] = None
        if request is CompletionRequest:  # 0 scores a prompt
            properties["max_tokens"]["anyOf"][0]["minimum"] = 0
        _add_neutral(schema)
        if request is TokenizeRequest:
            schema["oneOf"] = [
                {"required": [name], "properties": {name: {"type": of_type}}}
                for name, of_type in (("prompt", "string"), ("messages", "array"))
            ]
    _open(schemas["StreamOptions"], {})
    unread: dict[str, Schema] = {name: {} for name in LABELS}
    unread |= {name: {"enum": [None, False, *_EMPTY]} for name in SWITCHES}
    for name in ("MessageIn", "Part"):
        _open(schemas[name], unread, *_EMPTY)
    schemas["Error"] = _error_schema()
    return schemas


def _add_neutral(schema: Schema) -> None:
    """Enter what a request may hold without asking for anything."""
    properties: dict[str, Schema] = schema["properties"]
    for name, values in NEUTRAL.items():
        if name not in properties:
            properties[name] = {"enum": [None, *values], "x-no-effect": True}
            continue
        alternatives: list[Schema] = properties[name].get("anyOf", [])
        other = [value for value in values if not any(_accepts(one, value) for one in alternatives)]
        if alternatives and any(isinstance(value, bool) for value in other):
            alternatives.append({"enum": other})
    _open(schema, {})


def _open(schema: Schema, unread: Mapping[str, Schema], *values: Any) -> None:
    """Let an object have fields beside its own: `unread`, and any others that are null or one of
    `values`."""
    for name, field in unread.items():
        schema["properties"].setdefault(name, {**field, "x-no-effect": True})
    schema["additionalProperties"] = {"enum": [None, *values]}


def _bound(schema: Schema, row: Parameter) -> None:
    """Enter the bounds of a parameter, and what it is where a request leaves it out."""
    alternatives: list[Schema] = schema.get("anyOf", [schema])
    for alternative in alternatives:
        of_type = alternative.get("type", "")
        if of_type == "array":
            _enter(alternative, ("minItems", "maxItems"), row.min_items or None, row.max_items)
            _enter_value(alternative["items"], row)
        elif of_type == "object":
            _enter(alternative, ("minProperties", "maxProperties"), None, row.max_items)
            _enter_value(alternative["additionalProperties"], row)
        else:
            _enter_value(alternative, row)
    plain = isinstance(row.default, (bool, int, float, str)) and row.default != ""
    if plain and any(_accepts(alternative, row.default) for alternative in alternatives):
        schema["default"] = row.default


def _enter_value(schema: Schema, row: Parameter) -> None:
    sizes = _SIZES.get(schema.get("type", ""))
    if sizes is None or (row.type is str) is not (schema["type"] == "string"):
        return
    low, high = sizes
    _enter(schema, ("exclusiveMinimum" if row.above_low else low, high), row.low, row.high)


def _enter(schema: Schema, names: tuple[str, str], low: Any, high: Any) -> None:
    schema.update(
        {name: value for name, value in zip(names, (low, high), strict=True) if value is not None}
    )


def _accepts(schema: Schema, value: Any) -> bool:
    """Whether a value is of the schema's type, where that is a plain one."""
    types = {"boolean": bool, "integer": int, "number": (int, float), "string": str}
    wanted: Any = types.get(schema.get("type", ""), ())
    return isinstance(value, wanted) and isinstance(value, bool) is (wanted is bool)


def _error_schema() -> Schema:
    fields: Schema = {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "code": {"type": "integer"},
    }
    error = {"type": "object", "properties": fields}
    return {"type": "object", "properties": {**fields, "error": error}}
