"""How a body becomes a request. Knows no parameter's meaning, only which are known.

A parameter that is no field of the request is refused by name, unless its value asks for nothing
(neutral.py).
"""

import contextlib
import re
from collections.abc import Generator
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
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*?)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*?)`")
_AT: Final = re.compile(r" - at `\$?\.?(.*)`$", re.DOTALL)


def parse(request_type: type[R], body: bytes) -> R:
    """The request in `body`. Raises RequestError naming the parameter or the place that is
    wrong."""
    if not body.strip():
        raise invalid("The request body is empty; a JSON object is needed.")
    with _explaining(body):
        try:
            return _decoders[request_type].decode(body)
        except msgspec.ValidationError:
            # Only a body that does not fit is looked through a second time.
            less = without_neutral(request_type.__struct_fields__, body)
            return _decoders[request_type].decode(less)


def parse_open(request_type: type[R], body: bytes, ignored: Ignored) -> R:
    """The same for a request whose further fields have no effect; they are noted. Raises
    RequestError."""
    if not body.strip():
        raise invalid("The request body is empty; a JSON object is needed.")
    with _explaining(body):
        parsed = _decoders[request_type].decode(body)
        for name, value in _read_fields.decode(body).items():
            if name not in request_type.__struct_fields__ and bytes(value) != b"null":
                ignored.add(name)
        return parsed


@contextlib.contextmanager
def _explaining(body: bytes) -> Generator[None]:
    """Errors of decoding as RequestErrors."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except msgspec.DecodeError as error:
        raise invalid(f"The request body of {len(body)} bytes is no valid JSON: {error}.") from None
    except UnicodeDecodeError:
        raise invalid(f"The request body of {len(body)} bytes is not UTF-8.") from None
    except RecursionError:
        raise invalid("The request body is nested too deeply.") from None


def _explained(text: str) -> RequestError:
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
