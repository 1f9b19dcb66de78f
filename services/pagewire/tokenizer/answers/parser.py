"""From the text of an answer to its parts: reasoning, content, calls of tools. One parser for all
formats; knows no tokens and no sockets.

The parser of a stream is a coroutine that waits for text (waiting.py). For any way of cutting a
text into pieces, the parts add up to the same answer; markers are in none of them; the arguments of
a call that was closed are JSON. Text that does not keep to the format is content, never lost; a
call that breaks off keeps what was said.
"""

from collections.abc import Callable
from typing import Final

from pagewire_protocol.structs import PartKind

from .bodies import BodyParser, NotACall, body_parser
from .format import (
    AnswerFormat,
    HarmonyCalls,
    JsonCalls,
    PythonCalls,
    Reasoning,
    markers_of,
)
from .harmony import read_messages
from .tools import Tools
from .waiting import SPACE, Ended, Reader, Wait, markers

Part = tuple[PartKind, int, str]
"""Kind, number of the call (0 where the part is of none), text."""
MakeId = Callable[[int], str]
"""The id of an answer's call number `n`, from 0."""
_LINES: Final = "\n\r"
_MOST_SPACE: Final = 4096
"""Characters of whitespace that are held back until it is known what follows."""


class AnswerParser:
    """The parser of one answer; `feed` and `finish` return the parts that are certain."""

    def __init__(
        self,
        calls: AnswerFormat | None,
        reasoning: Reasoning | None,
        tools: Tools,
        make_id: MakeId,
        opens_reasoning: bool = False,
    ) -> None:
        """`calls`: None where no tools may be called. `opens_reasoning`: the prompt ends within
        reasoning."""
        self.reader = Reader()
        self.tools = tools
        self.is_reasoning = opens_reasoning
        """The text that comes next is reasoning."""
        self.calls = 0
        """Calls so far."""
        self._format = calls
        self._reasoning = reasoning
        self._make_id = make_id
        self._parts: list[Part] = []
        self._space = ""
        """Whitespace of the content that is shown if more content follows."""
        self._skips_space = False
        """The whitespace at the beginning of the content is not shown."""
        self._follows_call = False
        """There was no content since the last call."""
        self._rest = ""
        """What would be content behind a call, at the end of the text."""
        self._body = body_parser(calls.calls, self) if calls else None
        self._hidden = markers(*self._content_markers())
        self._held = ""
        """The end of the content, if it may become a marker."""
        self._steps = self._run()
        next(self._steps, None)

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain once `text` follows what was fed before."""
        if text:
            self.reader.text += text
            next(self._steps, None)
        return self._taken()

    def finish(self) -> list[Part]:
        """What was held back, when no text follows. Called once, last."""
        self.reader.has_ended = True
        for _ in self._steps:
            pass
        if self._follows_call and self._is_cut_marker(self._held + self._rest):
            self._rest = self._held = ""
        self._show_rest()
        if self._held:
            self.emit(PartKind.CONTENT, self._space + self._held)
        elif self._space and not self.calls:
            self.emit(PartKind.CONTENT, self._space)
        self._held = self._space = ""
        return self._taken()

    def _taken(self) -> list[Part]:
        parts = self._parts
        self._parts = []
        return parts

    # --- for the readers of call bodies ---

    def emit(self, kind: PartKind, text: str, call: int = 0) -> None:
        """Append to the part of that kind, or begin one."""
        if not text:
            return
        if self._parts and kind in _JOINED:
            last_kind, last_call, last = self._parts[-1]
            if last_kind is kind and last_call == call:
                self._parts[-1] = (kind, call, last + text)
                return
        self._parts.append((kind, call, text))

    def begin_call(self, name: str, call_id: str = "") -> None:
        """A call of the function `name`; its arguments follow."""
        self._show_rest()
        self._follows_call = True
        self._space = ""
        index = self.calls
        self.calls += 1
        self.emit(PartKind.CALL_ID, call_id or self._make_id(index), index)
        self.emit(PartKind.CALL_NAME, name, index)

    def arguments(self, text: str) -> None:
        """More of the arguments of the last call."""
        self.emit(PartKind.ARGUMENTS, text, self.calls - 1)

    def content(self, text: str) -> None:
        """More content. Whitespace at its end waits: it is shown if more content follows, and not
        before a call."""
        if self.reader.has_ended and self._follows_call:
            self._rest += text
            return
        text = self._unmarked(text)
        if self._skips_space:
            text = text.lstrip(_LINES)
            if not text:
                return
            self._skips_space = False
        text = self._space + text
        kept = len(text.rstrip(SPACE))
        kept = max(kept, len(text) - _MOST_SPACE)
        self._space = text[kept:]
        self.emit(PartKind.CONTENT, text[:kept])
        if kept:
            self._follows_call = False

    def _show_rest(self) -> None:
        """At the end of the text what was kept for it is content after all."""
        rest = self._rest
        self._rest = ""
        self._follows_call = False
        if rest:
            self.content(rest)

    def _is_cut_marker(self, text: str) -> bool:
        """Whether all of a text behind a call is the beginning of a marker: the answer was cut off
        there, and nobody said that."""
        text = text.strip(SPACE)
        if self._format is None or not text:
            return False
        return markers(*markers_of(self._format, self._reasoning)).held(text) == len(text)

    def _unmarked(self, text: str) -> str:
        """The text without markers, also those that come about where something between was left
        out. What may become one is held back."""
        text = self._held + text
        hidden = self._hidden
        while (match := hidden.find(text)) is not None:
            text = text[: match.start()] + text[match.end() :]
        kept = len(text) - hidden.held(text)
        self._held = text[kept:]
        return text[:kept]

    # --- the answer ---

    def _run(self) -> Wait[None]:
        answer_format = self._format
        if answer_format and isinstance(answer_format.calls, HarmonyCalls):
            yield from read_messages(self, answer_format.calls)
            return
        try:
            if self.is_reasoning:
                yield from self._think()
            yield from self._read_answer()
        except Ended:
            # What a reader has looked at and not taken, such as a call that was to be read whole.
            self.content(self.reader.take(len(self.reader.text)))

    def _read_answer(self) -> Wait[None]:
        answer_format = self._format
        reasoning = self._reasoning
        body = self._body
        if reasoning and (yield from self._begins_with(reasoning.begin)):
            yield from self._think()
        if body is not None and _may_be_bare(answer_format):
            yield from self._bare_calls(body)
        begin_reasoning = reasoning.begin if reasoning else ""
        while True:
            marker = yield from self.reader.pass_on(self._hidden, self.content)
            if marker == begin_reasoning:
                yield from self._think()
            elif body is not None and marker in body.begins:
                yield from self._call(body, marker)

    def _content_markers(self) -> tuple[str, ...]:
        """All that is no content, wherever it stands."""
        texts = list(self._body.begins) if self._body else []
        answer_format = self._format
        reasoning = self._reasoning
        if answer_format:
            texts += answer_format.hidden
            if answer_format.section:
                texts += (answer_format.section.begin, answer_format.section.end)
            texts.append(getattr(answer_format.calls, "end", ""))
        if reasoning:
            texts += (reasoning.begin, reasoning.end)
        return tuple(dict.fromkeys(text for text in texts if text.strip()))

    def _begins_with(self, marker: str) -> Wait[bool]:
        """Whether the answer begins with `marker`, perhaps behind whitespace; then it is taken, and
        otherwise nothing is."""
        reader = self.reader
        while True:
            space = len(reader.text) - len(reader.text.lstrip(SPACE))
            rest = reader.text[space:]
            if rest.startswith(marker):
                reader.take(space + len(marker))
                return True
            if reader.has_ended or not marker.startswith(rest) or space > _MOST_SPACE:
                return False
            yield

    def _think(self) -> Wait[None]:
        """Reasoning, up to its end; line breaks right within its markers are no part of it."""
        reasoning = self._reasoning
        assert reasoning is not None
        self.is_reasoning = True
        held = ""
        begun = False

        def show(text: str) -> None:
            nonlocal held, begun
            if not begun:
                text = text.lstrip(_LINES)
                begun = bool(text)
            text = held + text
            kept = max(len(text.rstrip(_LINES)), len(text) - _MOST_SPACE)
            held = text[kept:]
            self.emit(PartKind.REASONING, text[:kept])

        ends = [reasoning.end]
        body = self._body if reasoning.calls_end_it else None
        if self._format and body is not None:
            ends += body.begins
            if self._format.section:
                ends.append(self._format.section.begin)
        hidden = [] if reasoning.begin == reasoning.end else [reasoning.begin]
        wanted = markers(*ends, *hidden)
        while True:
            marker = yield from self.reader.pass_on(wanted, show)
            if marker in ends:
                break
        self.is_reasoning = False
        self._skips_space = True
        if body is not None and marker in body.begins:
            yield from self._call(body, marker)

    def _call(self, body: BodyParser, marker: str) -> Wait[None]:
        """The calls that `marker` begins."""
        yield from self._calls_or_content(body.read(marker))

    def _bare_calls(self, body: BodyParser) -> Wait[None]:
        """Calls at the beginning of the answer, without a marker."""
        yield from self._calls_or_content(body.read_bare())

    def _calls_or_content(self, reading: Wait[bool | None]) -> Wait[None]:
        """What `reading` reads is content where it says so (False), or meets no call."""
        before = self.calls
        self.reader.record()
        try:
            if (yield from reading) is False:
                self._give_back()
        except NotACall:
            self._give_back()
        except Ended:
            if self.calls == before:
                self._give_back()
            raise
        self.reader.recorded()

    def _give_back(self) -> None:
        """What was taken since the record began is content after all."""
        self.content(self.reader.recorded())


_JOINED: Final = (PartKind.CONTENT, PartKind.REASONING, PartKind.ARGUMENTS)


def _may_be_bare(answer_format: AnswerFormat | None) -> bool:
    if answer_format is None:
        return False
    calls = answer_format.calls
    if isinstance(calls, PythonCalls):
        return calls.brackets
    return isinstance(calls, JsonCalls) and (calls.is_bare or not calls.begin)
