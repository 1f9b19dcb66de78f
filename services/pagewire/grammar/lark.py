"""Texts as parts of a Lark grammar. Knows no llguidance."""

import json


def literal(text: str) -> str:
    """`text` as a string of a Lark grammar, whose lexer knows no plain DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")
