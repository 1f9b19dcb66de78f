"""What /v1/responses answers, whole and streamed: a row of items, and the events that tell of them."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ..requests.answers import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from .errors import ApiError
from .rendering import Rendering
from .responses import ChatFormatter, ChoiceData, Usage, text_of
from .responses_api import NAMES, sealed
from .typed_events import EventWriter, Json

_DEFAULTS: Final[Json] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "store": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
"""What an answer repeats of its request, where that does not say it."""


def usage_body(usage: Usage) -> Json:
    """OpenAI's names of this API; `cache_write_tokens` are those that are paid for, which none are."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class ResponsesFormatter(ChatFormatter):
    """Whole answers, and the items of both kinds."""

    id_prefix = "resp_"

    def __init__(self, rendering: Rendering, request_id: str, model: str) -> None:
        super().__init__(rendering, request_id, model)
        self._request_id = request_id
        echoed: Json = msgspec.json.decode(rendering.echoed) if rendering.echoed else {}
        given = {name: value for name, value in echoed.items() if value is not None}
        self._response: Json = {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "model": model,
            **_DEFAULTS,
            **given,
            "store": False,
            "background": False,
            "previous_response_id": None,
        }

    def response(
        self, status: str, output: Sequence[Json], usage: Usage | None, error: Any = None
    ) -> Json:
        """The whole object, of an answer that is in this state."""
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._response,
            "status": status,
            "error": error,
            "incomplete_details": reason,
            "output": list(output),
            "usage": usage_body(usage) if usage else None,
        }

    def item_id(self, prefix: str, number: int) -> str:
        """Of the item with this number."""
        return f"{prefix}_{self._request_id}_{number}"

    def message(self, number: int, text: str, status: str) -> Json:
        """An item with text."""
        parts = [text_part(text)] if text or status != "in_progress" else []
        return {
            "type": "message",
            "id": self.item_id("msg", number),
            "role": "assistant",
            "status": status,
            "content": parts,
        }

    def reasoning(self, number: int, text: str, status: str) -> Json:
        """An item with reasoning."""
        parts = [{"type": "reasoning_text", "text": text}] if text else []
        return {
            "type": "reasoning",
            "id": self.item_id("rs", number),
            "status": status,
            "summary": [],
            "content": parts,
            "encrypted_content": sealed(text) if text else None,
        }

    def call(self, number: int, call: ToolCallDelta, status: str) -> Json:
        """An item with a function call."""
        namespace, name = self.rendering.namespaces.get(call.name, ("", call.name))
        item = {
            "type": "function_call",
            "id": self.item_id("fc", number),
            "call_id": call.call_id,
            "name": name,
            "arguments": call.arguments,
            "status": status,
        }
        return {**item, "namespace": namespace} if namespace else item

    def item(self, number: int, part: Delta, text: str, status: str) -> Json:
        """The item of a part of the answer, of which `text` is known."""
        match part:
            case ContentDelta():
                return self.message(number, text, status)
            case ReasoningDelta():
                return self.reasoning(number, text, status)
            case ToolCallDelta():
                call = msgspec.structs.replace(part, arguments=text)
                return self.call(number, call, status)

    def whole(self, choices: Sequence[ChoiceData], usage: Usage) -> Json:
        (choice,) = choices
        status = status_of(choice.reason or "stop")
        parts = choice.blocks or [ContentDelta("")]
        last = len(parts) - 1
        output = [
            self.item(number, part, text_of(part), status if number == last else "completed")
            for number, part in enumerate(parts)
        ]
        return self.response(status, output, usage)


def status_of(reason: str) -> str:
    """Of a finish reason."""
    return "incomplete" if reason == "length" else "completed"


def text_part(text: str) -> Json:
    """The content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponsesWriter(EventWriter):
    """Streamed answers."""

    names = NAMES

    def __init__(self, formatter: ResponsesFormatter) -> None:
        super().__init__()
        self._formatter = formatter
        self._output: list[Json] = []
        """The items that are complete."""
        self._texts: list[str] = []
        """Of the open item."""
        self._kind: Delta = ContentDelta("")
        """The delta that opened it."""
        self._number = 2
        """Of the next event; the first two are those of `first`."""

    def _event(self, event_type: str, **fields: Any) -> Json:
        event = {"type": event_type, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _place(self, item: Json) -> Json:
        return {"item_id": item["id"], "output_index": self.blocks}

    def first(self, usage: Usage) -> list[Json]:
        response = self._formatter.response("in_progress", (), None)
        return [
            {"type": f"response.{name}", "sequence_number": number, "response": response}
            for number, name in enumerate(("created", "in_progress"))
        ]

    def _item(self, text: str, status: str) -> Json:
        return self._formatter.item(self.blocks, self._kind, text, status)

    def _part(self, text: str) -> Json | None:
        match self._kind:
            case ContentDelta():
                return text_part(text)
            case ReasoningDelta():
                return {"type": "reasoning_text", "text": text}
            case ToolCallDelta():
                return None

    def opened(self, delta: Delta) -> list[Json]:
        self._kind = delta
        self._texts = []
        item = self._item("", "in_progress")
        added = "response.output_item.added"
        events = [self._event(added, output_index=self.blocks, item=item)]
        part = self._part("")
        if part is not None:
            place = self._place(item)
            added = "response.content_part.added"
            events.append(self._event(added, **place, content_index=0, part=part))
        return events

    def grown(self, delta: Delta) -> Json | None:
        text = text_of(delta)
        if not text:
            return None
        self._texts.append(text)
        place = self._place(self._item("", "in_progress"))
        match delta:
            case ContentDelta():
                more: Json = {"content_index": 0, "delta": text, "logprobs": []}
                return self._event("response.output_text.delta", **place, **more)
            case ReasoningDelta():
                more = {"content_index": 0, "delta": text}
                return self._event("response.reasoning_text.delta", **place, **more)
            case ToolCallDelta():
                name = "response.function_call_arguments.delta"
                return self._event(name, **place, delta=text)

    def closed(self, *, is_cut: bool) -> list[Json]:
        status = "incomplete" if is_cut else "completed"
        text = "".join(self._texts)
        item = self._item(text, status)
        place = self._place(item)
        self._output.append(item)
        events: list[Json] = []
        match self._kind:
            case ContentDelta():
                done: Json = {"content_index": 0, "text": text, "logprobs": []}
                events.append(self._event("response.output_text.done", **place, **done))
            case ReasoningDelta():
                done = {"content_index": 0, "text": text}
                events.append(self._event("response.reasoning_text.done", **place, **done))
            case ToolCallDelta():
                name = "response.function_call_arguments.done"
                events.append(self._event(name, **place, name=item["name"], arguments=text))
        part = self._part(text)
        if part is not None:
            name = "response.content_part.done"
            events.append(self._event(name, **place, content_index=0, part=part))
        name = "response.output_item.done"
        return [*events, self._event(name, output_index=self.blocks, item=item)]

    def last(self, reason: str, stop_reason: int | str | None, usage: Usage) -> list[Json]:
        status = status_of(reason)
        events: list[Json] = []
        if not self._output:
            # An answer has an item in any case: clients look for one.
            events += self.deltas([ContentDelta("")])
            events += self.close(is_cut=status == "incomplete")
        response = self._formatter.response(status, self._output, usage)
        return [*events, self._event(f"response.{status}", response=response)]

    def failed(self, error: ApiError) -> list[Json]:
        codes = {429: "rate_limit_exceeded", 400: "invalid_prompt"}
        body = {"code": codes.get(error.status, "server_error"), "message": error.message}
        response = self._formatter.response("failed", self._output, None, body)
        return [self._event("response.failed", response=response)]
