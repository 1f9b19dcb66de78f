"""From what a request says about the form of its answer to a Grammar. Used by HTTP, `LLM` and
run-batch alike; knows none of their types, and not what a schema means.

What is looked at here is what a grammar may cost: its size, its depth, the length of its lists.
Every function raises RequestError naming the parameter.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import msgspec
from msgspec import Raw
from pagewire_protocol.grammar import (
    DEFAULT_WHITESPACE,
    MAX_CHOICES,
    MAX_ENUM,
    MAX_GBNF_RULES,
    MAX_GBNF_SOURCE,
    MAX_GRAMMAR_SOURCE,
    MAX_PROPERTIES,
    MAX_SCHEMA_DEPTH,
    MAX_WHITESPACE,
    Grammar,
    GrammarKind,
)

from ..grammar.lark import ends_within_escape
from .errors import invalid

STRUCTURED_OUTPUTS: Final = "structured_outputs"
FORMS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""Of structured outputs: exactly one is given."""


def structured_grammar(outputs: object, param: str = STRUCTURED_OUTPUTS) -> Grammar | None:
    """Of an object with the attributes FORMS, of which one is given, and `whitespace_pattern`,
    `disable_any_whitespace` and `disable_additional_properties`; attributes may be missing. None
    for None."""
    if outputs is None:
        return None
    forms = [name for name in FORMS if _is_given(getattr(outputs, name, None))]
    if len(forms) != 1:
        got = " and ".join(forms) or "none"
        raise invalid(f"`{param}` must say exactly one of {', '.join(FORMS)}; got {got}.", param)
    (form,) = forms
    value: Any = getattr(outputs, form)
    options = _options(outputs, param)
    match form:
        case "json":
            return schema_grammar(value, param, **options)
        case "regex":
            return regex_grammar(value, param)
        case "choice":
            return choice_grammar(value, param)
        case "grammar":
            return text_grammar(value, param)
        case "structural_tag":
            return tag_grammar(value, param, **options)
        case _:
            return object_grammar(param, **options)


def _is_given(value: object) -> bool:
    if isinstance(value, Raw):
        return bytes(value) != b"null"
    return value is not None and value is not False


def _options(outputs: object, param: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    pattern = getattr(outputs, "whitespace_pattern", None)
    if pattern is not None:
        options["whitespace"] = whitespace_of(pattern, param)
    if getattr(outputs, "disable_any_whitespace", None):
        options["whitespace"] = ""
    if getattr(outputs, "disable_additional_properties", None):
        options["additional_properties"] = False
    return options


def whitespace_of(pattern: object, param: str) -> str:
    """What may stand between the parts of JSON."""
    if not isinstance(pattern, str) or len(pattern) > MAX_WHITESPACE:
        raise invalid(
            f"`{param}`: `whitespace_pattern` must be a regular expression of at most {MAX_WHITESPACE} "
            "characters.",
            param,
        )
    return pattern


def schema_grammar(
    schema: object,
    param: str,
    *,
    whitespace: str = DEFAULT_WHITESPACE,
    additional_properties: bool = True,
    lenient: bool = False,
) -> Grammar:
    """Of a JSON schema: a mapping, JSON text, encoded JSON, or a class of pydantic."""
    text = _json_text(schema, param)
    check_schema(text, param)
    return Grammar(
        GrammarKind.JSON_SCHEMA,
        text,
        whitespace=whitespace,
        additional_properties=additional_properties,
        lenient=lenient,
        param=param,
    )


def object_grammar(
    param: str, *, whitespace: str = DEFAULT_WHITESPACE, additional_properties: bool = True
) -> Grammar:
    """Of any JSON object; without additional properties, which is to say of the empty one."""
    return Grammar(
        GrammarKind.JSON_OBJECT,
        whitespace=whitespace,
        additional_properties=additional_properties,
        param=param,
    )


def regex_grammar(pattern: object, param: str) -> Grammar:
    """Of a regular expression for the whole answer."""
    return Grammar(GrammarKind.REGEX, _text(pattern, param, "a regular expression"), param=param)


def choice_grammar(choices: object, param: str) -> Grammar:
    """Of one of several strings."""
    if not isinstance(choices, list | tuple) or not choices:
        raise invalid(f"`{param}` must list at least one string to choose from.", param)
    texts = list(cast(Sequence[object], choices))
    if len(texts) > MAX_CHOICES:
        raise invalid(
            f"`{param}` has {len(texts)} strings to choose from, of at most {MAX_CHOICES}.", param
        )
    if not all(isinstance(text, str) and text for text in texts):
        raise invalid(f"`{param}` must list strings that are not empty.", param)
    source = msgspec.json.encode(texts).decode()
    return Grammar(GrammarKind.CHOICE, _sized(source, param), param=param)


def text_grammar(text: object, param: str) -> Grammar:
    """Of a grammar in GBNF, whose rules are written `name ::= ...`, or in Lark."""
    source = _text(text, param, "a grammar")
    rules = source.count("::=")
    if not rules:
        return Grammar(GrammarKind.LARK, source, param=param)
    if rules > MAX_GBNF_RULES or len(source) > MAX_GBNF_SOURCE:
        raise invalid(
            f"`{param}`: the GBNF has {rules} rules and {len(source)} characters, of at most "
            f"{MAX_GBNF_RULES} and {MAX_GBNF_SOURCE}; larger grammars are taken as Lark.",
            param,
        )
    return Grammar(GrammarKind.GBNF, source, param=param)


def tag_grammar(
    tag: object,
    param: str,
    *,
    whitespace: str = DEFAULT_WHITESPACE,
    additional_properties: bool = True,
) -> Grammar:
    """Of a structural tag: a mapping, JSON text, or encoded JSON."""
    text = _json_text(tag, param)
    check_schema(text, param)
    return Grammar(
        GrammarKind.STRUCTURAL_TAG,
        text,
        whitespace=whitespace,
        additional_properties=additional_properties,
        param=param,
    )


def json_rule(schema: object, param: str, whitespace: str = DEFAULT_WHITESPACE) -> str:
    """The body of a Lark rule for JSON by a schema, with bounded whitespace."""
    text = _json_text(schema, param)
    check_schema(text, param)
    value: Any = msgspec.json.decode(text)
    fields = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    settings = {"whitespace_flexible": bool(whitespace), "whitespace_pattern": whitespace or None}
    whole: dict[str, Any] = {**fields, "x-guidance": settings}
    return "%json " + msgspec.json.encode(whole).decode()


# --- what a schema may cost ---


def check_schema(text: str, param: str) -> None:
    """The limits of a schema: depth, properties, values of an `enum`."""
    try:
        schema = msgspec.json.decode(text)
    except RecursionError:
        raise _too_deep(param) from None
    except (msgspec.DecodeError, ValueError) as error:
        raise invalid(f"`{param}`: the schema is no JSON: {str(error)[:200]}.", param) from None
    if not isinstance(schema, dict | bool):
        raise invalid(f"`{param}`: a JSON schema must be an object.", param)
    properties = 0
    for part, depth in _parts(cast(object, schema)):
        if depth > MAX_SCHEMA_DEPTH:
            raise _too_deep(param)
        if not isinstance(part, dict):
            continue
        fields = cast(dict[str, Any], part)
        values = fields.get("enum")
        if isinstance(values, list) and len(cast(list[Any], values)) > MAX_ENUM:
            count = len(cast(list[Any], values))
            raise invalid(
                f"`{param}`: an `enum` of the schema has {count} values, of at most {MAX_ENUM}.",
                param,
            )
        _check_patterns(fields, param)
        members = fields.get("properties")
        if isinstance(members, dict):
            properties += len(cast(dict[str, Any], members))
    if properties > MAX_PROPERTIES:
        raise invalid(
            f"`{param}`: the schema has {properties} properties, of at most {MAX_PROPERTIES}.",
            param,
        )


def _check_patterns(fields: dict[str, Any], param: str) -> None:
    """An expression must not end with half an escape: it would take what the matcher puts around
    it for the rest."""
    keys = fields.get("patternProperties")
    patterns: list[Any] = [fields.get("pattern")]
    patterns += cast(dict[str, Any], keys) if isinstance(keys, dict) else ()
    for pattern in patterns:
        if isinstance(pattern, str) and ends_within_escape(pattern):
            raise invalid(
                f"`{param}`: the pattern {pattern[-40:]!r} of the schema ends with a single backslash.",
                param,
            )


def _too_deep(param: str) -> Exception:
    return invalid(
        f"`{param}`: the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep.", param
    )


def _parts(schema: object) -> Iterator[tuple[Any, int]]:
    """Every object and list in it, with its depth."""
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        part, depth = pending.pop()
        yield part, depth
        inner: list[Any] = []
        if isinstance(part, dict):
            inner = list(cast(dict[str, Any], part).values())
        elif isinstance(part, list):
            inner = cast(list[Any], part)
        pending += [(value, depth + 1) for value in inner if isinstance(value, dict | list)]


# --- texts ---


def _json_text(value: object, param: str) -> str:
    """A value that is JSON already, or becomes it."""
    if isinstance(value, Raw):
        data = bytes(value)
        if not data.startswith(b'"'):
            return _sized(data.decode(), param)
        value = msgspec.json.decode(data)
    if isinstance(value, str):
        return _text(value, param, "a JSON schema")
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()  # type: ignore[attr-defined]
    try:
        return _sized(msgspec.json.encode(value).decode(), param)
    except (TypeError, msgspec.MsgspecError, RecursionError):
        raise invalid(f"`{param}`: a JSON schema must be an object.", param) from None


def _text(value: object, param: str, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise invalid(f"`{param}` must be {what}, a string that is not empty.", param)
    return _sized(value, param)


def _sized(text: str, param: str) -> str:
    if len(text) > MAX_GRAMMAR_SOURCE:
        raise invalid(
            f"`{param}` has {len(text)} characters, of at most {MAX_GRAMMAR_SOURCE}.", param
        )
    return text
