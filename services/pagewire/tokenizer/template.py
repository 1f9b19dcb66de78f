"""Chat templates: a conversation as the text the model was trained on. It knows jinja and no
tokens.

Tools and calls go to the template as it wants them; for one that knows none they are written into
the messages (tool_prompts.py). Rendering is a function of the conversation: equal beginnings stay
equal, and so the prefix cache finds them.

Text that was accepted is in the prompt, or the request is refused: a template is first rendered
with a mark in the place of each message's text, and what it leaves out is found out by that. So it
shows as well whether a template takes a message's content as text or as a list of typed parts.

Rendered as transformers renders them (the same names, filters and whitespace rules), inside jinja's
immutable sandbox and under limits: the size of the output, the reach of `range` and of repetition,
and the time, which `Watchdog` enforces.
"""

import json
import re
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec.structs import replace
from pagewire_protocol.messages import Chat
from pagewire_protocol.structs import ChatMessage

from .render_limit import RenderLimit, RenderTimeout
from .tool_prompts import (
    PROBE_TOOLS,
    ToolSupport,
    message_fields,
    probe_conversation,
    with_tools_first,
    written_out,
)

MAX_OUTPUT: Final = 16_777_216
TIMEOUT_S: Final = 2.0
MARK: Final = "\uf8ffpagewire:continue\uf8ff "
"""Where the final message ends in the rendered text. Private-use characters, so that no message
contains it; the space at its end shows whether the template strips messages."""
PROBE: Final = "\uf8fe{}\uf8fe"
"""Stands for the text of a message where it is tried out whether the template shows it: nothing
that a template does to a text changes these characters, and a list that is printed as such has them
escaped."""
_PROBES: Final = re.compile("\uf8fe([0-9]+)\uf8fe")
MAX_SHAPES: Final = 1024
"""Conversations of different shapes whose forms are remembered."""
ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
"""OpenAI's. Many templates print whatever role they are given, so a misspelt one would reach the
model as a speaker that it does not know; a template that has further roles names them."""
OWN_NAMES: Final = {"messages", "add_generation_prompt", "continue_final_message"}


Message = dict[str, Any]
Forms = tuple[bool, ...]
"""For each message, whether its content is a list of typed parts (else it is text)."""


class TemplateRefused(ValueError):
    """The template rejects this conversation, or cannot be rendered with it. The message is shown
    to the client."""


class LimitExceeded(TemplateRefused):
    """The template takes too long or prints too much: another attempt would be no better."""


class _Raised(jinja2.TemplateError):
    """The template's own raise_exception(): its message is passed on alone."""


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for sequence, count in ((left, right), (right, left)):
            if (
                hasattr(sequence, "__len__")
                and isinstance(count, int)
                and len(sequence) * count > MAX_OUTPUT
            ):
                raise SecurityError(f"a repetition is limited to {MAX_OUTPUT} items")
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise SecurityError("an exponent is limited to 64")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here its body is rendered as it
    is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    raise _Raised(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. `names` are the special tokens it may use, like bos_token;
    `defaults` further variables where a request does not give them. Raises ValueError when it does
    not compile."""

    def __init__(
        self,
        source: str,
        names: dict[str, str],
        limit: RenderLimit | None = None,
        defaults: Message | None = None,
    ) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from None
        self._names = names
        self._defaults = defaults or {}
        self._source = source
        self._knows_developer = "developer" in source
        self._forms: dict[int, Forms | None] = {}
        """By the hash of what a template may tell conversations apart by, beside their texts: for
        each message its role, whether it has a name, and a text; whether an answer is begun;
        further variables. Hashes, since these are long where conversations are."""
        self._limit = limit or RenderLimit(TIMEOUT_S)
        self._support: ToolSupport | None = None
        self._generation_prompts: dict[bytes, str] = {}
        """What begins an answer, by the further variables of the template."""
        self.short_ids = False
        """Ids of tool calls have nine letters and digits in the prompt."""

    @property
    def source(self) -> str:
        """The template itself."""
        return self._source

    def generation_prompt(self, chat: Chat, rendered: str) -> str:
        """The end of the prompt that begins the answer. Raises TemplateRefused."""
        if not chat.add_generation_prompt:
            return ""
        key = chat.template_kwargs
        if key not in self._generation_prompts:
            if len(self._generation_prompts) >= MAX_SHAPES:
                self._generation_prompts.clear()
            values = self._values(replace(chat, tools=b""))
            self._generation_prompts[key] = self._begun_answer(values, _HELLO) or ""
        usual = self._generation_prompts[key]
        if usual and rendered.endswith(usual):
            return usual
        without = self.render(replace(chat, add_generation_prompt=False))
        return rendered.removeprefix(without)

    def _begun_answer(self, values: Message, messages: list[Message]) -> str | None:
        try:
            whole = self._render({**values, "messages": messages})
            without = self._render({**values, "messages": messages, "add_generation_prompt": False})
        except LimitExceeded:
            raise
        except TemplateRefused:
            return None
        return whole.removeprefix(without)

    @property
    def support(self) -> ToolSupport:
        """What the template knows of tools; found out when it is first needed. Raises
        LimitExceeded."""
        if self._support is None:
            self._support = self._find_support()
        return self._support

    def _find_support(self) -> ToolSupport:
        for arguments_as_text in (False, True):
            for tools in (PROBE_TOOLS, None):
                try:
                    rendered = self._render(
                        {
                            "tools": tools,
                            "documents": None,
                            "add_generation_prompt": True,
                            "messages": probe_conversation(arguments_as_text),
                        }
                    )
                except LimitExceeded:
                    raise
                except TemplateRefused:
                    continue
                support = ToolSupport.seen_in(rendered, arguments_as_text, bool(tools))
                if support.calls and (support.tools or tools is None):
                    return support
        return self._tools_alone()

    def _tools_alone(self) -> ToolSupport:
        """Of a template that renders no calls: whether it renders tools."""
        values = {"tools": PROBE_TOOLS, "documents": None, "add_generation_prompt": True}
        try:
            rendered = self._render({**values, "messages": _HELLO})
        except LimitExceeded:
            raise
        except TemplateRefused:
            return ToolSupport()
        seen = ToolSupport.seen_in(rendered, False, True)
        return ToolSupport(rendered=rendered, tools=seen.tools)

    def render(self, chat: Chat) -> str:
        """Raises TemplateRefused."""
        if chat.tools and not self.support.tools:
            return self._render_written_out(chat)
        return self._render_chat(chat, None)

    def _render_written_out(self, chat: Chat) -> str:
        """With the tools in the system message; where the template takes none, in the user's."""
        bare = replace(chat, tools=b"")
        tools: list[Any] = json.loads(chat.tools)
        try:
            return self._render_chat(bare, (tools, "system"))
        except LimitExceeded:
            raise
        except TemplateRefused:
            if any(message.role in ("system", "developer") for message in chat.messages):
                raise
            return self._render_chat(bare, (tools, "user"))

    def _render_chat(self, chat: Chat, written: tuple[list[Any], str] | None) -> str:
        """`written`: tools that are written into the messages, and the role of the one that holds
        them."""
        values = self._values(chat)
        if chat.continue_final_message and chat.add_generation_prompt:
            raise TemplateRefused(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false"
            )
        messages = [self._message(message) for message in chat.messages]
        if any(message.fields or message.role == "tool" for message in chat.messages):
            messages = message_fields(messages, chat.messages, self.support, self.short_ids)
            if not self.support.calls:
                messages = written_out(messages)
        if written is not None:
            messages = with_tools_first(messages, *written)
        forms = self._forms_of(chat, messages, values)
        texts = [message["content"] for message in messages]
        if chat.continue_final_message:
            messages[-1]["content"] += MARK
        rendered = self._render({**values, "messages": _in_forms(messages, forms)})
        if forms is None:
            _check_contained(messages, texts, rendered)
        return _cut(rendered) if chat.continue_final_message else rendered

    def _values(self, chat: Chat) -> dict[str, Any]:
        """The template's variables besides the messages and the special tokens. Raises
        TemplateRefused."""
        tools = json.loads(chat.tools) if chat.tools else None
        values = {
            "tools": tools,
            "documents": None,
            "add_generation_prompt": chat.add_generation_prompt,
            **self._defaults,
        }
        if not chat.template_kwargs:
            return values
        try:
            extra = json.loads(chat.template_kwargs)
        except (ValueError, RecursionError) as error:
            raise TemplateRefused(f"chat_template_kwargs is not JSON: {error}") from None
        if not isinstance(extra, dict):
            raise TemplateRefused("chat_template_kwargs must be an object of names and values")
        taken = OWN_NAMES & extra.keys()
        if taken:
            raise TemplateRefused(
                f"chat_template_kwargs: {', '.join(sorted(taken))} is given by a field of the request itself"
            )
        if chat.tools:
            extra.pop("tools", None)
        return {**values, **extra}

    def _message(self, message: ChatMessage) -> Message:
        """`developer` is OpenAI's newer name of `system`: a template that does not know it gets the
        older one."""
        if message.role not in ROLES and message.role not in self._source:
            raise TemplateRefused(
                f"A message has the role {message.role!r}, which the chat template does not name; "
                f"use one of {', '.join(ROLES)}."
            )
        is_renamed = message.role == "developer" and not self._knows_developer
        role = "system" if is_renamed else message.role
        names = {} if message.name is None else {"name": message.name}
        return {"role": role, "content": message.content, **names}

    def _forms_of(self, chat: Chat, messages: list[Message], values: Message) -> Forms | None:
        """The form in which the template wants the content of each message, so that it shows all of
        them; None where the template does not render without these very texts. Raises
        TemplateRefused when it leaves out a message in every form."""
        roles = tuple(
            (message["role"], _has_text(message), *sorted(message)) for message in messages
        )
        shape = hash((roles, chat.add_generation_prompt, chat.template_kwargs, bool(chat.tools)))
        if shape not in self._forms:
            if len(self._forms) >= MAX_SHAPES:
                self._forms.clear()
            self._forms[shape] = self._find_forms(messages, values)
        return self._forms[shape]

    def _find_forms(self, messages: list[Message], values: Message) -> Forms | None:
        probes = [
            {**message, "content": PROBE.format(index)} if _has_text(message) else message
            for index, message in enumerate(messages)
        ]
        as_text = (False,) * len(probes)
        as_parts = (True,) * len(probes)
        lost_as_text = self._lost(probes, as_text, values)
        if lost_as_text == []:
            return as_text
        lost_as_parts = self._lost(probes, as_parts, values)
        if lost_as_parts == []:
            return as_parts
        if lost_as_text:
            mixed = tuple(index in lost_as_text for index in range(len(probes)))
            if self._lost(probes, mixed, values) == []:
                return mixed
        lost = lost_as_text or lost_as_parts
        if lost is None:
            return None
        raise _left_out(messages, lost[0])

    def _lost(self, probes: list[Message], forms: Forms, values: Message) -> list[int] | None:
        """The messages that the template leaves out in these forms; None where it does not render.
        Raises LimitExceeded."""
        try:
            rendered = self._render({**values, "messages": _in_forms(probes, forms)})
        except LimitExceeded:
            raise
        except TemplateRefused:
            return None
        shown = {int(index) for index in _PROBES.findall(rendered)}
        return [
            index for index, probe in enumerate(probes) if _has_text(probe) and index not in shown
        ]

    def _render(self, values: dict[str, Any]) -> str:
        try:
            with self._limit:
                return self._collect(values)
        except _Raised as error:
            raise TemplateRefused(str(error)) from None
        except RenderTimeout:
            raise LimitExceeded(
                f"the chat template took longer than {self._limit.timeout_s:g} s with these messages"
            ) from None
        except SecurityError as error:
            raise LimitExceeded(
                f"the chat template cannot be rendered with these messages: {error}"
            ) from None
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise TemplateRefused(
                f"the chat template cannot be rendered with these messages: {error}"
            ) from None

    def _collect(self, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate({**self._names, **values}):
            size += len(piece)
            if size > MAX_OUTPUT:
                raise SecurityError(f"its output is longer than {MAX_OUTPUT} characters")
            pieces.append(piece)
        return "".join(pieces)


_HELLO: Final[list[Message]] = [{"role": "user", "content": "Hello."}]


def _has_text(message: Message) -> bool:
    """Whether there is anything that a template must show. Many leave out what is said beside
    calls."""
    content: str = message["content"]
    return bool(content) and not content.isspace() and not message.get("tool_calls")


def _in_forms(messages: list[Message], forms: Forms | None) -> list[Message]:
    """The messages for the template; those that `forms` says with their content as a list of one
    part."""
    if forms is None or not any(forms):
        return messages
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if as_parts
        else message
        for message, as_parts in zip(messages, forms, strict=True)
    ]


def _check_contained(messages: list[Message], texts: list[str], rendered: str) -> None:
    """Raises TemplateRefused when a text is not in the prompt. They mostly stand in order there, so
    each is looked for behind the one before it first."""
    end = 0
    for index, text in enumerate(texts):
        stripped = text.strip()
        at = rendered.find(stripped, end)
        if at >= 0:
            end = at + len(stripped)
        elif stripped not in rendered and _has_text(messages[index]):
            raise _left_out(messages, index)


def _left_out(messages: list[Message], index: int) -> TemplateRefused:
    return TemplateRefused(
        f"the chat template of this model leaves out messages[{index}] (role {messages[index]['role']!r}); "
        "leave that message out, give it another role, or start the server with another --chat-template"
    )


def _cut(rendered: str) -> str:
    """The text up to the end of the final message; without its trailing space where the template
    strips messages."""
    end = rendered.rfind(MARK.rstrip())
    if end < 0:
        raise TemplateRefused(
            "continue_final_message: the chat template leaves out the final message"
        )
    kept = rendered[:end]
    return kept if rendered.startswith(MARK, end) else kept.rstrip()
