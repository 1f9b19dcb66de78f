"""Each kind of grammar in the form that llguidance compiles. Knows no tokens and no requests.

Every function raises GrammarError for a source that it cannot read; what is wrong with the schema
or the expression itself shows when it is compiled.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from llguidance import LLMatcher, regex_to_lark
from pagewire_protocol.grammar import Grammar, GrammarKind

from .errors import GrammarError
from .gbnf import lark_of_gbnf
from .lark import ends_within_escape, literal
from .schemas import json_options, json_term, prepared
from .structural_tags import lark_of_tags

_LARK_TERMS: Final = re.compile(
    r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/|(?P<name><(?!\[)[^\s<>"]+>)'
)
"""Strings and expressions, which are passed over, and names of special tokens."""


def source_of(grammar: Grammar, special: Mapping[str, int]) -> str:
    """What LLMatcher takes. `special`: the ids of the vocabulary's special tokens, by name."""
    if grammar.kind is GrammarKind.STRUCTURAL_TAG:
        return _structural_tag(grammar, special)
    if grammar.kind is GrammarKind.LARK:
        return _lark(grammar, special)
    return _READERS[grammar.kind](grammar)


def _schema(grammar: Grammar) -> str:
    return _of_schema(_parsed(grammar.source), grammar)


def _object(grammar: Grammar) -> str:
    return _of_schema({"type": "object"}, grammar)


def _of_schema(schema: Any, grammar: Grammar) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema must be an object, not {json.dumps(schema)[:80]}")
    try:
        return LLMatcher.grammar_from_json_schema(
            json.dumps(prepared(schema, grammar)), overrides=json_options(grammar)
        )
    except ValueError as error:
        raise GrammarError(f"the JSON schema cannot be read: {error}") from None


def _regex(grammar: Grammar) -> str:
    return LLMatcher.grammar_from_lark(f"start: {regex_term(grammar.source)}")


def regex_term(pattern: str) -> str:
    """The term of a Lark rule for a regular expression. `\\d` and `\\w` are ASCII's, as in the
    patterns of JSON schemas."""
    if ends_within_escape(pattern):
        raise GrammarError(f"the expression {pattern[-40:]!r} ends with a single backslash")
    expression = regex_to_lark(pattern.replace("\n", "\\n"), "dw")
    return f"/{expression}/"


def _choice(grammar: Grammar) -> str:
    """As one terminal: a rule of more than some 2,000 alternatives is too much for the parser."""
    choices = _parsed(grammar.source)
    if not isinstance(choices, list) or not choices or not all(map(_is_text, choices)):
        raise GrammarError("a choice is a list of one string or more, none of them empty")
    options = " | ".join(map(literal, choices))
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {options}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _lark(grammar: Grammar, special: Mapping[str, int]) -> str:
    """A name in angle brackets that is no special token of this model, though it is one of others,
    stands for its text."""

    def spelled(match: re.Match[str]) -> str:
        name = match["name"]
        return match[0] if name is None or name in special else literal(name)

    return LLMatcher.grammar_from_lark(_LARK_TERMS.sub(spelled, grammar.source))


def _gbnf(grammar: Grammar) -> str:
    return LLMatcher.grammar_from_lark(lark_of_gbnf(grammar.source))


def _structural_tag(grammar: Grammar, special: Mapping[str, int]) -> str:
    def schema_rule(schema: Any) -> str:
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise GrammarError("the schema of a structural tag must be an object")
        return json_term(schema, grammar)

    return LLMatcher.grammar_from_lark(
        lark_of_tags(
            _parsed(grammar.source),
            schema_rule,
            regex_term,
            lambda text: pieces(text, special),
        )
    )


def pieces(text: str, special: Mapping[str, int]) -> list[str]:
    """`text` as the terms of a Lark rule: strings, and ids where it names special tokens."""
    if not special:
        return [literal(text)]
    names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    parts = [part for part in re.split(f"({names})", text) if part]
    return [f"<[{special[part]}]>" if part in special else literal(part) for part in parts]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"it is no JSON: {error}") from None


_READERS: Final[dict[GrammarKind, Callable[[Grammar], str]]] = {
    GrammarKind.JSON_SCHEMA: _schema,
    GrammarKind.JSON_OBJECT: _object,
    GrammarKind.REGEX: _regex,
    GrammarKind.CHOICE: _choice,
    GrammarKind.GBNF: _gbnf,
}
