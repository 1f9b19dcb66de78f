"""What an answer is made of: content, reasoning and tool calls, and the parser that tells them
apart in the generated text. Knows no HTTP, no JSON and no model.

A parser stands between a stream's text and the formatter:

    text of a stream -> AnswerParser.feed -> deltas -> ResponseFormatter -> body or event

It sees the text after stop strings, in pieces that are cut anywhere, and returns typed deltas. The
same parser serves streamed answers (a piece at a time) and whole answers (all text in one piece),
so both say the same. Deltas are what a parser's output means and not where it runs: a parser that
needs token ids may run elsewhere and hand over the same types.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from msgspec import Struct


class ContentDelta(Struct, frozen=True):
    """More of the text that is meant for the user."""

    text: str


class ReasoningDelta(Struct, frozen=True):
    """More of the model's reasoning, which precedes the content."""

    text: str


class ToolCallDelta(Struct, frozen=True):
    """More of one tool call.

    Calls may be parallel: `index` says which one grows. The first delta of a call has its
    `call_id` and the function's `name`; the JSON text of the arguments follows in pieces. A call
    that is known as a whole is one delta.
    """

    index: int
    """Of the call within its answer, from 0."""
    call_id: str = ""
    name: str = ""
    arguments: str = ""


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


class AnswerParser(Protocol):
    """The parser of one answer (one choice). Holds what it has not decided on yet.

    For any way of cutting a text into pieces, the deltas that `feed` and `finish` return add up to
    the same answer. Neither may raise: text that breaks the format is content.
    """

    def feed(self, text: str) -> Sequence[Delta]:
        """The deltas that are certain once `text` follows what was fed before."""
        ...

    def finish(self) -> Sequence[Delta]:
        """What was held back, when no text follows. Called once, last."""
        ...


class ContentParser:
    """All text is content. Stateless; a stream with this parser does not call it for each token."""

    def feed(self, text: str) -> Sequence[Delta]:
        """The text as one content delta; nothing for no text."""
        return (ContentDelta(text),) if text else ()

    def finish(self) -> Sequence[Delta]:
        """Nothing: no text is ever held back."""
        return ()


ParserFactory = Callable[[], AnswerParser]
"""Makes the parser of one answer."""
PLAIN: Final[ParserFactory] = ContentParser
"""Of completions, and of chats with models whose answers have no structure."""


def parse_whole(parser: AnswerParser, text: str) -> Sequence[Delta]:
    """All deltas of a whole text."""
    return (*parser.feed(text), *parser.finish())
