"""POST /v1/responses: OpenAI's Responses API as a chat, without a memory: all of a conversation comes
with each request. Knows names and types; response_answers.py has what comes back.

Fields and items that are not known are ignored and logged, as are the tools that OpenAI runs itself.
What would need a memory is refused.
"""

import base64
import binascii
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct, field

from ..requests.errors import invalid
from ..requests.messages import TEXT_PARTS, text_of_part
from ..requests.model_facts import ModelFacts
from .conversations import Ignored, assistant, call_of, plan_of
from .openai import (
    ChatRequest,
    FunctionIn,
    JsonSchemaFormat,
    MessageIn,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ToolIn,
)
from .params import Plan
from .tools import check_allowed, check_name

_NULL: Final[Any] = field(default_factory=lambda: Raw(b"null"))
SEALED: Final = "pagewire:"
"""Begins what reasoning items have as `encrypted_content`: clients send that back, and nothing else
of their reasoning."""
ECHOED: Final = (
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "reasoning", "store",
    "temperature", "text", "tool_choice", "tools", "top_p", "truncation", "user",
)  # fmt: skip
"""Fields of the request that its answer repeats."""


NAMES: Final = {
    "json_schema.schema": "text.format.schema",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
"""What the parameters of chats are called here, for errors."""
ITEMS: Final = ("message", "reasoning", "function_call", "function_call_output", "item_reference")
"""Types of items that are read; others are ignored, whatever they hold."""
TOOLS: Final = ("function", "namespace")
"""The same of tools."""


class ItemPart(Struct):
    """A piece of an item's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(Struct):
    """An item of the input; `type` says which fields it has, `message` without it."""

    type: str | None = None
    role: str | None = None
    content: str | list[ItemPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    output: str | list[ItemPart] | None = None
    summary: list[ItemPart] | None = None
    encrypted_content: str | None = None


class ResponsesTool(Struct):
    """A function, a `namespace` with a list of functions, or a tool of OpenAI's servers."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Raw] | None = None
    strict: bool | None = None
    tools: "list[ResponsesTool] | None" = None


class AllowedTool(Struct):
    """One of the tools that may be called."""

    type: str
    name: str | None = None
    namespace: str | None = None


class ResponsesChoice(Struct):
    """A choice of one function; or `allowed_tools`, with a `mode` (`auto` or `required`)."""

    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[AllowedTool] | None = None


class ReasoningOptions(Struct):
    """How much reasoning."""

    effort: str | None = None
    summary: str | None = None


class TextFormat(Struct):
    """What the answer must match: `text`, `json_object` or `json_schema`."""

    type: str
    name: str | None = None
    schema: Raw = _NULL
    strict: bool | None = None


class TextSettings(Struct):
    """The form of the answer."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Struct, kw_only=True):
    """POST /v1/responses."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: str | ResponsesChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    reasoning: ReasoningOptions | None = None
    text: TextSettings | None = None
    previous_response_id: str | None = None
    conversation: Raw = _NULL
    prompt: Raw = _NULL
    background: bool | None = None
    store: bool | None = None
    include: list[str] | None = None
    truncation: str | None = None
    metadata: dict[str, Raw] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    stream_options: Raw = _NULL
    client_metadata: Raw = _NULL
    max_tool_calls: int | None = None


def plan_responses(
    request: ResponsesRequest, body: bytes, model: ModelFacts, ignored: Ignored
) -> Plan:
    """Raises RequestError naming the field that is at fault."""
    _check_memory(request)
    _note_ineffective(request, ignored)
    names = _Names()
    tools = _tools(request.tools, names, ignored)
    messages = _messages(request, names, ignored)
    chat = ChatRequest(messages=messages)
    choice = request.tool_choice
    if isinstance(choice, ResponsesChoice) and choice.type == "allowed_tools":
        tools = _allowed(choice, tools, names, ignored)
        choice = choice.mode or "auto"
    chat.tools = tools or None
    chat.tool_choice = _choice(choice, chat.tools, names)
    chat.parallel_tool_calls = request.parallel_tool_calls
    chat.stream = request.stream
    chat.temperature = request.temperature  # type: ignore[reportAttributeAccessIssue]
    chat.top_p = request.top_p  # type: ignore[reportAttributeAccessIssue]
    chat.max_completion_tokens = request.max_output_tokens
    chat.response_format = _format(request.text)
    if request.reasoning is not None:
        chat.reasoning_effort = request.reasoning.effort
    plan = plan_of(chat, model, ignored)
    rendering = msgspec.structs.replace(
        plan.rendering, api="responses", echoed=_echoed(body), namespaces=names.spaces
    )
    return msgspec.structs.replace(plan, rendering=rendering)


def _check_memory(request: ResponsesRequest) -> None:
    if request.previous_response_id:
        raise invalid(
            "`previous_response_id` is not supported: this server keeps no responses. Send the "
            "whole conversation in `input`.",
            "previous_response_id",
        )
    if bytes(request.conversation) != b"null":
        raise invalid(
            "`conversation` is not supported: this server keeps none. Send it all in `input`.",
            "conversation",
        )
    if bytes(request.prompt) != b"null":
        raise invalid(
            "`prompt` is not supported: this server keeps no templates. Send its text in "
            "`instructions` or `input`.",
            "prompt",
        )
    if request.background:
        raise invalid(
            "`background` is not supported: this server keeps no responses.", "background"
        )


def _note_ineffective(request: ResponsesRequest, ignored: Ignored) -> None:
    """Values of known fields that ask for what is not done."""
    for name in request.include or ():
        if name != "reasoning.encrypted_content":
            ignored.add(f"include {name}")
    if request.truncation == "auto":
        ignored.add("truncation auto")
    if request.text is not None and request.text.verbosity not in (None, "medium"):
        ignored.add("text.verbosity")
    if request.service_tier not in (None, "auto", "default"):
        ignored.add("service_tier")


def _echoed(body: bytes) -> bytes:
    fields = msgspec.json.decode(body, type=dict[str, Raw])
    return msgspec.json.encode({name: fields[name] for name in ECHOED if name in fields})


class _Names:
    """Functions in namespaces, under names that are their own in the whole request."""

    def __init__(self) -> None:
        self.spaces: dict[str, tuple[str, str]] = {}
        """Namespace and name, by the name that the model sees."""
        self._seen: set[str] = set()

    def add(self, namespace: str, name: str) -> str:
        """The name that the model sees."""
        shown = name if name not in self._seen else f"{namespace}{name}"
        self._seen.add(shown)
        if namespace:
            self.spaces[shown] = namespace, name
        return shown

    def shown(self, namespace: str | None, name: str) -> str:
        """The name of an earlier call's function."""
        if not namespace:
            return name
        known = [key for key, value in self.spaces.items() if value == (namespace, name)]
        return known[0] if known else name


def _tools(
    tools: list[ResponsesTool] | None, names: _Names, ignored: Ignored, namespace: str = ""
) -> list[ToolIn]:
    kept: list[ToolIn] = []
    for tool in tools or ():
        if tool.type == "function":
            shown = names.add(namespace, tool.name or "")
            function = FunctionIn(shown, tool.description, tool.parameters, tool.strict)
            kept.append(ToolIn("function", function))
        elif tool.type == "namespace" and not namespace:
            kept += _tools(tool.tools, names, ignored, tool.name or "namespace")
        else:
            ignored.add(f"tool {tool.type}")
    return kept


def _allowed(
    choice: ResponsesChoice, tools: list[ToolIn], names: _Names, ignored: Ignored
) -> list[ToolIn]:
    """Those of the tools that may be called. The others are not shown to the model: it is not held
    to some of what it sees."""
    allowed: set[str] = set()
    for tool in choice.tools or ():
        if tool.type == "function":
            allowed.add(names.shown(tool.namespace, tool.name or ""))
        else:
            ignored.add(f"tool {tool.type}")
    check_allowed(allowed, tools)
    return [tool for tool in tools if tool.function.name in allowed]


def _choice(
    choice: str | ResponsesChoice | None, tools: list[ToolIn] | None, names: _Names
) -> str | NamedTool | None:
    if choice is None or (isinstance(choice, str) and (tools or choice in ("auto", "none"))):
        return choice if tools else None
    if isinstance(choice, ResponsesChoice) and choice.type == "function":
        return NamedTool(NamedFunction(names.shown(None, choice.name or "")))
    kind = choice if isinstance(choice, str) else choice.type
    raise invalid(
        f"`tool_choice` {kind[:64]!r} is not possible here; 'none', 'auto', 'required' or one of the "
        "functions in `tools` are.",
        "tool_choice",
    )


def _messages(request: ResponsesRequest, names: _Names, ignored: Ignored) -> list[MessageIn]:
    messages: list[MessageIn] = []
    if request.instructions:
        messages.append(MessageIn("system", request.instructions))
    if isinstance(request.input, str):
        return [*messages, MessageIn("user", request.input)]
    for index, item in enumerate(request.input):
        _add(messages, index, item, names, ignored)
    return messages


def _add(
    messages: list[MessageIn], index: int, item: Item, names: _Names, ignored: Ignored
) -> None:
    is_reference = item.role is None and item.content is None
    match item.type or ("item_reference" if is_reference else "message"):
        case "message":
            text = _text(index, item.content)
            messages.append(MessageIn(item.role or "user", text))
        case "reasoning":
            text = _reasoning(item)
            if text:
                messages.append(assistant(reasoning=text))
        case "function_call":
            name = names.shown(item.namespace, item.name or "")
            check_name(name, f"input[{index}].name", "input")
            call = call_of(item.call_id or "", name, item.arguments or "")
            last = messages[-1] if messages else None
            if last is None or last.role != "assistant":
                last = assistant()
                messages.append(last)
            last.tool_calls = [*(last.tool_calls or ()), call]
        case "function_call_output":
            text = _text(index, item.output)
            messages.append(MessageIn("tool", text, tool_call_id=item.call_id or ""))
        case "item_reference":
            raise invalid(
                f"`input[{index}]` refers to an item: this server keeps none; send the item itself.",
                "input",
            )
        case other:
            ignored.add(f"item {other}")


def _text(index: int, content: str | list[ItemPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in content:
        text: str | None = text_of_part(part.type, part.text, part.refusal)
        if text is None:
            raise invalid(
                f"`input[{index}]` has a part of type {part.type[:64]!r}; only "
                f"{', '.join(TEXT_PARTS)} are supported.",
                "input",
            )
        texts.append(text)
    return "\n".join(texts)


def _reasoning(item: Item) -> str:
    if isinstance(item.content, list) and item.content:
        return "".join(part.text or "" for part in item.content)
    sealed = item.encrypted_content or ""
    if sealed.startswith(SEALED):
        try:
            return base64.b64decode(sealed[len(SEALED) :], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return "".join(part.text or "" for part in item.summary or ())


def sealed(reasoning: str) -> str:
    """What a client sends back of reasoning."""
    return SEALED + base64.b64encode(reasoning.encode("utf-8", "replace")).decode()


def _format(text: TextSettings | None) -> ResponseFormat | None:
    if text is None or text.format is None or text.format.type == "text":
        return None
    wanted = text.format
    if wanted.type == "json_schema":
        held = JsonSchemaFormat(wanted.name, schema=wanted.schema, strict=wanted.strict)
        return ResponseFormat("json_schema", held)
    return ResponseFormat(wanted.type)
