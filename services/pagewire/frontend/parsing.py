"""How a body becomes a request. Knows no parameter's meaning, only which are known.

A parameter that is no field of the request is refused by name, unless its value asks for nothing
(neutral.py).
"""

import re
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Raw, Struct

from ..requests.errors import RequestError, invalid
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
_read_fields: Final = msgspec.json.Decoder(dict[str, Raw])
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
    """The same for a request whose further fields have no effect; they are noted. Raises
    RequestError."""
    if not body.strip():
        raise invalid("The request body is empty; a JSON object is needed.")
    try:
        parsed = _decoders[request_type].decode(body)
        fields = _read_fields.decode(body)
    except _UNREADABLE as error:
        raise _explained(error, body) from None
    for name, value in fields.items():
        if name not in request_type.__struct_fields__ and bytes(value) != b"null":
            ignored.add(name)
    return parsed


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
