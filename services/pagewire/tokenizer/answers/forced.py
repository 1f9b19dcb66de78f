"""Grammars for what an answer must hold: calls of tools in the model's own format, JSON or calls, an
end of reasoning after so many tokens. In llguidance's Lark dialect; knows no streams.

A call is written as the model has learnt it, its arguments by the schema of the tool; so what is
forced is read back by the same parser as what a model writes by itself.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pagewire_protocol.grammar import (
    DEFAULT_WHITESPACE,
    MAX_GRAMMAR_SOURCE,
    MAX_SCHEMA_DEPTH,
    Grammar,
    GrammarKind,
)
from pagewire_protocol.sampling import AnswerOptions, ToolChoice

from .format import (
    AnswerFormat,
    BraceCalls,
    Calls,
    HarmonyCalls,
    JsonCalls,
    NamedCalls,
    ParameterCalls,
    PythonCalls,
    Reasoning,
)
from .tools import Schema, Tools, is_text

MOST_CALLS: Final = 16
"""Of a forced answer: a model that must call may go on calling for ever."""
_ANY_TEXT: Final = r"/(.|\n)*/"
_GUIDANCE: Final = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": DEFAULT_WHITESPACE,
    "coerce_one_of": True,
    "lenient": True,
}
"""Schemas of tools are written for models, not for validators: what the matcher does not know of one
is not held, where the tool is not strict."""


class UnsupportedAnswer(ValueError):
    """No grammar can be made of what a request asks for; `param` is what is at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class ForcedAnswers:
    """The grammars of one model."""

    def __init__(
        self, answer_format: AnswerFormat, reasoning: Reasoning | None, special: Mapping[str, int]
    ) -> None:
        """`special`: ids of special tokens, by their texts."""
        self._format = answer_format
        self._reasoning = reasoning
        self._special = special
        names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
        self._names = re.compile(f"({names})") if special else None

    def grammar(
        self,
        options: AnswerOptions,
        tools: Tools,
        wanted: Grammar | None,
        opens_reasoning: bool,
    ) -> Grammar | None:
        """What holds the answer to its options. `wanted`: what the request says of its content; it
        begins behind the reasoning that the prompt has opened. Raises UnsupportedAnswer."""
        lark = self._calls(options, tools, wanted)
        reasoning = self._reasoning
        budget = options.thinking_budget
        if budget >= 0 and opens_reasoning and reasoning is not None:
            return self._budgeted(budget, lark, wanted)
        after = reasoning.end if opens_reasoning and reasoning is not None else ""
        if lark is not None:
            return _grammar(lark, after=after, param="tools")
        if wanted is not None and after:
            return Grammar(**{**_fields(wanted), "after": after})
        return wanted

    def _budgeted(self, budget: int, lark: str | None, wanted: Grammar | None) -> Grammar:
        """Reasoning of at most `budget` tokens, its end, then the answer."""
        reasoning = self._reasoning
        assert reasoning is not None
        if lark is None:
            body = _json_rule(wanted)
            if wanted is not None and body is None:
                raise UnsupportedAnswer(
                    "`thinking_token_budget` is not supported together with this form of the answer;"
                    " JSON schemas and tools are",
                    "thinking_token_budget",
                )
            lark = f"answer: {body or _ANY_TEXT}"
        end = self._terms(reasoning.end)
        thinking = f"thinking[max_tokens={budget}]: {_ANY_TEXT}" if budget else 'thinking: ""'
        lark = f"start: thinking {end} /[ \\n\\t]{{0,4}}/ answer\n{thinking}\n{lark}"
        return _grammar(lark, param="thinking_token_budget")

    def _calls(self, options: AnswerOptions, tools: Tools, wanted: Grammar | None) -> str | None:
        """The rule `answer` and what it needs; None where calls are free, or not possible."""
        if not tools.functions:
            return None
        if options.tool_choice in (ToolChoice.REQUIRED, ToolChoice.NAMED):
            names = list(tools.functions)
            if options.tool_choice is ToolChoice.NAMED:
                names = [options.tool_name]
            return self._rules(names, tools, options.parallel_tool_calls, None)
        if options.tool_choice is ToolChoice.AUTO and wanted is not None:
            content = _json_rule(wanted)
            if content is not None:
                names = list(tools.functions)
                return self._rules(names, tools, options.parallel_tool_calls, content)
        return None

    def _rules(
        self, names: Iterable[str], tools: Tools, parallel: bool, content: str | None
    ) -> str:
        writer = _Writer(self._terms, tools)
        answer = writer.answer(self._format, list(names), parallel)
        if content is not None:
            answer = f"({answer}) | ({content})"
        return "\n".join([f"answer: {answer}", *writer.rules])

    def _terms(self, text: str) -> str:
        """A literal text as terms of a rule: special tokens by their ids."""
        parts = self._names.split(text) if self._names else [text]
        terms = [
            f"<[{self._special[part]}]>" if part in self._special else _literal(part)
            for part in parts
            if part
        ]
        return " ".join(terms)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _fields(grammar: Grammar) -> dict[str, Any]:
    return {name: getattr(grammar, name) for name in grammar.__struct_fields__}


def _grammar(lark: str, *, param: str, after: str = "") -> Grammar:
    if not lark.startswith("start:"):
        lark = "start: answer\n" + lark
    if len(lark) > MAX_GRAMMAR_SOURCE:
        raise UnsupportedAnswer(
            f"the schemas of the tools make a grammar of {len(lark)} characters; at most "
            f"{MAX_GRAMMAR_SOURCE} are possible where calls are forced",
            "tools",
        )
    return Grammar(GrammarKind.LARK, lark, after=after, param=param)


def _json_rule(wanted: Grammar | None) -> str | None:
    """The term of a grammar for JSON; None for one of another kind."""
    if wanted is None:
        return None
    if wanted.kind is GrammarKind.JSON_OBJECT:
        return _json({"type": "object"}, strict=True)
    if wanted.kind is GrammarKind.JSON_SCHEMA:
        return _json(json.loads(wanted.source), strict=not wanted.lenient)
    return None


def _json(schema: Any, strict: bool) -> str:
    if not isinstance(schema, dict):
        schema = {}
    guidance = {**_GUIDANCE, "lenient": not strict}
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
        key: value if key in ("enum", "const", "default", "examples") else closed(value, depth + 1)
        for key, value in schema.items()
    }
    if isinstance(parts.get("properties"), dict) and parts.get("type", "object") == "object":
        parts.setdefault("additionalProperties", False)
    return parts


class _Writer:
    """Writes the rules of one request's calls."""

    def __init__(self, terms: Any, tools: Tools) -> None:
        self.rules: list[str] = []
        self._terms = terms
        self._tools = tools

    def answer(self, answer_format: AnswerFormat, names: list[str], parallel: bool) -> str:
        calls, section = answer_format.calls, answer_format.section
        call = self.rule(" | ".join(self._call(calls, name) for name in names))
        row = self._row(calls, call, parallel)
        if section is None:
            return row
        line = self._terms("\n") + " " if section.begin.startswith("<tool_call") else ""
        if line:  # a section for each call
            whole = f"{self._terms(section.begin)} {line}{call} {line}{self._terms(section.end)}"
            return self._many(self.rule(whole), self._terms("\n"), parallel)
        return f"{self._terms(section.begin)} {row} {self._terms(section.end)}"

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
                return f'{opening} {self._many(call, terms(", "), parallel)} "]"'
            case JsonCalls(separator=separator) if separator:
                return self._many(call, terms(separator), parallel)
            case NamedCalls(forced_as_list=True, begin=begin):
                return f'{terms(begin)} "[" {self._many(call, terms(", "), parallel)} "]"'
            case PythonCalls(brackets=True):
                return f'"[" {self._many(call, terms(", "), parallel)} "]"'
            case PythonCalls(begin=begin, end=end):
                row = self._many(call, terms("\n"), parallel)
                return f"{terms(begin + chr(10))} {row} {terms(chr(10) + end)}"
            case HarmonyCalls(start=start):
                return self._many(call, terms(f"{start}assistant"), parallel)
            case JsonCalls() | ParameterCalls():
                return self._many(call, terms("\n"), parallel)
            case _:
                return self._many(call, "", parallel)

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
                return f"{terms(lead)}{number} {terms(opening)} {self._arguments(name)} {tail}"
            case ParameterCalls():
                return self._parameters(calls, name)
            case PythonCalls():
                return self._keywords(name)
            case BraceCalls():
                return self._braces(calls, name)
            case HarmonyCalls():
                header = f"{calls.channel}commentary to=functions.{name} {calls.constrain}json"
                body = self._arguments(name)
                return f"{terms(header + calls.message)} {body} {terms(calls.ends[1])}"

    def _arguments(self, name: str) -> str:
        schema = self._tools.parameters(name)
        if "type" not in schema and "$ref" not in schema:
            schema = {**schema, "type": "object"}
        return _json(closed(schema), strict=self._is_strict(name))

    def _is_strict(self, name: str) -> bool:
        return self._tools.functions.get(name, {}).get("strict") is True

    def _object(self, name: str, key: str) -> str:
        opening = f'{{"name": {json.dumps(name)}, "{key}": '
        return f'{_literal(opening)} {self._arguments(name)} "}}"'

    def _json_call(self, calls: JsonCalls, name: str) -> str:
        body = self._object(name, calls.arguments_keys[0])
        if calls.is_list or not calls.end:
            return body
        opening = self._terms(calls.begin[0] + "\n")
        return f"{opening} {body} {self._terms(chr(10) + calls.end)}"

    def _properties(self, name: str) -> Iterable[tuple[str, Schema, bool]]:
        """Name, schema, whether it must be there; of each argument."""
        schema = self._tools.parameters(name)
        properties: Any = schema.get("properties")
        required: Any = schema.get("required")
        if not isinstance(properties, dict):
            return
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        for key, value in properties.items():
            value = closed(value) if isinstance(value, dict) else {}
            yield key, {**value, **shared}, isinstance(required, list) and key in required

    def _parameters(self, calls: ParameterCalls, name: str) -> str:
        terms = self._terms
        pieces = [terms(calls.begin + name + calls.name_end[0])]
        if calls.name_end[0] != "\n" and calls.lead:
            pieces.append(terms(calls.lead))
        for key, schema, is_required in self._properties(name):
            attribute = ""
            if calls.attribute_end:
                is_string = is_text(self._tools.types_of(name, key))
                attribute = f' string="{str(is_string).lower()}"' + calls.attribute_end
            opening = calls.key_begin + key + calls.key_end + attribute
            if calls.value_begin:
                opening += calls.lead + calls.value_begin
            line = "\n" if calls.strips_lines else ""
            value = self._value(name, key, schema, line + calls.value_end)
            entry = f"{terms(opening + line)} {value} {terms(calls.lead)}"
            pieces.append(entry if is_required else f"({entry})?")
        pieces.append(terms(calls.end))
        return " ".join(pieces)

    def _value(self, name: str, key: str, schema: Schema, end: str) -> str:
        """A value, and what ends it."""
        types = self._tools.types_of(name, key)
        if is_text(types) and "enum" not in schema and "const" not in schema:
            return self._text_up_to(end)
        options: Any = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if is_text(types) and isinstance(options, list):
            choices = " | ".join(_literal(option) for option in options if isinstance(option, str))
            return f"({choices}) {self._terms(end)}"
        return f"{_json(schema, strict=self._is_strict(name))} {self._terms(end)}"

    def _text_up_to(self, end: str) -> str:
        """Any text, and `end`."""
        terms = self._terms(end)
        if terms.startswith("<["):
            return f"{_ANY_TEXT} {terms}"
        pattern = re.escape(end).replace("/", r"\/").replace("\\\n", "\\n")
        rule = f"value_{len(self.rules)}"
        self.rules.append(f"{rule}[lazy]: /(.|\\n)*{pattern}/")
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
            f"{lead(key)} {_json(schema, strict)}" for key, schema, needed in properties if needed
        ]
        others = [
            f"{lead(key)} {_json(schema, strict)}"
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
