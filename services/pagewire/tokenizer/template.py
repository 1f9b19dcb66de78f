"""Chat templates: a conversation as the text the model was trained on. It knows jinja and no
tokens.

Rendered as transformers renders them (the same names, filters and whitespace rules), inside jinja's
immutable sandbox and under limits: the size of the output, the reach of `range` and of repetition,
and the time, which `Watchdog` enforces.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pagewire_protocol.messages import Chat

from . import templates
from .watchdog import RenderTimeout, Watchdog

MAX_OUTPUT: Final = 16_777_216
TIMEOUT_S: Final = 2.0
MARK: Final = "\uf8ffpagewire:continue\uf8ff "
"""Where the final message ends in the rendered text. Private-use characters, so that no message
contains it; the space at its end shows whether the template strips messages."""
OWN_NAMES: Final = {"messages", "add_generation_prompt", "continue_final_message"}


class TemplateRefused(ValueError):
    """The template rejects this conversation, or cannot be rendered with it. The message is shown
    to the client."""


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


def read_option(option: str) -> str:
    """The template of --chat-template: a built-in one by its name, a file's content, or the option
    itself when it is a template.

    Raises ValueError."""
    if option in templates.names():
        return templates.source(option)
    if not any(mark in option for mark in ("{{", "{%", "{#", "\n")):
        path = Path(option).expanduser()
        if not path.is_file():
            built_in = ", ".join(templates.names())
            raise ValueError(
                f"--chat-template: {option} is neither a file nor a jinja template nor a built-in one ({built_in})"
            )
        return path.read_text()
    return option


class ChatTemplate:
    """One compiled template. `names` are the special tokens it may use, like bos_token. Raises
    ValueError when it does not compile."""

    def __init__(
        self, source: str, names: dict[str, str], watchdog: Watchdog | None = None
    ) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from None
        self._names = names
        self._watchdog = watchdog or Watchdog(TIMEOUT_S)

    def render(self, chat: Chat) -> str:
        """Raises TemplateRefused."""
        values = _values(chat)
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        for message, source in zip(messages, chat.messages, strict=True):
            if source.name is not None:
                message["name"] = source.name
        if not chat.continue_final_message:
            return self._render({**values, "messages": messages})
        if chat.add_generation_prompt:
            raise TemplateRefused(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false"
            )
        messages[-1]["content"] += MARK
        return _cut(self._render({**values, "messages": messages}))

    def _render(self, values: dict[str, Any]) -> str:
        try:
            with self._watchdog:
                return self._collect(values)
        except _Raised as error:
            raise TemplateRefused(str(error)) from None
        except RenderTimeout:
            raise TemplateRefused(
                f"the chat template took longer than {self._watchdog.timeout_s:g} s with these messages"
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


def _values(chat: Chat) -> dict[str, Any]:
    """The template's variables besides the messages and the special tokens. Raises
    TemplateRefused."""
    values = {"tools": None, "documents": None, "add_generation_prompt": chat.add_generation_prompt}
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
    return {**values, **extra}


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
