"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API as a chat. Knows names and
types; anthropic_answers.py has what comes back.

Fields that are not known are ignored: its clients send new ones monthly. What they are is logged.
"""

import logging
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct, field

from ..requests.errors import ErrorKind, RequestError, invalid
from ..requests.model_facts import ModelFacts
from .conversations import JOINT, Ignored, call_of, plan_of
from .openai import (
    ChatRequest,
    FunctionIn,
    JsonSchemaFormat,
    MessageIn,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ToolCallIn,
    ToolIn,
)
from .params import Plan
from .tools import check_name

log = logging.getLogger("pagewire.frontend")
BILLING: Final = "x-anthropic-billing-header:"
"""Begins a block of Claude Code's system prompt that is for Anthropic's accounts; in some versions it
differs in every request, and would leave nothing of the prompt in the prefix cache."""
NAMES: Final = {
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}
"""What the parameters of chats are called here, for errors."""
NO_THREADS: Final = "thread_unsupported_request"
"""By this code of an error Anthropic's clients know that they have to send a conversation whole."""
BLOCKS: Final = ("text", "thinking", "tool_use", "tool_result")
"""Types of blocks that are read; others are ignored or refused, whatever they hold."""
TOOLS: Final = ("custom",)
"""The same of tools."""
MIN_BUDGET: Final = 1024
"""Tokens of thinking that may be asked for, at least."""


_NULL: Final[Any] = field(default_factory=lambda: Raw(b"null"))


class Block(Struct):
    """A piece of a message's content, or of a tool's result; `type` says which fields it has."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Raw] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None


class InMessage(Struct):
    """A message; also with the role `system`."""

    role: str
    content: str | list[Block]


class AnthropicTool(Struct):
    """A tool of the client (`type` is `custom` or missing), or one of Anthropic's servers."""

    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Raw] | None = None
    strict: bool | None = None


class AnthropicChoice(Struct):
    """Which tools must be called: `auto`, `any`, `tool` with a name, `none`."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """`enabled` with a budget, `adaptive`, or `disabled`; `display` says whether it is shown."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Struct):
    """What the answer must match; `type` is `json_schema`."""

    type: str
    schema: dict[str, Raw] | None = None


class OutputConfig(Struct):
    """How much effort, and in which form."""

    effort: str | None = None
    format: OutputFormat | None = None


class MessagesRequest(Struct, kw_only=True):
    """POST /v1/messages."""

    model: str | None = None
    messages: list[InMessage]
    max_tokens: int
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    metadata: dict[str, Raw] | None = None
    service_tier: str | None = None
    thread: Raw = _NULL


class CountRequest(Struct, kw_only=True):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[InMessage]
    system: str | list[Block] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = field(default=None)


def plan_messages(request: MessagesRequest, model: ModelFacts, ignored: Ignored) -> Plan:
    """Raises RequestError naming the field that is at fault."""
    if bytes(request.thread) != b"null":
        raise RequestError(
            ErrorKind.INVALID,
            "`thread` is not supported: this server keeps no conversations. Send it all in `messages`.",
            param="thread",
            type=NO_THREADS,
        )
    thinking = request.thinking
    chat = _chat(request, model, ignored)
    if request.max_tokens < 1:
        raise invalid(f"`max_tokens` must be at least 1, got {request.max_tokens}.", "max_tokens")
    chat.max_tokens = request.max_tokens
    chat.stream = request.stream
    chat.temperature = request.temperature  # type: ignore[reportAttributeAccessIssue]
    chat.top_p = request.top_p  # type: ignore[reportAttributeAccessIssue]
    chat.top_k = request.top_k  # type: ignore[reportAttributeAccessIssue]
    chat.stop = request.stop_sequences
    output = request.output_config
    chat.response_format = _format(request.output_format or (output.format if output else None))
    if thinking is not None and thinking.type == "enabled":
        chat.thinking_token_budget = _budget(thinking, request.max_tokens, model)
    plan = plan_of(chat, model, ignored)
    rendering = msgspec.structs.replace(plan.rendering, api="messages")
    return msgspec.structs.replace(plan, rendering=rendering)


def plan_count(request: CountRequest, model: ModelFacts, ignored: Ignored) -> Plan:
    """Raises RequestError naming the field that is at fault."""
    return plan_of(_chat(request, model, ignored), model, ignored)


def _chat(
    request: MessagesRequest | CountRequest, model: ModelFacts, ignored: Ignored
) -> ChatRequest:
    messages: list[MessageIn] = []
    system = _system(request.system)
    if system:
        messages.append(MessageIn("system", system))
    for index, message in enumerate(request.messages):
        messages += _messages(index, message, ignored)
    chat = ChatRequest(messages=messages)
    last = messages[-1] if messages else None
    if last is not None and last.role == "assistant" and last.content and not last.tool_calls:
        # The answer has been begun ("prefilled"): it goes on from there.
        chat.continue_final_message = True
    chat.tools = _tools(request.tools, ignored)
    _choose(chat, request.tool_choice)
    _think(chat, request.thinking, model, ignored)
    if request.output_config is not None:
        chat.reasoning_effort = request.output_config.effort
    return chat


def _think(
    chat: ChatRequest, thinking: Thinking | None, model: ModelFacts, ignored: Ignored
) -> None:
    if thinking is None:
        return
    if thinking.display is not None:
        ignored.add("thinking.display")
    if thinking.type not in ("enabled", "disabled"):
        if thinking.type != "adaptive":
            ignored.add(f"thinking {thinking.type}")
    elif model.has_reasoning:
        enabled = b"true" if thinking.type == "enabled" else b"false"
        chat.chat_template_kwargs = {"enable_thinking": Raw(enabled)}


def _system(system: str | list[Block] | None) -> str:
    if isinstance(system, str):
        return "" if system.startswith(BILLING) else system
    texts = [block.text or "" for block in system or ()]
    return JOINT.join(text for text in texts if text and not text.startswith(BILLING))


def _messages(index: int, message: InMessage, ignored: Ignored) -> list[MessageIn]:
    where = f"messages[{index}]"
    if message.role not in ("user", "assistant", "system"):
        raise invalid(
            f"`{where}.role` must be 'user', 'assistant' or 'system', got {message.role[:64]!r}.",
            "messages",
        )
    if isinstance(message.content, str):
        return [MessageIn(message.role, message.content)]
    if message.role == "assistant":
        return [_answer(where, message.content, ignored)]
    results: list[MessageIn] = []
    texts: list[str] = []
    for block in message.content:
        if block.type == "tool_result":
            text = _text(where, block.content or "", ignored)
            if block.is_error:
                ignored.add("tool_result.is_error")
            results.append(MessageIn("tool", text, tool_call_id=block.tool_use_id or ""))
        else:
            texts += _block_text(where, block, ignored)
    if texts or not results:
        results.append(MessageIn(message.role, JOINT.join(texts)))
    return results


def _answer(where: str, blocks: list[Block], ignored: Ignored) -> MessageIn:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCallIn] = []
    for number, block in enumerate(blocks):
        if block.type == "tool_use":
            check_name(block.name or "", f"{where}.content[{number}].name", "messages")
            calls.append(call_of(block.id or "", block.name or "", block.input or {}))
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "redacted_thinking":
            ignored.add("redacted_thinking")
        else:
            texts += _block_text(where, block, ignored)
    return MessageIn(
        "assistant",
        "".join(texts) or None,
        tool_calls=calls or None,
        reasoning="".join(thoughts) or None,
    )


def _text(where: str, content: str | list[Block], ignored: Ignored) -> str:
    if isinstance(content, str):
        return content
    texts = [text for block in content for text in _block_text(where, block, ignored)]
    return "\n".join(texts)


def _block_text(where: str, block: Block, ignored: Ignored) -> list[str]:
    """Of a block that is text. Images and documents cannot be left out without a word."""
    if block.type == "text":
        return [block.text or ""]
    if block.type in ("image", "document", "file", "container_upload"):
        raise invalid(
            f"`{where}.content` has a block of type {block.type!r}, which this model cannot read.",
            "messages",
        )
    ignored.add(f"content block {block.type}")
    return []


def _tools(tools: list[AnthropicTool] | None, ignored: Ignored) -> list[ToolIn] | None:
    kept: list[ToolIn] = []
    for tool in tools or ():
        if tool.type in (None, "custom"):
            function = FunctionIn(tool.name, tool.description, tool.input_schema, tool.strict)
            kept.append(ToolIn("function", function))
        else:
            ignored.add(f"tool {tool.type}")
    return kept or None


def _choose(chat: ChatRequest, choice: AnthropicChoice | None) -> None:
    if choice is None:
        return
    if chat.tools is None:
        if choice.type in ("any", "tool"):
            raise invalid(
                f"`tool_choice` {choice.type!r} is not possible: `tools` has none that can be called here.",
                "tool_choice",
            )
        return
    if choice.disable_parallel_tool_use:
        chat.parallel_tool_calls = False
    match choice.type:
        case "auto" | "none":
            chat.tool_choice = choice.type
        case "any":
            chat.tool_choice = "required"
        case "tool":
            chat.tool_choice = NamedTool(NamedFunction(choice.name or ""))
        case _:
            raise invalid(
                f"`tool_choice.type` must be 'auto', 'any', 'tool' or 'none', got {choice.type[:64]!r}.",
                "tool_choice",
            )


def _format(output: OutputFormat | None) -> ResponseFormat | None:
    if output is None:
        return None
    if output.type != "json_schema" or output.schema is None:
        raise invalid(
            f"`output_config.format` of type {output.type[:64]!r} is not supported, only "
            "'json_schema' with a `schema`.",
            "output_config",
        )
    schema = JsonSchemaFormat(schema=Raw(msgspec.json.encode(output.schema)))
    return ResponseFormat("json_schema", schema)


def _budget(thinking: Thinking, max_tokens: int, model: ModelFacts) -> int | None:
    budget = thinking.budget_tokens
    if budget is None or not MIN_BUDGET <= budget < max_tokens:
        raise invalid(
            f"`thinking.budget_tokens` must be at least {MIN_BUDGET} and below `max_tokens` "
            f"({max_tokens}), got {budget}.",
            "thinking",
        )
    return budget if model.has_reasoning else None


def log_ignored(names: Any, seen: set[str]) -> None:
    """One line for each name that was not seen before."""
    for name in names:
        if name not in seen and len(seen) < 1024:
            seen.add(name)
            log.info("ignored in requests of agents: %s", name)
