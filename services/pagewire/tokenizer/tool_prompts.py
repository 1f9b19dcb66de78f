"""Tools, calls and their results in the messages that a chat template gets: in the form that it
wants, or written into the texts of messages, for templates that know no tools. Knows no jinja."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct
from pagewire_protocol.structs import ChatMessage

Message = dict[str, Any]
_TOOL: Final = "pagewire_probe_tool"
_CALL: Final = "pagewire_probe_call"
_KEY: Final = "pagewire_probe_key"
_RESULT: Final = "pagewire probe result"
_ID: Final = "probe0000"
SHORT_ID: Final = 9
"""Letters and digits of an id, for templates that want so many."""
PROBE_TOOLS: Final[list[Any]] = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "A probe.",
            "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
        },
    }
]
_INSTRUCTIONS: Final = """\
You may call these functions:
<tools>
{tools}
</tools>

To call one, write its name and its arguments as JSON between tags, once for each call:
<tool_call>
{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}
</tool_call>"""


def probe_conversation(arguments_as_text: bool) -> list[Message]:
    """A conversation with a call and its result, which shows what a template makes of them."""
    arguments: Any = {_KEY: "value"}
    if arguments_as_text:
        arguments = json.dumps(arguments)
    call = {"id": _ID, "type": "function", "function": {"name": _CALL, "arguments": arguments}}
    return [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": _RESULT, "tool_call_id": _ID, "name": _CALL},
    ]


class ToolSupport(Struct, frozen=True):
    """What a chat template knows of tools."""

    rendered: str = ""
    """What it made of a conversation with tools and a call."""
    tools: bool = False
    """It lists the tools."""
    calls: bool = False
    """It shows calls in earlier answers, and their results."""
    arguments_as_text: bool = False
    """It wants arguments as JSON text, not as objects."""

    @staticmethod
    def seen_in(rendered: str, arguments_as_text: bool, has_tools: bool) -> "ToolSupport":
        """What the rendering of `probe_conversation` shows."""
        # Objects that are printed as Python has them are no JSON.
        shows_arguments = _KEY in rendered and f"'{_KEY}'" not in rendered
        shows_calls = _CALL in rendered and shows_arguments and _RESULT in rendered
        shows_calls = shows_calls and f'\\"{_KEY}' not in rendered
        return ToolSupport(
            rendered, has_tools and _TOOL in rendered, shows_calls, arguments_as_text
        )


def message_fields(
    messages: list[Message], sources: Sequence[ChatMessage], support: ToolSupport, short_ids: bool
) -> list[Message]:
    """The messages with what `sources` have beside a text: calls, reasoning, whose result it is."""
    names: dict[str, str] = {}
    """Of the functions, by the id of the call."""
    completed: list[Message] = []
    for message, source in zip(messages, sources, strict=True):
        fields: Message = json.loads(source.fields) if source.fields else {}
        if "tool_calls" in fields:
            fields["tool_calls"] = [
                _call(call, support.arguments_as_text, short_ids) for call in fields["tool_calls"]
            ]
            for call in fields["tool_calls"]:
                names[call["id"]] = call["function"]["name"]
        if short_ids and "tool_call_id" in fields:
            fields["tool_call_id"] = _short_id(fields["tool_call_id"])
        name = names.get(fields.get("tool_call_id", ""))
        if source.role == "tool" and name:
            fields.setdefault("name", name)
        completed.append({**fields, **message})
    return completed


def _call(call: Any, arguments_as_text: bool, short_ids: bool) -> Any:
    function = call["function"]
    arguments = function["arguments"]
    if not arguments_as_text:
        arguments = _object(arguments)
    call_id = _short_id(call["id"]) if short_ids else call["id"]
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _object(arguments: str) -> Any:
    """The arguments as an object; a text that is no JSON object, as of an answer that broke off, as
    it is."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _short_id(call_id: str) -> str:
    if len(call_id) == SHORT_ID and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:SHORT_ID]


# --- for templates that know no tools ---


def with_tools_first(messages: list[Message], tools: list[Any], role: str) -> list[Message]:
    """The messages with the tools in the first one of `role`, or in a new one before all."""
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=lines)
    for index, message in enumerate(messages):
        if message["role"] in (role, "developer" if role == "system" else role):
            content = message["content"]
            joined = f"{content}\n\n{text}" if role == "system" else f"{text}\n\n{content}"
            changed = {**message, "content": joined}
            return [*messages[:index], changed, *messages[index + 1 :]]
    return [{"role": role, "content": text}, *messages]


def written_out(messages: list[Message]) -> list[Message]:
    """The messages with calls and results as text: results that follow each other as one message of
    the user."""
    texts: list[Message] = []
    joins = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if joins:
                texts[-1]["content"] += "\n" + result
            else:
                texts.append({"role": "user", "content": result})
        else:
            texts.append(_with_calls(message))
        joins = is_result
    return texts


def _with_calls(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    pieces = [message["content"]] if message["content"] else []
    for call in calls:
        body = json.dumps(call["function"], ensure_ascii=False)
        pieces.append(f"<tool_call>\n{body}\n</tool_call>")
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(pieces)}
