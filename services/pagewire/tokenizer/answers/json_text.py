"""JSON that comes in pieces: passed on as it is as far as it is valid, and closed where it breaks
off. Knows no tool calls.

What models write is mostly JSON. Raw line breaks in strings and unknown escapes are mended on the
way; a comma, a number and a literal wait until it is certain that they are valid.
"""

import re
from typing import Final

import msgspec

_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]+')
"""Characters of a string that stand for themselves."""
_SPACE: Final = " \t\n\r"
_COMMA: Final = "," + _SPACE
_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS: Final = frozenset("+-.eE0123456789")
_LITERALS: Final = {"t": "true", "f": "false", "n": "null"}
_ESCAPES: Final = frozenset('"\\/bfnrt')
_HEX: Final = frozenset("0123456789abcdefABCDEF")
MAX_DEPTH: Final = 512
"""Objects and lists within each other; deeper ones count as broken."""

_encode: Final = msgspec.json.Encoder().encode


def quoted(text: str) -> str:
    """The text as a JSON string."""
    return _encode(text.encode("utf-8", "replace").decode()).decode()


def escaped(text: str) -> str:
    """The text as a piece of a JSON string, without quotation marks."""
    return quoted(text)[1:-1]


class JsonScanner:
    """Follows one JSON value through text that is cut anywhere.

    `feed` takes characters until the value is complete or broken, and returns the JSON text that is
    certain now. The texts add up to the same whatever the cuts.
    """

    __slots__ = ("_held", "_state", "_unicode", "broken", "closers", "complete", "is_object")

    def __init__(self) -> None:
        self.complete = False
        self.broken = False
        """The character that came next cannot follow."""
        self.is_object = False
        self.closers: list[str] = []
        """What closes the open objects and lists, outermost first."""
        self._state = "value"
        """What is expected: value, value or end (of a list), key, key or end, colon, after (a
        value); or within: string, key string, escape, number, literal."""
        self._held = ""
        """A number, literal, comma or escape that is not certain yet."""
        self._unicode = ""

    def feed(self, text: str, start: int = 0) -> tuple[str, int]:
        """The JSON text that is certain, and how many characters of `text` from `start` on were
        taken. Fewer than all: the value is complete, or broken, there."""
        pieces: list[str] = []
        at = start
        end = len(text)
        while at < end and not (self.complete or self.broken):
            state = self._state
            if state in ("string", "key string"):
                plain = _PLAIN.match(text, at)
                if plain is not None:
                    pieces.append(plain.group())
                    at = plain.end()
                    continue
            if self._take(state, text[at], pieces):
                at += 1
        return "".join(pieces), at - start

    @property
    def wants_key(self) -> bool:
        """The key of an object comes next."""
        return self._state in ("key", "key or end")

    def rest(self) -> str:
        """What was held back, as it was said."""
        return self._held

    def closing(self) -> str:
        """What makes valid JSON of the text so far, held back pieces left out."""
        state = self._state
        pieces: list[str] = []
        if state.startswith("escape"):
            state = state.removeprefix("escape in ")
        if state == "key string":
            pieces.append('": null')
        elif state == "string":
            pieces.append('"')
        elif state == "colon":
            pieces.append(": null")
        elif state in ("value", "number", "literal") and not self._held.startswith(","):
            pieces.append("null")
        pieces += reversed(self.closers)
        return "".join(pieces)

    def _take(self, state: str, character: str, pieces: list[str]) -> bool:
        """Whether `character` was taken; else the state has changed, and it is looked at again."""
        match state:
            case "value" | "value or end":
                return self._value(character, pieces, state)
            case "string" | "key string":
                self._string(character, pieces, state)
            case "escape in string" | "escape in key string":
                return self._escape(character, pieces, state)
            case "number":
                return self._number(character, pieces)
            case "literal":
                return self._literal(character, pieces)
            case "after":
                self._after(character, pieces)
            case "key" | "key or end":
                self._key(character, pieces, state)
            case _:
                self._colon(character, pieces)
        return not self.broken

    def _value(self, character: str, pieces: list[str], state: str) -> bool:
        if character in _SPACE:
            if self._held:
                self._held += character
            else:
                pieces.append(character)
            return True
        ends_list = state == "value or end" or self._held.startswith(",")
        if ends_list and character == "]":  # also after a comma, which is dropped
            self._held = ""
            pieces.append("]")
            self.closers.pop()
            self._ended()
            return True
        held = self._held
        self._held = ""
        if character == '"':
            pieces += (held, '"')
            self._state = "string"
        elif character in "{[" and len(self.closers) < MAX_DEPTH:
            self.is_object = self.is_object or (character == "{" and not self.closers)
            pieces += (held, character)
            self.closers.append("}" if character == "{" else "]")
            self._state = "key or end" if character == "{" else "value or end"
        elif character in "-0123456789":
            self._held = held + character
            self._state = "number"
        elif character in _LITERALS:
            self._held = held + character
            self._state = "literal"
        else:
            self._held = held
            self.broken = True
            return False
        return True

    def _string(self, character: str, pieces: list[str], state: str) -> None:
        if character == '"':
            pieces.append('"')
            if state == "key string":
                self._state = "colon"
            else:
                self._ended()
        elif character == "\\":
            self._state = f"escape in {state}"
        else:  # a control character
            pieces.append(escaped(character))

    def _escape(self, character: str, pieces: list[str], state: str) -> bool:
        back = state.removeprefix("escape in ")
        if self._unicode:
            if character not in _HEX:
                pieces.append(escaped("\\" + self._unicode))
                self._unicode = ""
                self._state = back
                return False
            self._unicode += character
            if len(self._unicode) < 5:
                return True
            pieces.append("\\" + self._unicode)
            self._unicode = ""
        elif character == "u":
            self._unicode = "u"
            return True
        elif character in _ESCAPES:
            pieces.append("\\" + character)
        elif character == "'":
            pieces.append("'")
        else:  # a backslash that was to stand for itself
            pieces.append(escaped("\\" + character))
        self._state = back
        return True

    def _number(self, character: str, pieces: list[str]) -> bool:
        if character in _NUMBER_CHARACTERS:
            self._held += character
            return True
        if not _NUMBER.fullmatch(self._held.lstrip(_COMMA)):
            self.broken = True
            return False
        pieces.append(self._held)
        self._held = ""
        self._ended()
        return False

    def _literal(self, character: str, pieces: list[str]) -> bool:
        word = self._held.lstrip(_COMMA) + character
        whole = _LITERALS[word[0]]
        if not whole.startswith(word):
            self.broken = True
            return False
        self._held += character
        if word == whole:
            pieces.append(self._held)
            self._held = ""
            self._ended()
        return True

    def _after(self, character: str, pieces: list[str]) -> None:
        if character in _SPACE:
            pieces.append(character)
        elif character == ",":
            self._held = ","
            self._state = "key" if self.closers[-1] == "}" else "value"
        elif character == self.closers[-1]:
            pieces.append(self.closers.pop())
            self._ended()
        else:
            self.broken = True

    def _key(self, character: str, pieces: list[str], state: str) -> None:
        if character in _SPACE:
            if self._held:
                self._held += character
            else:
                pieces.append(character)
        elif character == '"':
            pieces += (self._held, '"')
            self._held = ""
            self._state = "key string"
        elif character == "}":  # also after a comma, which is dropped
            self._held = ""
            pieces.append(self.closers.pop())
            self._ended()
        else:
            self.broken = True

    def _colon(self, character: str, pieces: list[str]) -> None:
        if character in _SPACE:
            return
        if character != ":":
            self.broken = True
            return
        pieces.append(":")
        self._state = "value"

    def _ended(self) -> None:
        self._state = "after"
        self.complete = not self.closers
