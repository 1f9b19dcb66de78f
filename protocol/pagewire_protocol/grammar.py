"""What the text of an answer must match: a JSON schema, a regular expression, one of several
strings, or a grammar, as the worker's matcher and the tokenizer's check read it.

Limits are stated once, here. What a schema or grammar means is llguidance's; its Lark dialect takes
`%json {...}`, `%regex {...}`, special tokens by name (`<|im_end|>`) and token ids (`<[123]>`).
"""

from enum import IntEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

MAX_GRAMMAR_SOURCE: Final = 131_072
"""Characters of a schema, expression or grammar."""
MAX_GBNF_SOURCE: Final = 32_768
"""Characters of a GBNF grammar, of which each may become a lexeme of its own."""
MAX_GBNF_RULES: Final = 500
MAX_CHOICES: Final = 4096
"""Strings of a CHOICE."""
MAX_SCHEMA_DEPTH: Final = 64
"""Objects and lists within each other in a schema."""
MAX_ENUM: Final = 4096
"""Values of one `enum` of a schema."""
MAX_PROPERTIES: Final = 1000
"""Named properties of a schema, in all of its objects together."""
MAX_AFTER: Final = 256
MAX_WHITESPACE: Final = 256
DEFAULT_WHITESPACE: Final = r"[ \n\t]{0,4}"
"""Between the parts of JSON. A model may write whitespace for ever where a grammar lets it."""

SCHEMA_FORMATS: Final = frozenset(
    (
        *("date-time", "date", "time", "duration", "email", "idn-email"),
        *("hostname", "idn-hostname", "ipv4", "ipv6", "uri", "uri-reference", "iri"),
        *("iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer"),
        "regex",
    )
)
"""Those that JSON Schema (2020-12, Validation, 7.3) defines."""


class GrammarKind(IntEnum):
    """What the source of a grammar is."""

    JSON_SCHEMA = 1
    """A JSON schema, as JSON text."""
    JSON_OBJECT = 2
    """Any JSON object; the source is empty."""
    REGEX = 3
    """A regular expression for the whole text (syntax of Rust's regex crate, without anchors)."""
    CHOICE = 4
    """A JSON list of strings, one of which is the text."""
    LARK = 5
    """A grammar in llguidance's Lark dialect."""
    GBNF = 6
    """A grammar in the form of llama.cpp and xgrammar: rules `name ::= ...`, the first `root`."""
    STRUCTURAL_TAG = 7
    """A JSON object as of `response_format`'s structural_tag: free text, in which the named tags
    begin parts that match schemas."""


class Grammar(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an output must match, from its first token on, or from the end of thinking on."""

    kind: GrammarKind
    source: Annotated[str, Meta(max_length=MAX_GRAMMAR_SOURCE)] = ""
    after: Annotated[str, Meta(max_length=MAX_AFTER)] = ""
    """The text that comes before the constrained part, a special token's name included, such as
    `</think>`: what is generated up to its end is free. Empty: nothing is free."""
    whitespace: Annotated[str, Meta(max_length=MAX_WHITESPACE)] = DEFAULT_WHITESPACE
    """The regular expression of what may stand between the parts of JSON; empty: nothing."""
    additional_properties: bool = True
    """False: an object of a schema that does not speak of `additionalProperties` has none."""
    lenient: bool = False
    """Keywords of a schema that the matcher does not know are ignored, not refused."""
    param: Annotated[str, Meta(max_length=64)] = "structured_outputs"
    """What the sender calls the parameter that the grammar came in: errors name it."""

    def encode(self) -> str:
        """As JSON text. A message holds a Grammar as it is; this is for files and logs."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> "Grammar":
        """The inverse of `encode`. Raises msgspec.ValidationError and msgspec.DecodeError."""
        return msgspec.json.decode(text, type=cls)
