"""How the calls of each syntax are read, once it is known that one begins. What a reader takes
comes out as the name and the arguments of calls. Knows no particular format.

A reader raises NotACall where the text is none before a name is known: it is content then. Behind
the name there is no way back: arguments that break off are closed, and the rest up to the call's
end is skipped.
"""

import ast
import contextlib
import json
import re
from collections.abc import Callable
from typing import Any, Final, Protocol

from .format import BraceCalls, Calls, HarmonyCalls, JsonCalls, NamedCalls, ParameterCalls
from .format import PythonCalls as PythonSyntax
from .json_text import JsonScanner, escaped, quoted
from .tools import Tools, is_text, json_text, value_of
from .waiting import SPACE, Ended, Reader, Wait, markers

MAX_NAME: Final = 256
_NAME: Final = re.compile(r"[\w.:/-]+")
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][\w.-]*")
_BARE_KEYS: Final = frozenset(("type", "id", "function"))
"""Further keys with which the JSON of a call may begin."""
_WORD_END: Final = re.compile(r"[{}\[\],:\s]")
_JSON_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class NotACall(Exception):
    """The text that was taken is no call."""


class Broken(Exception):
    """The arguments of a call cannot go on; they were closed."""


class Answer(Protocol):
    """Where calls go: an AnswerParser."""

    reader: Reader
    tools: Tools
    calls: int

    def begin_call(self, name: str, call_id: str = "") -> None:
        """A call of the function `name`."""
        ...

    def arguments(self, text: str) -> None:
        """More of its arguments."""
        ...

    def content(self, text: str) -> None:
        """More content."""
        ...


class BodyParser(Protocol):
    """Reads calls of one syntax."""

    begins: tuple[str, ...]
    """The markers that a call begins with."""

    def read(self, marker: str) -> Wait[None]:
        """The call or calls behind `marker`. Raises NotACall and Ended."""
        ...

    def read_bare(self) -> Wait[bool]:
        """Calls without a marker, at the beginning of an answer; whether there are any. Raises
        NotACall and Ended."""
        ...


def body_parser(calls: Calls, answer: Answer) -> BodyParser:
    """The reader of a format's calls."""
    match calls:
        case JsonCalls():
            return JsonBody(calls, answer)
        case NamedCalls():
            return NamedBody(calls, answer)
        case ParameterCalls():
            return ParameterBody(calls, answer)
        case PythonSyntax():
            return PythonBody(calls, answer)
        case BraceCalls():
            return BraceBody(calls, answer)
        case HarmonyCalls():
            return HarmonyBody(calls)


class HarmonyBody:
    """harmony.py reads the whole answer; here are its markers."""

    def __init__(self, calls: HarmonyCalls) -> None:
        self.begins = (calls.start, calls.channel, calls.message, calls.constrain, *calls.ends)

    def read(self, marker: str) -> Wait[None]:
        raise NotACall
        yield

    def read_bare(self) -> Wait[bool]:
        return False
        yield


class BodyReader:
    """What the readers have in common."""

    begins: tuple[str, ...] = ()

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.reader = answer.reader

    def read_bare(self) -> Wait[bool]:
        """None of most formats."""
        return False
        yield

    def begin(self, name: str, call_id: str = "") -> str:
        """Begin a call; the name as it is shown. Raises NotACall for a text that is no name."""
        name = name.strip()
        if len(name) > MAX_NAME or not _NAME.fullmatch(name):
            raise NotACall
        self.answer.begin_call(name, call_id)
        return name

    def json_arguments(self, show: Callable[[str], None]) -> Wait[None]:
        """Show one JSON value. Raises Broken when it was closed, and Ended when what was said of
        it was shown."""
        yield from _scan(self.reader, JsonScanner(), show)

    def skip_to(self, *texts: str) -> Wait[str]:
        """Drop what comes before one of the texts; that text. What is never followed by one is
        content. Raises Ended."""
        reader = self.reader
        dropped: list[str] = []
        wanted = markers(*texts)
        try:
            marker = yield from reader.pass_on(wanted, dropped.append)
        except Ended:
            text = "".join(dropped)
            if not text.strip(SPACE + "}])>"):
                raise
            self.answer.content(text)
            raise
        return marker


def _scan(reader: Reader, scanner: JsonScanner, show: Callable[[str], None]) -> Wait[None]:
    while True:
        text, taken = scanner.feed(reader.text)
        reader.take(taken)
        show(text)
        if scanner.complete:
            return
        if scanner.broken:
            show(scanner.closing())
            raise Broken
        try:
            yield from reader.wait()
        except Ended:
            show(scanner.rest())
            raise


def _ignore(text: str) -> None:
    """Show nothing."""


class JsonBody(BodyReader):
    """Objects with name and arguments."""

    def __init__(self, calls: JsonCalls, answer: Answer) -> None:
        super().__init__(answer)
        self.begins = calls.begin
        self._calls = calls

    def read(self, marker: str) -> Wait[None]:
        end = self._calls.end
        first = self.answer.calls
        if marker.endswith("["):  # the list has begun with it
            self.reader.give_back("[")
        while True:
            try:
                yield from self._values(is_bare=False)
            except NotACall:
                if self.answer.calls == first:
                    raise
            if not end:
                return
            marker = yield from self.skip_to(end, *self.begins)
            if marker == end:
                return

    def read_bare(self) -> Wait[bool]:
        first = yield from self.reader.space()
        if first not in ("{", "["):
            return False
        before = self.answer.calls
        try:
            yield from self._values(is_bare=True)
        except NotACall:
            if self.answer.calls == before:
                raise
        return self.answer.calls > before

    def _values(self, is_bare: bool) -> Wait[None]:
        """A list of objects, or objects one after the other."""
        reader = self.reader
        first = yield from reader.space()
        is_list = first == "["
        if is_list:
            reader.take(1)
        before = self.answer.calls
        while True:
            character = yield from reader.space()
            if character == "{":
                yield from self._call(is_bare)
            elif not character:
                raise Ended
            elif self.answer.calls > before and character in (",;" if not is_list else ","):
                reader.take(1)
            elif is_list and character == "]":
                reader.take(1)
                break
            else:
                break
        if self.answer.calls == before:
            raise NotACall

    def _call(self, is_bare: bool) -> Wait[None]:
        """One object. Raises NotACall where it has no name."""
        call = _JsonCall(self, self._calls, is_bare)
        try:
            yield from call.read()
        except Broken:
            if not call.name:
                raise NotACall from None
            call.close()


class _JsonCall:
    """One object while it is read."""

    def __init__(self, body: JsonBody, calls: JsonCalls, is_bare: bool) -> None:
        self.name = ""
        self._body = body
        self._reader = body.reader
        self._answer = body.answer
        self._calls = calls
        self._is_bare = is_bare
        self._early: list[str] = []
        """Arguments that came before the name."""
        self._has_arguments = False
        self._depth = 0

    def read(self) -> Wait[None]:
        reader = self._reader
        while True:
            character = yield from reader.space()
            if not character:
                raise Ended
            if character == '"' and self._depth:
                yield from self._entry()
                continue
            if character == "}" and self._depth:
                self._depth -= 1
            elif character == "{" and not self._depth:
                self._depth += 1
            elif character != "," or not self._depth:
                raise Broken
            reader.take(1)
            if not self._depth:
                break
        if not self.name:
            raise NotACall
        self.close()

    def close(self) -> None:
        """The call has arguments in any case."""
        if not self._has_arguments:
            self._show("{}")

    def _show(self, text: str) -> None:
        if self.name:
            self._answer.arguments(text)
        else:
            self._early.append(text)
        self._has_arguments = True

    def _entry(self) -> Wait[None]:
        reader = self._reader
        calls = self._calls
        key = yield from _string(reader)
        if (yield from reader.space()) != ":":
            if reader.has_ended and not reader.text:
                raise Ended
            raise Broken
        reader.take(1)
        first = yield from reader.space()
        if not first:
            raise Ended
        if key in calls.name_keys and not self.name and first == '"':
            self._begin((yield from _string(reader)))
        elif key in calls.arguments_keys and not self._has_arguments:
            yield from self._arguments(first)
        elif key == "function" and first == "{":
            reader.take(1)
            self._depth += 1
        elif self._is_bare and not self.name and key not in _BARE_KEYS:
            raise NotACall
        else:
            yield from _scan(reader, JsonScanner(), _ignore)

    def _begin(self, name: str) -> None:
        if self._is_bare and name not in self._answer.tools:
            raise NotACall
        self.name = self._body.begin(name)
        for text in self._early:
            self._answer.arguments(text)

    def _arguments(self, first: str) -> Wait[None]:
        """An object, or a string that holds one."""
        if first == '"':
            text = yield from _string(self._reader)
            scanner = JsonScanner()
            certain, _ = scanner.feed(text.strip())
            is_whole = scanner.complete and scanner.is_object
            self._show(certain if is_whole else json_text({"arguments": text}))
        elif first == "{":
            yield from self._body.json_arguments(self._show)
        else:
            yield from _scan(self._reader, JsonScanner(), _ignore)


def _string(reader: Reader) -> Wait[str]:
    """A JSON string that comes next. Raises Broken, Ended."""
    scanner = JsonScanner()
    pieces: list[str] = []
    yield from _scan(reader, scanner, pieces.append)
    value = json.loads("".join(pieces))
    if not isinstance(value, str):
        raise Broken
    return value


class NamedBody(BodyReader):
    """A name by itself, then its arguments as JSON."""

    def __init__(self, calls: NamedCalls, answer: Answer) -> None:
        super().__init__(answer)
        self.begins = (calls.begin,)
        self._calls = calls
        self._pattern = re.compile(calls.name_pattern, re.DOTALL)
        self._json = JsonBody(JsonCalls(begin=(calls.begin,), end=calls.end), answer)

    def read(self, marker: str) -> Wait[None]:
        """One call, or a list of JSON ones where the format has these too."""
        calls = self._calls
        if calls.json_instead and (yield from self.reader.space()) in ("[", "{"):
            yield from self._json.read(marker)
            return
        if calls.name_begin:
            _, marker = yield from self._up_to(calls.name_begin, calls.end)
            if marker == calls.end:
                raise NotACall
        name, marker = yield from self._up_to(*calls.name_end, calls.id_begin, calls.end)
        if calls.content_name and name.strip() == calls.content_name:
            return
        call_id = ""
        if marker == calls.id_begin and marker:
            call_id, marker = yield from self._up_to(*calls.name_end, calls.end)
        match = self._pattern.fullmatch(name.strip())
        if match is None:
            raise NotACall
        self.begin(match["name"], name.strip() if calls.name_is_id else call_id.strip())
        if marker == "{":
            self.reader.give_back("{")
        yield from self._arguments(marker)

    def _arguments(self, marker: str) -> Wait[None]:
        calls = self._calls
        if calls.end and marker == calls.end:
            self.answer.arguments("{}")
            return
        if calls.end:
            _dropped, marker = yield from self._up_to("{", calls.end, calls.begin)
        else:
            marker = yield from self.reader.space()
            if marker == "{":
                self.reader.take(1)
        if marker != "{":
            self.answer.arguments("{}")
            if calls.end and marker == calls.begin:
                self.reader.give_back(marker)
            return
        self.reader.give_back("{")
        with contextlib.suppress(Broken):  # it was closed
            yield from self.json_arguments(self.answer.arguments)
        if calls.end:
            marker = yield from self.skip_to(calls.end, calls.begin)
            if marker == calls.begin:
                self.reader.give_back(marker)

    def _up_to(self, *texts: str) -> Wait[tuple[str, str]]:
        return (yield from self.reader.up_to(markers(*texts)))


class ParameterBody(BodyReader):
    """Arguments that each stand by themselves."""

    def __init__(self, calls: ParameterCalls, answer: Answer) -> None:
        super().__init__(answer)
        self.begins = (calls.begin,)
        self._calls = calls
        self._has_arguments = False

    def read(self, marker: str) -> Wait[None]:
        """One call."""
        calls = self._calls
        reader = self.reader
        name, marker = yield from reader.up_to(markers(*calls.name_end, calls.end))
        name = self.begin(name)
        self._has_arguments = False
        if marker == calls.key_begin:
            reader.give_back(marker)
        while marker != calls.end:
            _, marker = yield from reader.up_to(markers(calls.key_begin, calls.end))
            if marker == calls.key_begin:
                marker = yield from self._entry(name)
        self.answer.arguments("}" if self._has_arguments else "{}")

    def _entry(self, name: str) -> Wait[str]:
        """One argument; the marker that ended it."""
        calls = self._calls
        reader = self.reader
        key, marker = yield from reader.up_to(markers(calls.key_end, calls.end))
        if marker == calls.end:
            return marker
        attributes = ""
        if calls.attribute_end:
            attributes, _ = yield from reader.up_to(markers(calls.attribute_end))
        if calls.value_begin:
            _, marker = yield from reader.up_to(markers(calls.value_begin, calls.end))
            if marker == calls.end:
                return marker
        key = key.strip()
        types = self.answer.tools.types_of(name, key)
        if 'string="true"' in attributes:
            types = frozenset(("string",))
        elif 'string="false"' in attributes:
            types = types - {"string"}
        self.answer.arguments((", " if self._has_arguments else "{") + quoted(key) + ": ")
        self._has_arguments = True
        return (yield from self._value(types))

    def _value(self, types: frozenset[str]) -> Wait[str]:
        value = _Value(self._calls.strips_lines)
        show_text = self.answer.arguments if is_text(types) else None
        if show_text:
            show_text('"')
        pieces: list[str] = []

        def show(text: str) -> None:
            text = value.add(text)
            if show_text:
                show_text(escaped(text))
            else:
                pieces.append(text)

        ends = markers(self._calls.value_end, self._calls.end)
        try:
            marker = yield from self.reader.pass_on(ends, show)
        except Ended:
            if pieces:
                self.answer.arguments('"' + escaped("".join(pieces)))
            raise
        self.answer.arguments('"' if show_text else value_of("".join(pieces), types))
        return marker


class _Value:
    """The text of a value, without the line break at either end where the format has these."""

    def __init__(self, strips_lines: bool) -> None:
        self._strips_lines = strips_lines
        self._is_first = True
        self._held = ""

    def add(self, text: str) -> str:
        """More text; that of it which is certain."""
        if not self._strips_lines or not text:
            return text
        if self._is_first:
            self._is_first = False
            text = text.removeprefix("\n")
        text = self._held + text
        kept = len(text) - text.endswith("\n")
        self._held = text[kept:]
        return text[:kept]


class PythonBody(BodyReader):
    """Calls as in Python, each of which is read as a whole."""

    def __init__(self, calls: PythonSyntax, answer: Answer) -> None:
        super().__init__(answer)
        self.begins = (calls.begin,) if calls.begin else ()
        self._calls = calls

    def read(self, marker: str) -> Wait[None]:
        before = self.answer.calls
        first = yield from self.reader.space()
        try:
            if first == "[" and self._calls.brackets:
                self.reader.take(1)
                yield from self._list("]", is_bare=False)
            else:
                yield from self._list("", is_bare=False)
        except NotACall:
            if self.answer.calls == before:
                raise
        if self._calls.end:
            yield from self.skip_to(self._calls.end)

    def read_bare(self) -> Wait[bool]:
        if (yield from self.reader.space()) != "[":
            return False
        self.reader.take(1)
        before = self.answer.calls
        try:
            yield from self._list("]", is_bare=True)
        except NotACall:
            if self.answer.calls == before:
                raise
        return True

    def _list(self, closer: str, is_bare: bool) -> Wait[None]:
        """Calls up to `closer`, or to what is no call."""
        reader = self.reader
        before = self.answer.calls
        while True:
            character = yield from reader.space()
            if not character:
                raise Ended
            if self.answer.calls > before:
                if character == closer:
                    reader.take(1)
                    return
                if character in ",;":
                    reader.take(1)
                    continue
                if not closer and not _IDENTIFIER.match(character):
                    return
            yield from self._call(is_bare)

    def _call(self, is_bare: bool) -> Wait[None]:
        reader = self.reader
        length = 0
        while True:
            match = _IDENTIFIER.match(reader.text)
            length = match.end() if match else 0
            if not length or length > MAX_NAME:
                raise NotACall
            if length < len(reader.text):
                break
            yield from reader.wait()
        name = reader.text[:length]
        if reader.text[length] != "(" or (is_bare and name not in self.answer.tools):
            raise NotACall
        end = yield from self._closing_bracket(length)
        source = reader.text[length : end + 1]
        arguments = _keywords(source)
        if arguments is None:
            raise NotACall
        reader.take(end + 1)
        self.begin(name)
        self.answer.arguments(json_text(arguments))

    def _closing_bracket(self, start: int) -> Wait[int]:
        """Where the bracket at `start` is closed. Raises Ended."""
        reader = self.reader
        depth = 0
        quote = ""
        at = start
        while True:
            while at < len(reader.text):
                character = reader.text[at]
                if quote:
                    if character == "\\":
                        at += 1
                    elif character == quote:
                        quote = ""
                elif character in "\"'":
                    quote = character
                elif character in "([{":
                    depth += 1
                elif character in ")]}":
                    depth -= 1
                    if not depth:
                        return at
                at += 1
            yield from reader.wait()


def _keywords(source: str) -> dict[str, Any] | None:
    """The keyword arguments of `(a=1, b="x")`; None where they are not just values."""
    try:
        tree = ast.parse("f" + source, mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args:
            return None
        return {word.arg or "": _literal(word.value) for word in tree.keywords}
    except (ValueError, SyntaxError, MemoryError, RecursionError, SystemError, TypeError):
        return None


_WORDS: Final = {"true": True, "false": False, "null": None, "none": None}


def _literal(node: ast.expr) -> Any:
    """The value of an expression of constants, with JSON's words for some. Raises ValueError."""
    match node:
        case ast.Name(id=word) if word.lower() in _WORDS:
            return _WORDS[word.lower()]
        case ast.Dict(keys=keys, values=values):
            return {
                str(_literal(key)): _literal(value)
                for key, value in zip(keys, values, strict=True)
                if key is not None
            }
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [_literal(item) for item in items]
        case _:
            value = ast.literal_eval(node)
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise ValueError(f"{type(value).__name__} is no type of JSON")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("no number of JSON")
    return value


class BraceBody(BodyReader):
    """`call:NAME{key:value}` with bare keys."""

    def __init__(self, calls: BraceCalls, answer: Answer) -> None:
        super().__init__(answer)
        self.begins = (calls.begin,)
        self._calls = calls

    def read(self, marker: str) -> Wait[None]:
        """One call."""
        calls = self._calls
        reader = self.reader
        name, marker = yield from reader.up_to(markers("{", calls.end))
        self.begin(name.strip().removeprefix("call:"))
        if marker == calls.end:
            self.answer.arguments("{}")
            return
        reader.give_back("{")
        scanner = JsonScanner()
        try:
            yield from self._values(scanner)
        except Ended:
            self.answer.arguments(scanner.rest())
            raise
        if scanner.broken:
            self.answer.arguments(scanner.closing())
        marker = yield from self.skip_to(calls.end, calls.begin)
        if marker == calls.begin:
            reader.give_back(marker)

    def _values(self, scanner: JsonScanner) -> Wait[None]:
        """Up to the end of the object, as JSON, through the scanner."""
        reader = self.reader
        quote = self._calls.quote

        def put(text: str) -> None:
            certain, _ = scanner.feed(text)
            self.answer.arguments(certain)

        while not (scanner.complete or scanner.broken):
            if (yield from reader.starts_with(quote)):
                reader.take(len(quote))
                put('"')
                yield from reader.pass_on(markers(quote), lambda text: put(escaped(text)))
                put('"')
            elif not reader.text:
                yield from reader.wait()
            elif _WORD_END.match(reader.text):
                put(reader.take(1))
            else:
                word = yield from self._word()
                put(word if _is_literal(word) and not scanner.wants_key else quoted(word))

    def _word(self) -> Wait[str]:
        """The text up to the next bracket, comma, colon, space or quote."""
        reader = self.reader
        quote = self._calls.quote
        while True:
            match = _WORD_END.search(reader.text)
            end = match.start() if match else len(reader.text)
            at = reader.text.find(quote, 1, end)
            if match or at > 0:
                return reader.take(at if at > 0 else end)
            if len(reader.text) > 65_536:
                return reader.take(len(reader.text))
            yield from reader.wait()


def _is_literal(word: str) -> bool:
    return word in ("true", "false", "null") or _JSON_NUMBER.fullmatch(word) is not None
