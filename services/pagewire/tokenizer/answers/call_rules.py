"""Calls of tools as rules of a grammar, in the model's own format, arguments by the schemas of the
tools. In llguidance's Lark dialect; knows no requests and no streams.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from msgspec.structs import replace
from pagewire_protocol.grammar import DEFAULT_WHITESPACE, MAX_SCHEMA_DEPTH, SCHEMA_FORMATS

from ...grammar.lark import escaped, literal
from ...grammar.schemas import allows_everything, bounded
from .format import (
    AnswerFormat,
    BraceCalls,
    Calls,
    HarmonyCalls,
    JsonCalls,
    NamedCalls,
    ParameterCalls,
    PythonCalls,
    Section,
)
from .tools import Schema, Tools, is_text, resolved

MOST_CALLS: Final = 16
"""Of a forced answer: a model that must call may go on calling for ever."""
ANY_TEXT: Final = r"/(.|\n)*/"
_SPACE: Final = r"/[ \n\t]{0,4}/"
_GUIDANCE: Final = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": DEFAULT_WHITESPACE,
}


def arguments_term(schema: Any, strict: bool) -> str:
    """The term for arguments in JSON by a schema of a tool, which is written for models, not for
    validators: what the matcher does not know of it is not held. `strict`: all keywords are, or the
    grammar is none."""
    if not isinstance(schema, dict):
        schema = {}
    guidance = {**_GUIDANCE, "coerce_one_of": not strict, "lenient": not strict}
    whole = {**schema, "x-guidance": guidance}
    # Characters beyond ASCII escaped: the text of the grammar is then safe in any lexer.
    return "%json " + json.dumps(whole)


def closed(schema: Any, depth: int = 0) -> Any:
    """The schema without room for arguments that it does not name: no tool would know them."""
    if isinstance(schema, list) and depth < MAX_SCHEMA_DEPTH:
        return [closed(item, depth + 1) for item in schema]
    if not isinstance(schema, dict) or depth >= MAX_SCHEMA_DEPTH:
        return schema
    parts = {
        key: value
        if key in ("enum", "const", "default", "examples")
        else bounded(key, closed(value, depth + 1))
        for key, value in schema.items()
        if _says_something(key, value)
    }
    names_properties = isinstance(parts.get("properties"), dict)
    is_object = names_properties and parts.get("type", "object") == "object"
    if is_object and "additionalProperties" not in parts:
        parts["additionalProperties"] = False
        parts["properties"] = _with_required(parts["properties"], parts.get("required"))
    return parts


def _says_something(key: str, value: Any) -> bool:
    """A format that JSON Schema does not define is an annotation, and programs write `null` for a
    keyword that they have no value for."""
    if value is None:
        return key in ("const", "default")
    if allows_everything(key, value):
        return False
    return key != "format" or not isinstance(value, str) or value in SCHEMA_FORMATS


def _with_required(properties: Schema, required: Any) -> Schema:
    """The properties, and those that are named as required alone: they may be anything."""
    names = required if isinstance(required, list) else []
    return {**properties, **{name: {} for name in names if name not in properties}}


class Opening(NamedTuple):
    """How a call begins in free text: its marker, and the terms of what must follow."""

    marker: str
    rest: str


def _is_of_each(section: Section) -> bool:
    """Each call has a section of its own."""
    return section.begin.startswith("<tool_call")


def _begin_of(calls: Calls) -> str:
    begin: Any = getattr(calls, "begin", "")
    return begin[0] if isinstance(begin, tuple) else begin


def _variants(calls: Calls) -> list[tuple[str, Calls]]:
    """Each marker that a call may begin with, and the calls that begin with it."""
    if isinstance(calls, JsonCalls):
        return [(begin, replace(calls, begin=(begin,))) for begin in calls.begin]
    if isinstance(calls, NamedCalls) and calls.forced_as_list:
        return [(calls.begin, calls), (calls.begin, replace(calls, forced_as_list=False))]
    begin = _begin_of(calls)
    return [(begin, calls)] if begin else []


class CallRules:
    """Writes the rules of one request's calls. `terms` writes a fixed text: strings, and special
    tokens by their ids."""

    def __init__(self, terms: Callable[[str], str], tools: Tools, *, is_free: bool = False) -> None:
        """`is_free`: calls may be written in the ways of a free answer, with other whitespace
        between them and with ids."""
        self._is_free = is_free
        self.rules: list[str] = []
        self._terms = terms
        self._tools = tools
        self._line = _SPACE if is_free else terms("\n")
        self._gap = _SPACE if is_free else ""
        """Where forced calls have nothing."""
        self._comma = f'"," {_SPACE}' if is_free else terms(", ")

    def answer(self, answer_format: AnswerFormat, names: list[str], parallel: bool) -> str:
        """Calls of these functions and nothing else: one or, where `parallel`, several."""
        calls = answer_format.calls
        section = answer_format.section
        call = self.rule(self._any_of(calls, names))
        if section is None:
            return self._row(calls, call, parallel)
        if _is_of_each(section):
            whole = self.rule(self._section(section, calls, call, parallel))
            return self._many(whole, self._line, parallel)
        return self._section(section, calls, call, parallel)

    def openings(
        self, answer_format: AnswerFormat, names: list[str], parallel: bool
    ) -> list[Opening]:
        """How calls of these functions begin in free text; none of a format whose calls begin an
        answer without a marker."""
        calls = answer_format.calls
        section = answer_format.section
        openings: list[Opening] = []
        if section is not None:
            call = self.rule(self._any_of(calls, names))
            whole = self._section(section, calls, call, parallel)
            openings.append(self._opening(section.begin, whole))
        openings += [
            self._opening(begin, self._begun(variant, names, parallel))
            for begin, variant in _variants(calls)
        ]
        return openings

    def _any_of(self, calls: Calls, names: list[str]) -> str:
        return " | ".join(self._call(calls, name) for name in names)

    def _section(self, section: Section, calls: Calls, call: str, parallel: bool) -> str:
        begin = self._terms(section.begin)
        end = self._terms(section.end)
        if _is_of_each(section):
            return f"{begin} {self._line} {call} {self._line} {end}"
        return f"{begin} {self._gap} {self._row(calls, call, parallel)} {self._gap} {end}"

    def _begun(self, calls: Calls, names: list[str], parallel: bool) -> str:
        """A call, or the list of calls, that begins with the one marker of `calls`."""
        match calls:
            case JsonCalls(end=end) if end and not calls.is_list:
                call = self.rule(" | ".join(self._json_object(calls, name) for name in names))
                row = self._many(call, self._line, parallel)
                return f"{self._line} {row} {self._line} {self._terms(end)}"
            case JsonCalls() | NamedCalls(forced_as_list=True):
                return self._row(calls, self.rule(self._any_of(calls, names)), parallel)
            case PythonCalls(brackets=True):
                row = self._row(calls, self.rule(self._any_of(calls, names)), parallel)
                return f"{row} ({self._terms(calls.end)})?"
            case PythonCalls():
                return self._row(calls, self.rule(self._any_of(calls, names)), parallel)
            case _:
                pass
        bodies = [self._behind(_begin_of(calls), self._call(calls, name)) for name in names]
        if isinstance(calls, NamedCalls) and calls.content_name:
            bodies.append(self._terms(calls.content_name + calls.name_end[0]))
        return f"({' | '.join(bodies)})"

    def _opening(self, marker: str, expression: str) -> Opening:
        return Opening(marker, self._behind(marker, expression))

    def _behind(self, marker: str, expression: str) -> str:
        """The terms of `expression` without those of the marker that it begins with."""
        terms = self._terms(marker)
        if expression.startswith(f"{terms} "):
            return expression[len(terms) + 1 :]
        # The marker and what follows it may be one string.
        if terms.endswith('"') and expression.startswith(terms[:-1]):
            return '"' + expression[len(terms) - 1 :]
        return expression

    def rule(self, body: str) -> str:
        """The name of a new rule."""
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _many(self, call: str, separator: str, parallel: bool) -> str:
        if not parallel:
            return call
        following = f"{separator} {call}" if separator else call
        return f"{call} ({following}){{0,{MOST_CALLS - 1}}}"

    def _row(self, calls: Calls, call: str, parallel: bool) -> str:
        """One call or several, with what stands between and around them."""
        terms = self._terms
        match calls:
            case JsonCalls(is_list=True, begin=(begin, *_)):
                opening = terms(begin) if begin.endswith("[") else terms(begin) + ' "["'
                return f'{opening} {self._many(call, self._comma, parallel)} "]"'
            case JsonCalls(separator=separator) if separator:
                return self._many(call, terms(separator), parallel)
            case NamedCalls(forced_as_list=True, begin=begin):
                return f'{terms(begin)} "[" {self._many(call, self._comma, parallel)} "]"'
            case PythonCalls(brackets=True):
                return f'"[" {self._many(call, self._comma, parallel)} "]"'
            case PythonCalls(begin=begin, end=end):
                row = self._many(call, self._line, parallel)
                return f"{terms(begin)} {self._line} {row} {self._line} {terms(end)}"
            case HarmonyCalls(start=start):
                return self._many(call, terms(f"{start}assistant"), parallel)
            case JsonCalls() | ParameterCalls():
                return self._many(call, self._line, parallel)
            case _:
                return self._many(call, self._gap, parallel)

    def _call(self, calls: Calls, name: str) -> str:
        terms = self._terms
        match calls:
            case JsonCalls():
                return self._json_call(calls, name)
            case NamedCalls(forced_as_list=True):
                return self._object(name, "arguments")
            case NamedCalls():
                lead = calls.begin + calls.name_lead + calls.name_begin + name
                number = r' ":" /[0-9]{1,2}/' if calls.name_is_id else ""
                opening = calls.name_end[0] + calls.arguments_lead
                tail = terms(calls.arguments_tail + calls.end)
                if calls.id_begin and self._is_free:
                    number += f" ({terms(calls.id_begin)} /[A-Za-z0-9]{{1,64}}/)?"
                return f"{terms(lead)}{number} {terms(opening)} {self.arguments(name)} {tail}"
            case ParameterCalls():
                return self._parameters(calls, name)
            case PythonCalls():
                return self._keywords(name)
            case BraceCalls():
                return self._braces(calls, name)
            case HarmonyCalls():
                header = f"{calls.channel}commentary to=functions.{name} {calls.constrain}json"
                body = self.arguments(name)
                return f"{terms(header + calls.message)} {body} {terms(calls.ends[1])}"

    def arguments(self, name: str) -> str:
        """The term for the arguments of a function."""
        schema = self._tools.parameters(name)
        if "type" not in schema and "$ref" not in schema:
            schema = {**schema, "type": "object"}
        return arguments_term(closed(schema), strict=self._is_strict(name))

    def _is_strict(self, name: str) -> bool:
        return self._tools.functions.get(name, {}).get("strict") is True

    def _object(self, name: str, key: str) -> str:
        opening = f'{{"name": {json.dumps(name)}, "{key}": '
        return f'{literal(opening)} {self.arguments(name)} "}}"'

    def _json_object(self, calls: JsonCalls, name: str) -> str:
        return self._object(name, calls.arguments_keys[0])

    def _json_call(self, calls: JsonCalls, name: str) -> str:
        body = self._json_object(calls, name)
        if calls.is_list or not calls.end:
            return body
        begin = self._terms(calls.begin[0])
        end = self._terms(calls.end)
        return f"{begin} {self._line} {body} {self._line} {end}"

    def _properties(self, name: str) -> Iterable[tuple[str, Schema, bool]]:
        """Name, schema, whether it must be there; of each argument."""
        root = self._tools.parameters(name)
        schema = resolved(root, root)
        properties: Any = schema.get("properties")
        required: Any = schema.get("required")
        if not isinstance(properties, dict):
            return
        shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
        for key, value in _with_required(properties, required).items():
            value = closed(value) if isinstance(value, dict) else {}
            yield key, {**value, **shared}, isinstance(required, list) and key in required

    def _parameters(self, calls: ParameterCalls, name: str) -> str:
        terms = self._terms
        lead = self._gap or terms(calls.lead)
        pieces = [terms(calls.begin + name + calls.name_end[0])]
        if calls.name_end[0] != "\n" and lead:
            pieces.append(lead)
        for key, schema, is_required in self._properties(name):
            attribute = ""
            if calls.attribute_end:
                is_string = is_text(self._tools.types_of(name, key))
                attribute = f' string="{str(is_string).lower()}"' + calls.attribute_end
            opening = calls.key_begin + key + calls.key_end + attribute
            value = self._value(name, key, schema, calls)
            if calls.value_begin:
                between = f"{terms(opening)} {lead} {terms(calls.value_begin)}"
                entry = f"{between} {value} {lead}"
            else:
                entry = f"{terms(opening)} {value} {lead}"
            pieces.append(entry if is_required else f"({entry})?")
        pieces.append(terms(calls.end))
        return " ".join(pieces)

    def _value(self, name: str, key: str, schema: Schema, calls: ParameterCalls) -> str:
        """A value, and what ends it."""
        types = self._tools.types_of(name, key)
        line = self._gap or (self._terms("\n") if calls.strips_lines else "")
        end = f"{line} {self._terms(calls.value_end)}"
        if is_text(types) and "enum" not in schema and "const" not in schema:
            if self._is_free or not calls.strips_lines:
                return self._text_up_to(calls.value_end)
            return f"{line} {self._text_up_to(chr(10) + calls.value_end)}"
        options: Any = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if is_text(types) and isinstance(options, list):
            choices = " | ".join(literal(option) for option in options if isinstance(option, str))
            return f"{line} ({choices}) {end}"
        return f"{line} {arguments_term(schema, strict=self._is_strict(name))} {end}"

    def _text_up_to(self, end: str) -> str:
        """Any text, and `end`."""
        terms = self._terms(end)
        token = terms.find("<[")
        if token >= 0:  # what stands before the special token is text like any other
            return f"{ANY_TEXT} {terms[token:]}"
        rule = f"value_{len(self.rules)}"
        self.rules.append(f"{rule}[lazy]: /(.|\\n)*{escaped(end)}/")
        return rule

    def _keywords(self, name: str) -> str:
        pieces = [self._terms(name + "(")]
        pieces.append(self._listed(name, lambda key: self._terms(f"{key}="), ", "))
        pieces.append('")"')
        return " ".join(piece for piece in pieces if piece)

    def _listed(self, name: str, lead: Any, separator: str) -> str:
        """The required arguments in order, then those that may be left out."""
        properties = sorted(self._properties(name), key=lambda entry: not entry[2])
        strict = self._is_strict(name)
        required = [
            f"{lead(key)} {arguments_term(schema, strict)}"
            for key, schema, needed in properties
            if needed
        ]
        others = [
            f"{lead(key)} {arguments_term(schema, strict)}"
            for key, schema, needed in properties
            if not needed
        ]
        between = f" {self._terms(separator)} "
        if required:
            optional = "".join(f" ({between}{entry})?" for entry in others)
            return between.join(required) + optional
        # The first one that is there has nothing before it.
        chains = [
            entry + "".join(f" ({between}{later})?" for later in others[index + 1 :])
            for index, entry in enumerate(others)
        ]
        return f"({' | '.join(chains)})?" if chains else ""

    def _braces(self, calls: BraceCalls, name: str) -> str:
        terms = self._terms
        if not any(rule.startswith("brace_value:") for rule in self.rules):
            text = self._text_up_to(calls.quote)
            self.rules += [
                f"brace_text: {terms(calls.quote)} {text}",
                r"brace_number: /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/",
                'brace_flag: "true" | "false"',
                "brace_value: brace_text | brace_number | brace_flag | brace_object | brace_list",
                'brace_object: "{" (brace_entry ("," brace_entry)*)? "}"',
                r'brace_entry: /[A-Za-z_][A-Za-z0-9_]{0,63}/ ":" brace_value',
                'brace_list: "[" (brace_value ("," brace_value)*)? "]"',
            ]
        kinds = {
            "string": "brace_text",
            "integer": r"/-?(0|[1-9][0-9]{0,15})/",
            "number": "brace_number",
            "boolean": "brace_flag",
            "object": "brace_object",
            "array": "brace_list",
            "null": '"null"',
        }
        required: list[str] = []
        others: list[str] = []
        for key, _, needed in self._properties(name):
            types = self._tools.types_of(name, key)
            value = " | ".join(kinds[item] for item in sorted(types) if item in kinds)
            entry = f"{terms(key + ':')} ({value or 'brace_value'})"
            (required if needed else others).append(entry)
        between = ' "," '
        if required:
            body = between.join(required) + "".join(f" ({between}{entry})?" for entry in others)
        else:
            chains = [
                entry + "".join(f" ({between}{later})?" for later in others[index + 1 :])
                for index, entry in enumerate(others)
            ]
            body = f"({' | '.join(chains)})?" if chains else ""
        return f"{terms(calls.begin + 'call:' + name + '{')} {body} {terms('}' + calls.end)}"
