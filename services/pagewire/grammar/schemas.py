"""JSON schemas as llguidance is given them: by themselves, or as a part of a larger grammar. Knows
nothing of llguidance but its options.
"""

import json
from collections.abc import Iterator
from typing import Any, Final

from pagewire_protocol.grammar import SCHEMA_FORMATS, Grammar

Schema = dict[str, Any]
OBJECT_KEYWORDS: Final = ("properties", "patternProperties", "required", "minProperties")
"""A schema that has one of them speaks of objects, whether it says `type` or not."""
_SAY_NOTHING: Final[dict[str, tuple[Any, ...]]] = {
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "not": (False,),
    "propertyNames": (True, {}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}
"""Keywords that the matcher refuses, with the values that allow everything."""
_LARGEST: Final = 2**63 - 1024
"""The largest bound of a number that the matcher takes: a double, and less than 2^63. Programs write
the ends of their types' ranges; numbers beyond this one are left out."""


def json_term(schema: Schema, grammar: Grammar) -> str:
    """The term of a Lark rule for JSON by a schema, as `grammar` wants it. Characters beyond ASCII
    are escaped: the text of the rule is then safe in any lexer."""
    whole = {**prepared(schema, grammar), "x-guidance": json_options(grammar)}
    return "%json " + json.dumps(whole)


def json_options(grammar: Grammar) -> Any:
    """What llguidance is told of every schema of `grammar`: all of it, since a schema could say
    otherwise in an `x-guidance` of its own."""
    return {
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_flexible": bool(grammar.whitespace),
        "whitespace_pattern": grammar.whitespace or None,
        "coerce_one_of": grammar.lenient,
        "lenient": grammar.lenient,
    }


def prepared(schema: Schema, grammar: Grammar) -> Schema:
    """The schema without settings for llguidance, without formats that JSON Schema does not define,
    which are annotations to it, without keywords that allow everything, with bounds of 64 bits, and
    closed where `grammar` wants that. A copy."""
    schema = json.loads(json.dumps(schema))
    schema.pop("x-guidance", None)
    for part in _parts(schema):
        form = part.get("format")
        if isinstance(form, str) and form not in SCHEMA_FORMATS:
            del part["format"]
        for name in [name for name, value in part.items() if allows_everything(name, value)]:
            del part[name]
        part |= {name: bounded(name, value) for name, value in part.items()}
        if grammar.additional_properties:
            continue
        speaks_of_objects = part.get("type") == "object" or any(k in part for k in OBJECT_KEYWORDS)
        if speaks_of_objects:
            part.setdefault("additionalProperties", False)
    return schema


def allows_everything(keyword: str, value: Any) -> bool:
    """Whether a keyword that the matcher refuses asks for nothing with this value."""
    return any(
        value == neutral and type(value) is type(neutral)
        for neutral in _SAY_NOTHING.get(keyword, ())
    )


def bounded(keyword: str, value: Any) -> Any:
    """The value of a keyword; a bound of numbers beyond 64 bits that leaves room is brought within
    them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if keyword in ("minimum", "exclusiveMinimum"):
        return max(value, -_LARGEST)
    if keyword in ("maximum", "exclusiveMaximum"):
        return min(value, _LARGEST)
    return value


def _parts(schema: Schema) -> Iterator[Schema]:
    """The schema and all schemas in it; values of `const` and `enum` are none."""
    pending: list[Any] = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            yield part
            for name, value in part.items():
                if name in ("properties", "patternProperties", "$defs", "definitions"):
                    pending += list(value.values()) if isinstance(value, dict) else []
                elif name not in ("const", "enum", "default", "examples"):
                    pending.append(value)
