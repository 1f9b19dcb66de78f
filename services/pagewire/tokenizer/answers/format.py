"""What a format of answers is made of: how a model writes its reasoning and its calls of tools, as
data. Knows no text; parser.py reads texts by it, forced.py writes grammars by it.

A format is one short file in formats/. The markers of a call body are literal texts; where one is a
special token of the vocabulary, the token stands for it.
"""

from typing import Literal

from msgspec import Struct


class Reasoning(Struct, frozen=True):
    """How thinking is marked: the text between `begin` and `end`."""

    name: str
    begin: str
    end: str
    parser_names: tuple[str, ...] = ()
    """What --reasoning-parser calls it."""
    calls_end_it: bool = False
    """A call that begins within it ends it."""


class Section(Struct, frozen=True):
    """What stands around all calls of an answer. Calls may also come without it."""

    begin: str
    end: str


class JsonCalls(Struct, frozen=True, kw_only=True):
    """A call is a JSON object with name and arguments; or a list of such objects."""

    begin: tuple[str, ...] = ()
    """What begins a call, each of these. Empty: a call begins the answer, without a marker."""
    end: str = ""
    """What ends it; empty: the end of the JSON."""
    name_keys: tuple[str, ...] = ("name",)
    arguments_keys: tuple[str, ...] = ("arguments", "parameters")
    is_list: bool = False
    """How a forced call is written: as a list of objects."""
    is_bare: bool = False
    """An answer that begins with the JSON of a known tool is a call as well."""
    separator: str = ""
    """Between two calls, of a format without lists and without an end."""


class NamedCalls(Struct, frozen=True, kw_only=True):
    """The name of the function stands by itself, then its arguments as one JSON object."""

    begin: str
    name_end: tuple[str, ...]
    """What ends the name, each of these; the first one in forced calls."""
    end: str = ""
    name_begin: str = ""
    """What is before the name, after `begin`: everything up to this is no part of the name."""
    name_lead: str = ""
    """What a forced call has between `begin` and `name_begin`, or before the name."""
    arguments_lead: str = ""
    """The same between `name_end` and the arguments."""
    arguments_tail: str = ""
    """The same between the arguments and `end`."""
    name_pattern: str = "(?P<name>.*)"
    """What of the name is the function's: a regular expression with the group `name`."""
    name_is_id: bool = False
    """The whole text of the name is the call's id."""
    id_begin: str = ""
    """What ends the name where a call's id follows, up to `name_end`."""
    json_instead: bool = False
    """Where JSON follows `begin`, it is a JSON call."""
    forced_as_list: bool = False
    """Forced calls are such a list."""
    content_name: str = ""
    """Under this name the text up to the next call is content."""


class ParameterCalls(Struct, frozen=True, kw_only=True):
    """Each argument stands by itself between markers."""

    begin: str
    """What begins a call, right before its name."""
    name_end: tuple[str, ...]
    key_begin: str
    key_end: str
    value_begin: str = ""
    value_end: str
    end: str
    attribute_end: str = ""
    """What ends attributes after the key, `string="true"` among them."""
    lead: str = ""
    """Whitespace of a forced call after its name, and after each value."""
    strips_lines: bool = False
    """The line breaks right within the markers of a value are no part of it."""


class PythonCalls(Struct, frozen=True, kw_only=True):
    """Calls as in Python: `[f(a=1), g(b="x")]`."""

    begin: str = ""
    """Empty: an answer that begins with such a list is one."""
    end: str = ""
    brackets: bool = True


class BraceCalls(Struct, frozen=True, kw_only=True):
    """`call:NAME{key:value, ...}` with bare keys, and strings between `quote`s."""

    begin: str
    end: str
    quote: str


class HarmonyCalls(Struct, frozen=True, kw_only=True):
    """Every part of the answer is a message with a header: gpt-oss."""

    start: str = "<|start|>"
    channel: str = "<|channel|>"
    message: str = "<|message|>"
    constrain: str = "<|constrain|>"
    ends: tuple[str, ...] = ("<|end|>", "<|call|>", "<|return|>")


Calls = JsonCalls | NamedCalls | ParameterCalls | PythonCalls | BraceCalls | HarmonyCalls
IdStyle = Literal["plain", "nine"]


class AnswerFormat(Struct, frozen=True, kw_only=True):
    """How one family of models writes calls."""

    name: str
    parser_names: tuple[str, ...] = ()
    """What --tool-call-parser calls it, as vLLM and SGLang do."""
    calls: Calls
    section: Section | None = None
    signs: tuple[str, ...] = ()
    """Texts that are all in what a chat template makes of a conversation with tools and a call, or
    in its source."""
    hidden: tuple[str, ...] = ()
    """Further markers that are no content."""
    id_style: IdStyle = "plain"
    """What ids of calls look like; "nine": nine letters and digits."""


def markers_of(answer_format: AnswerFormat, reasoning: Reasoning | None) -> tuple[str, ...]:
    """All texts that tell parts of an answer apart."""
    markers: list[str] = list(answer_format.hidden)
    if answer_format.section:
        markers += [answer_format.section.begin, answer_format.section.end]
    for value in _texts(answer_format.calls):
        markers.append(value)
    if reasoning:
        markers += [reasoning.begin, reasoning.end]
    return tuple(dict.fromkeys(marker for marker in markers if marker.strip()))


def _texts(calls: Calls) -> list[str]:
    fields = ("begin", "end", "name_begin", "name_end", "key_begin", "key_end", "value_begin")
    fields += ("value_end", "id_begin", "quote", "start", "channel", "message", "constrain", "ends")
    texts: list[str] = []
    for name in fields:
        value: object = getattr(calls, name, "")
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, tuple):
            texts += [item for item in value if isinstance(item, str)]  # type: ignore[reportUnknownVariableType]
    return texts
