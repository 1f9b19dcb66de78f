"""What the APIs of agents have in common on their way to a chat: messages of any order made into ones
that chat templates take. Knows neither of the APIs."""

from msgspec import Raw, Struct
from msgspec.structs import replace

from ..requests.model_facts import ModelFacts
from .openai import ChatRequest, FunctionCallIn, MessageIn, ToolCallIn
from .params import Plan, plan_chat

SYSTEM_ROLES = ("system", "developer")
JOINT = "\n\n"
"""Between texts that become one message."""


class Ignored(Struct):
    """What a request held that has no effect here, to be logged."""

    names: list[str] = []

    def add(self, name: str) -> None:
        """Note it once."""
        if name not in self.names and len(self.names) < 64:
            self.names.append(name[:64])


def plan_of(request: ChatRequest, model: ModelFacts, ignored: Ignored) -> Plan:
    """The plan of a chat whose answer may be shorter than what is asked for, where the context ends
    before: agents ask for more than many models have. Raises RequestError."""
    request.messages = settled(request.messages)
    plan = plan_chat(request, model)
    template = replace(plan.template, max_tokens_is_rest=True)
    return replace(plan, template=template, ignored=tuple(ignored.names))


def settled(messages: list[MessageIn]) -> list[MessageIn]:
    """System messages at the beginning become one; later ones speak as the user does, since many
    templates refuse a system message there. Messages of the user that follow each other are one, and
    so are those of the assistant: results come right behind the message with their calls."""
    result: list[MessageIn] = []
    for message in messages:
        role = message.role
        if role in SYSTEM_ROLES:
            is_first = not result or (len(result) == 1 and result[0].role == "system")
            role = "system" if is_first else "user"
        last = result[-1] if result else None
        if last is not None and role == last.role and role in ("system", "user"):
            last.content = f"{_text(last)}{JOINT}{_text(message)}"
        elif last is not None and role == last.role == "assistant":
            _extend(last, message)
        else:
            result.append(replace(message, role=role))
    return result


def _extend(last: MessageIn, message: MessageIn) -> None:
    """One answer that came in several items."""
    texts = [text for text in (_text(last), _text(message)) if text]
    last.content = JOINT.join(texts) or None
    last.tool_calls = [*(last.tool_calls or ()), *(message.tool_calls or ())] or None
    reasonings = [text for text in (last.reasoning, message.reasoning) if text]
    last.reasoning = JOINT.join(reasonings) or None


def _text(message: MessageIn) -> str:
    return message.content if isinstance(message.content, str) else ""


def assistant(text: str = "", reasoning: str = "") -> MessageIn:
    """An earlier answer."""
    return MessageIn("assistant", text or None, reasoning=reasoning or None)


def call_of(call_id: str, name: str, arguments: str | dict[str, Raw]) -> ToolCallIn:
    """An earlier call."""
    return ToolCallIn(FunctionCallIn(name, arguments), call_id)
