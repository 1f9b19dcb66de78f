"""The tools of a request: their names, and what type each argument has. Knows no formats."""

import functools
import json
from typing import Any, Final

Schema = dict[str, Any]
ANY: Final[frozenset[str]] = frozenset()
"""The schema does not say."""
MAX_REFERENCES: Final = 16
"""`$ref`s that are followed one after the other."""
_OF_VALUE: Final[dict[type, str]] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}


class Tools:
    """Functions by name, from OpenAI's list of tools."""

    def __init__(self, tools: list[Any]) -> None:
        self.functions: dict[str, Schema] = {}
        for tool in tools:
            function = tool.get("function", tool)
            self.functions[function["name"]] = function

    def __contains__(self, name: str) -> bool:
        return name in self.functions

    def parameters(self, name: str) -> Schema:
        """The schema of a function's arguments; without any, that of any object."""
        schema = self.functions.get(name, {}).get("parameters")
        return schema if isinstance(schema, dict) else {"type": "object"}

    def types_of(self, name: str, key: str) -> frozenset[str]:
        """The JSON types that the argument `key` may have; ANY where the schema does not say."""
        schema = self.parameters(name)
        properties = resolved(schema, schema).get("properties")
        if not isinstance(properties, dict) or not isinstance(properties.get(key), dict):
            return ANY
        return _types(properties[key], schema, 0)


def resolved(schema: Schema, root: Schema) -> Schema:
    """The schema that `schema`, a part of `root`, refers to; itself where it refers to none."""
    for _ in range(MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        target: Any = root
        for part in reference[2:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            target = target.get(part) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            return {}
        schema = target
    return {}


def _types(schema: Schema, root: Schema, depth: int) -> frozenset[str]:
    schema = resolved(schema, root)
    stated = schema.get("type")
    if isinstance(stated, str):
        return frozenset((stated,))
    if isinstance(stated, list):
        return frozenset(item for item in stated if isinstance(item, str))
    if isinstance(schema.get("enum"), list):
        return frozenset(_OF_VALUE.get(type(value), "object") for value in schema["enum"])
    if "const" in schema:
        return frozenset((_OF_VALUE.get(type(schema["const"]), "object"),))
    types: set[str] = set()
    for keyword in ("anyOf", "oneOf", "allOf"):
        for alternative in schema.get(keyword) or ():
            if not isinstance(alternative, dict) or depth >= MAX_REFERENCES:
                return ANY
            found = _types(alternative, root, depth + 1)
            if not found and keyword != "allOf":
                return ANY
            types |= found
    return frozenset(types)


def is_text(types: frozenset[str]) -> bool:
    """A value of these types is a string whatever it looks like."""
    return types == {"string"}


def value_of(text: str, types: frozenset[str]) -> str:
    """The JSON of an argument that a format writes as a bare text. A text stays a string where the
    schema has strings, but for `null` where that may be."""
    stripped = text.strip()
    if "string" in types:
        return "null" if "null" in types and stripped == "null" else json_text(text)
    try:
        value = json.loads(stripped, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = _of_python(stripped, types)
        if value is None:
            return json_text(text)
    return json_text(value)


def _of_python(text: str, types: frozenset[str]) -> Any:
    """Booleans as Python writes them; None for any other text."""
    if "boolean" in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def json_text(value: Any) -> str:
    """JSON in one line, with characters as they are; halves of characters escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


@functools.lru_cache(maxsize=64)
def tools_of(data: bytes) -> Tools:
    """Of OpenAI's list as JSON, as a Chat holds it. Raises ValueError."""
    tools = json.loads(data) if data else []
    return Tools(tools)
