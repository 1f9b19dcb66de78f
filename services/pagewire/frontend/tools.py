"""The tools of a chat, what it says about calling them and about reasoning, and what earlier answers
have called: checked, and as the protocol has them. Knows no HTTP.

Tools are encoded anew, so that equal tools are equal bytes in every turn of a conversation: the
prefix cache finds them.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw
from pagewire_protocol.sampling import AnswerOptions, ToolChoice
from pagewire_protocol.structs import MAX_MESSAGE_FIELDS, MAX_TOOLS

from ..requests.errors import invalid
from ..requests.model_facts import ModelFacts
from ..requests.parameters import MAX_INT32
from .openai import AllowedToolsChoice, ChatRequest, MessageIn, NamedTool, ToolCallIn, ToolIn

FUNCTION_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_CHOICES: Final = {
    "none": ToolChoice.NONE,
    "auto": ToolChoice.AUTO,
    "required": ToolChoice.REQUIRED,
}
Kwargs = dict[str, Raw]
Choice = str | NamedTool | None


def encoded_tools(tools: list[ToolIn] | None, param: str = "tools") -> bytes:
    """As JSON; empty for none. Raises RequestError."""
    if tools is None:
        return b""
    if not tools:
        raise invalid(f"`{param}` is an empty list; leave it out, or give a tool.", param)
    for index, tool in enumerate(tools):
        check_name(tool.function.name, f"{param}[{index}].function.name", param)
    data = msgspec.json.encode(tools)
    if len(data) > MAX_TOOLS:
        raise invalid(f"`{param}` may have at most {MAX_TOOLS} bytes, got {len(data)}.", param)
    return data


def check_name(name: str, place: str, param: str) -> None:
    """Raises RequestError for what can be no function's name."""
    if not FUNCTION_NAME.fullmatch(name):
        raise invalid(
            f"`{place}` must have 1 to 128 letters, digits, '_', '-', '.' and ':'; got {name[:64]!r}.",
            param,
        )


def shown_tools(request: ChatRequest) -> tuple[list[ToolIn] | None, Choice]:
    """The tools that the model is shown, and the choice among them. Of `allowed_tools` it is shown
    the allowed ones alone, since it is not held to some of what it sees. Raises RequestError."""
    choice = request.tool_choice
    if not isinstance(choice, AllowedToolsChoice):
        return request.tools, choice
    if request.tools is None:
        raise invalid("`tool_choice` needs `tools`.", "tool_choice")
    allowed = {tool.function.name for tool in choice.allowed_tools.tools}
    check_allowed(allowed, request.tools)
    shown = [tool for tool in request.tools if tool.function.name in allowed]
    return shown or None, choice.allowed_tools.mode


def check_allowed(allowed: set[str], tools: list[ToolIn]) -> None:
    """Raises RequestError for a name that is none of the tools'."""
    unknown = sorted(allowed - {tool.function.name for tool in tools})
    if unknown:
        raise invalid(
            f"`tool_choice` allows {unknown[0][:64]!r}, which is none of `tools`.", "tool_choice"
        )


def answer_options(
    request: ChatRequest,
    tools: list[ToolIn] | None,
    tool_choice: Choice,
    model: ModelFacts,
    beams: bool,
) -> AnswerOptions | None:
    """What the request says of its answer's parts, with the `shown_tools`; None where the answer has
    none. Raises RequestError."""
    choice, name = _choice(tools, tool_choice)
    budget = request.thinking_token_budget
    if budget is not None and not 0 <= budget <= MAX_INT32:
        raise invalid(
            f"`thinking_token_budget` must be between 0 and {MAX_INT32}, got {budget}.",
            "thinking_token_budget",
        )
    if budget is not None and not model.has_reasoning:
        raise invalid(
            "`thinking_token_budget` is not supported: this model's answers have no reasoning.",
            "thinking_token_budget",
        )
    if beams:
        if tools or budget is not None:
            param = "tools" if tools else "thinking_token_budget"
            raise invalid(f"`{param}` is not supported together with beam search.", param)
        return None
    if choice is ToolChoice.NONE and not model.has_reasoning:
        return None
    parallel = request.parallel_tool_calls is not False
    return AnswerOptions(choice, name, parallel, -1 if budget is None else budget)


def _choice(tools: list[ToolIn] | None, choice: Choice) -> tuple[ToolChoice, str]:
    if tools is None:
        if choice in (None, "none", "auto"):
            return ToolChoice.NONE, ""
        raise invalid("`tool_choice` needs `tools`.", "tool_choice")
    if choice is None:
        return ToolChoice.AUTO, ""
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise invalid(
                f"`tool_choice` must be 'none', 'auto', 'required' or a function, got {choice[:64]!r}.",
                "tool_choice",
            )
        return _CHOICES[choice], ""
    return ToolChoice.NAMED, _named(choice, tools)


def _named(choice: NamedTool, tools: list[ToolIn]) -> str:
    name = choice.function.name
    if not any(tool.function.name == name for tool in tools):
        raise invalid(
            f"`tool_choice` names {name[:64]!r}, which is none of `tools`.", "tool_choice"
        )
    return name


def template_kwargs(request: ChatRequest, model: ModelFacts) -> Kwargs | None:
    """The chat template's further variables, with what the request says of reasoning: an effort of
    `none`, or no budget, switches it off, unless the request says otherwise itself. Raises
    RequestError."""
    kwargs = dict(request.chat_template_kwargs or {})
    effort = request.reasoning_effort
    if effort is not None and effort not in EFFORTS:
        raise invalid(
            f"`reasoning_effort` must be one of {', '.join(EFFORTS)}, got {effort[:64]!r}.",
            "reasoning_effort",
        )
    if effort == "none" or request.thinking_token_budget == 0:
        if model.has_reasoning:
            kwargs.setdefault("enable_thinking", Raw(b"false"))
    elif effort is not None:
        kwargs.setdefault("reasoning_effort", Raw(msgspec.json.encode(effort)))
    return kwargs or None


def message_fields(index: int, message: MessageIn) -> bytes:
    """What a message has beside a text, as JSON; empty for nothing. Raises RequestError."""
    fields: dict[str, Any] = {}
    if message.tool_calls:
        if message.role != "assistant":
            raise invalid(
                f"`messages[{index}].tool_calls` belong to the role 'assistant', not {message.role[:64]!r}.",
                "messages",
            )
        fields["tool_calls"] = [
            _call(call, f"messages[{index}].tool_calls[{number}]", number)
            for number, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        fields["reasoning_content"] = reasoning
    if not fields:
        return b""
    data = msgspec.json.encode(fields)
    if len(data) > MAX_MESSAGE_FIELDS:
        raise invalid(f"`messages[{index}]` has {len(data)} bytes; it is too long.", "messages")
    return data


def _call(call: ToolCallIn, place: str, number: int) -> Mapping[str, Any]:
    if call.type not in (None, "function"):
        raise invalid(
            f"`{place}` is of type {call.type[:64]!r}; only 'function' is supported.", "messages"
        )
    check_name(call.function.name, f"{place}.function.name", "messages")
    arguments = call.function.arguments
    if isinstance(arguments, dict):
        arguments = msgspec.json.encode(arguments).decode()
    return {
        "id": call.id or f"call_{number}",
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments or ""},
    }
