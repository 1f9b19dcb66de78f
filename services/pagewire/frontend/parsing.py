"""How a body becomes a request. Knows no parameter's meaning, only which are known.

A parameter that is no field of the request is refused by name, unless its value asks for nothing
(neutral.py).
"""

import re
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Raw, Struct

from ..requests.errors import RequestError, invalid
from . import anthropic, responses_api
from .anthropic import CountRequest, MessagesRequest
from .conversations import Ignored
from .neutral import without_neutral
from .openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .responses_api import ResponsesRequest

R = TypeVar("R", bound=Struct)

_decoders: Final[dict[type[Any], msgspec.json.Decoder[Any]]] = {
    request_type: msgspec.json.Decoder(request_type)
    for request_type in (
        CompletionRequest,
        ChatRequest,
        TokenizeRequest,
        DetokenizeRequest,
        ResponsesRequest,
        MessagesRequest,
        CountRequest,
    )
}
_Typed = dict[str, tuple[tuple[str, ...], str]]
_MESSAGES: Final[_Typed] = {
    "messages": ((*anthropic.BLOCKS, "message"), "content"),
    "system": (anthropic.BLOCKS, ""),
    "tools": (anthropic.TOOLS, ""),
}
_TYPED: Final[dict[type[Any], _Typed]] = {
    ResponsesRequest: {
        "input": (responses_api.ITEMS, ""),
        "tools": (responses_api.TOOLS, "tools"),
    },
    MessagesRequest: _MESSAGES,
    CountRequest: _MESSAGES,
}
"""Lists of objects that say their types: the types that are read, and the field of such an object in
which there is another such list."""
_read_fields: Final = msgspec.json.Decoder(dict[str, Raw])
_read_objects: Final = msgspec.json.Decoder(list[dict[str, Raw]])
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises; a ValidationError is a DecodeError."""
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*?)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*?)`")
_AT: Final = re.compile(r" - at `\$?\.?(.*)`$", re.DOTALL)


def parse(request_type: type[R], body: bytes) -> R:
    """The request in `body`. Raises RequestError naming the parameter or the place that is
    wrong."""
    if not body.strip():
        raise invalid("The request body is empty; a JSON object is needed.")
    decode = _decoders[request_type].decode
    try:
        try:
            return decode(body)
        except msgspec.ValidationError:
            # Only a body that does not fit is looked through a second time.
            return decode(without_neutral(request_type.__struct_fields__, body))
    except _UNREADABLE as error:
        raise _explained(error, body) from None


def parse_open(request_type: type[R], body: bytes, ignored: Ignored) -> R:
    """The same for a request whose further fields have no effect; they are noted. Items of types that
    are not read may hold anything. Raises RequestError."""
    if not body.strip():
        raise invalid("The request body is empty; a JSON object is needed.")
    try:
        fields = _read_fields.decode(body)
        decode = _decoders[request_type].decode
        try:
            parsed = decode(body)
        except msgspec.ValidationError:
            # Only a body that does not fit is looked through a second time.
            parsed = decode(_without_unread(_TYPED[request_type], fields))
    except _UNREADABLE as error:
        raise _explained(error, body) from None
    for name, value in fields.items():
        if name not in request_type.__struct_fields__ and bytes(value) != b"null":
            ignored.add(name)
    return parsed


def _without_unread(typed: _Typed, fields: dict[str, Raw]) -> bytes:
    """A body whose objects of types that are not read have nothing but their types."""
    bare = {name: _bare(fields[name], *typed[name]) for name in typed if name in fields}
    return msgspec.json.encode({**fields, **bare})


def _bare(encoded: Raw, types: tuple[str, ...], inner: str) -> Raw:
    """A list of anything else is left as it is, for the typed decoder to explain."""
    try:
        objects = _read_objects.decode(encoded)
    except msgspec.ValidationError:
        return encoded
    for index, one in enumerate(objects):
        kind = msgspec.json.decode(one.get("type", b"null"))
        if isinstance(kind, str) and kind not in types:
            objects[index] = {"type": one["type"]}
        elif inner in one:
            one[inner] = _bare(one[inner], types, inner)
    return Raw(msgspec.json.encode(objects))


def _explained(error: Exception, body: bytes) -> RequestError:
    """What to tell the client of an error of decoding."""
    match error:
        case msgspec.ValidationError():
            return _misfit(str(error))
        case UnicodeDecodeError():
            return invalid(f"The request body of {len(body)} bytes is not UTF-8.")
        case RecursionError():
            return invalid("The request body is nested too deeply.")
        case _:
            return invalid(f"The request body of {len(body)} bytes is no valid JSON: {error}.")


def _misfit(text: str) -> RequestError:
    at = _AT.search(text)
    where = at.group(1) if at else ""
    reason = text[: at.start()] if at else text
    unknown = _UNKNOWN.match(reason)
    if unknown:
        name = f"{where}.{unknown.group(1)}"[:128].lstrip(".")
        return invalid(f"The parameter `{name}` is not supported.", name[:64])
    missing = _MISSING.match(reason)
    if missing and not where:
        return invalid(f"The parameter `{missing.group(1)}` is missing.", missing.group(1))
    param = where.partition(".")[0].partition("[")[0] or None
    return invalid(f"`{where}`: {reason}." if where else f"{reason}.", param)
