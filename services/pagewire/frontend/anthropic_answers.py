"""What /v1/messages answers, whole and streamed, and its errors: Anthropic's forms."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from pagewire_protocol.prompt_checks import said_lengths

from ..requests.answers import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from .anthropic import NAMES, NO_THREADS
from .errors import ApiError
from .rendering import Rendering
from .responses import ChatFormatter, ChoiceData, Usage
from .typed_events import EventWriter, Json

_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
PREFIX: Final = "/v1/messages"
"""Paths whose errors have Anthropic's form."""


def error_body(error: ApiError) -> Json:
    """Anthropic's error object. Of a prompt that is too long it begins with Anthropic's words:
    Claude Code knows by these that it has to shorten the conversation."""
    kind = _ERRORS.get(error.status) or ("api_error" if error.status >= 500 else _ERRORS[400])
    message = error.message
    lengths = said_lengths(message)
    if lengths is not None:
        tokens, most = lengths
        counted = f": {tokens} tokens > {most} maximum" if tokens else ""
        message = f"prompt is too long{counted}. {message}"
    fields: Json = {"type": kind, "message": message}
    if error.type == NO_THREADS:
        fields["details"] = {"error_code": NO_THREADS, "unsupported": ["thread"]}
    return {"type": "error", "error": fields}


def usage_body(usage: Usage) -> Json:
    """Prompt tokens that were in the prefix cache are not among `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _stop(reason: str, stop_reason: int | str | None) -> Json:
    # Also behind a call, or within one that it has broken off: clients must not make that.
    if reason != "length" and isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": _REASONS.get(reason, "end_turn"), "stop_sequence": None}


def _input(arguments: str) -> Any:
    """The arguments as an object; those of a call that broke off as the text that they are."""
    try:
        return msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except msgspec.DecodeError:
        return {"arguments": arguments}


def _block(part: Delta) -> Json:
    """A part of an answer, whole."""
    match part:
        case ContentDelta(text):
            return {"type": "text", "text": text}
        case ReasoningDelta(text):
            return {"type": "thinking", "thinking": text, "signature": ""}
        case ToolCallDelta(call_id=call_id, name=name, arguments=text):
            return {"type": "tool_use", "id": call_id, "name": name, "input": _input(text)}


class MessagesFormatter(ChatFormatter):
    """Whole answers."""

    id_prefix = "msg_"

    def __init__(self, rendering: Rendering, request_id: str, model: str) -> None:
        super().__init__(rendering, request_id, model)
        self.message: Json = {
            "id": self.head["id"],
            "type": "message",
            "role": "assistant",
            "model": model,
        }

    def whole(self, choices: Sequence[ChoiceData], usage: Usage) -> Json:
        (choice,) = choices
        blocks = [_block(part) for part in choice.blocks]
        return {
            **self.message,
            "content": blocks,
            **_stop(choice.reason or "stop", choice.stop_reason),
            "usage": usage_body(usage),
        }


class MessagesWriter(EventWriter):
    """Streamed answers."""

    names = NAMES

    def __init__(self, formatter: MessagesFormatter) -> None:
        super().__init__()
        self._message = formatter.message

    def first(self, usage: Usage) -> list[Json]:
        message: Json = {
            **self._message,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_body(usage),
        }
        return [{"type": "message_start", "message": message}]

    def opened(self, delta: Delta) -> list[Json]:
        match delta:
            case ContentDelta():
                block: Json = {"type": "text", "text": ""}
            case ReasoningDelta():
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case ToolCallDelta(call_id=call_id, name=name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        return [{"type": "content_block_start", "index": self.blocks, "content_block": block}]

    def grown(self, delta: Delta) -> Json | None:
        match delta:
            case ContentDelta(text):
                body = {"type": "text_delta", "text": text}
            case ReasoningDelta(text):
                body = {"type": "thinking_delta", "thinking": text}
            case ToolCallDelta(arguments=text):
                if not text:
                    return None
                body = {"type": "input_json_delta", "partial_json": text}
        return {"type": "content_block_delta", "index": self.blocks, "delta": body}

    def closed(self, *, is_cut: bool) -> list[Json]:
        return [{"type": "content_block_stop", "index": self.blocks}]

    def last(self, reason: str, stop_reason: int | str | None, usage: Usage) -> list[Json]:
        stop = _stop(reason, stop_reason)
        return [
            {"type": "message_delta", "delta": stop, "usage": usage_body(usage)},
            {"type": "message_stop"},
        ]

    def failed(self, error: ApiError) -> list[Json]:
        return [error_body(error)]
