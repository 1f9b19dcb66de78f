"""Texts as parts of a Lark grammar. Knows no llguidance."""

import json
import re


def literal(text: str) -> str:
    """`text` as a string of a Lark grammar, whose lexer knows no plain DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def escaped(text: str) -> str:
    """`text` within a regular expression of a rule."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", "\\n")


def ends_within_escape(pattern: str) -> bool:
    """Whether a regular expression ends with a backslash that escapes nothing: within a rule it
    would escape what follows."""
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1
