"""What a request says about the form of its answer, by the names of OpenAI, vLLM, SGLang and
llama.cpp, as a Grammar. Knows names; what they hold is checked in requests/grammars.py.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final

import msgspec
from msgspec import Raw
from pagewire_protocol.grammar import Grammar

from ..requests.errors import invalid
from ..requests.grammars import (
    choice_grammar,
    object_grammar,
    regex_grammar,
    schema_grammar,
    structured_grammar,
    tag_grammar,
    text_grammar,
    whitespace_of,
)
from .openai import Request, ResponseFormat

_SINGLE: Final[dict[str, Callable[[Any, str], Grammar]]] = {
    "guided_json": schema_grammar,
    "guided_regex": regex_grammar,
    "guided_choice": choice_grammar,
    "guided_grammar": text_grammar,
    "structural_tag": tag_grammar,
    "json_schema": schema_grammar,
    "regex": regex_grammar,
    "ebnf": text_grammar,
    "grammar": text_grammar,
}
"""Parameters that hold one form each."""
_single_values: Final = attrgetter(*_SINGLE)
_NONE_GIVEN: Final = _single_values(Request())
"""The values of most requests: comparing with them at once is cheaper than one after the other."""
WHITESPACE: Final = "guided_whitespace_pattern"


def grammar_of(request: Request) -> Grammar | None:
    """None where the answer may be anything. Raises RequestError."""
    values = _single_values(request)
    named: list[str] = []
    if values != _NONE_GIVEN:
        named += [name for name, value in zip(_SINGLE, values, strict=True) if is_given(value)]
    if request.structured_outputs is not None:
        named.append("structured_outputs")
    if request.response_format is not None and request.response_format.type != "text":
        named.append("response_format")
    if not named:
        return None
    if len(named) > 1:
        raise invalid(
            f"An answer can have one form: {' and '.join(f'`{name}`' for name in named)} exclude "
            "each other.",
            named[0],
        )
    return _grammar(request, named[0])


def _grammar(request: Request, name: str) -> Grammar | None:
    if name == "structured_outputs":
        return structured_grammar(request.structured_outputs)
    if name == "response_format":
        return response_format_grammar(request.response_format)
    grammar = _SINGLE[name](getattr(request, name), name)
    if request.guided_whitespace_pattern is None:
        return grammar
    whitespace = whitespace_of(request.guided_whitespace_pattern, WHITESPACE)
    return msgspec.structs.replace(grammar, whitespace=whitespace)


def is_given(value: object) -> bool:
    """Whether a parameter's value asks for something."""
    if isinstance(value, Raw):
        return bytes(value) != b"null"
    return value is not None and value != ""


def response_format_grammar(
    form: ResponseFormat | None, param: str = "response_format"
) -> Grammar | None:
    """Of a `response_format`. Raises RequestError."""
    match form:
        case None | ResponseFormat(type="text"):
            return None
        case ResponseFormat(type="json_object"):
            return (
                schema_grammar(form.schema, param)
                if is_given(form.schema)
                else object_grammar(param)
            )
        case ResponseFormat(type="json_schema"):
            return _of_json_schema(form, param)
        case ResponseFormat(type="structural_tag"):
            fields = {name: getattr(form, name) for name in ("structures", "triggers", "format")}
            tag = {name: value for name, value in fields.items() if is_given(value)}
            return tag_grammar(tag, param)
        case _:
            raise invalid(
                f"`{param}` of type {form.type[:64]!r} is not supported, only 'text', 'json_object', "
                "'json_schema' and 'structural_tag'.",
                param,
            )


def _of_json_schema(form: ResponseFormat, param: str) -> Grammar:
    held = form.json_schema
    schema = held.schema if held is not None else form.schema
    if not is_given(schema):
        raise invalid(f"`{param}` of type 'json_schema' needs `json_schema.schema`.", param)
    return schema_grammar(schema, param, lenient=held is not None and held.strict is False)
