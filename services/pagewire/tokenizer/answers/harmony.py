"""gpt-oss: an answer is a row of messages, each with a header that says what it is.

    <|channel|>analysis<|message|>reasoning<|end|><|start|>assistant<|channel|>commentary
    to=functions.NAME <|constrain|>json<|message|>arguments<|call|>

The prompt ends behind `<|start|>assistant`. See https://github.com/openai/harmony.
"""

import contextlib
import re
from collections.abc import Callable
from typing import Final, Protocol

from pagewire_protocol.structs import PartKind

from .bodies import Answer, BodyReader, Broken, NotACall
from .format import HarmonyCalls
from .waiting import Ended, Wait, markers


class HarmonyAnswer(Answer, Protocol):
    """Where messages go: an AnswerParser."""

    is_reasoning: bool

    def emit(self, kind: PartKind, text: str, call: int = 0) -> None:
        """More of a part."""
        ...


_RECIPIENT: Final = re.compile(r"to=([\w.:/-]+)")
_FUNCTIONS: Final = "functions."


def read_messages(answer: HarmonyAnswer, calls: HarmonyCalls) -> Wait[None]:
    """All messages, up to the end of the text."""
    with contextlib.suppress(Ended):
        yield from _Messages(answer, calls).read()


class _Messages(BodyReader):
    def __init__(self, answer: HarmonyAnswer, calls: HarmonyCalls) -> None:
        super().__init__(answer)
        self._parser = answer
        self._calls = calls

    def read(self) -> Wait[None]:
        calls = self._calls
        everything = markers(
            calls.start, calls.channel, calls.message, calls.constrain, *calls.ends
        )
        while True:
            # Text outside of any message: a model that keeps to no format, or a recipient that
            # comes before the channel.
            header = ""
            if (yield from self.reader.starts_with(" to=")):
                header, marker = yield from self.reader.up_to(everything)
            else:
                marker = yield from self.reader.pass_on(everything, self._parser.content)
            while marker in (calls.start, calls.channel, calls.constrain):
                text, following = yield from self.reader.up_to(everything)
                header += marker + text
                marker = following
            if marker == calls.message:
                yield from self._message(header)

    def _message(self, header: str) -> Wait[None]:
        channel = header.partition(self._calls.channel)[2].split("<")[0].split()
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            yield from self._call(recipient[1].removeprefix(_FUNCTIONS))
        elif channel[:1] == ["analysis"]:
            self._parser.is_reasoning = True
            try:
                yield from self._pass_on(self._reasoning)
            finally:
                self._parser.is_reasoning = False
        else:
            yield from self._pass_on(self._parser.content)

    def _reasoning(self, text: str) -> None:
        self._parser.emit(PartKind.REASONING, text)

    def _pass_on(self, show: Callable[[str], None]) -> Wait[None]:
        """The body, up to what ends it; a header that begins there is left."""
        ends = (*self._calls.ends, self._calls.start, self._calls.channel)
        marker = yield from self.reader.pass_on(markers(*ends), show)
        if marker not in self._calls.ends:
            self.reader.give_back(marker)

    def _call(self, name: str) -> Wait[None]:
        try:
            self.begin(name)
        except NotACall:
            return
        first = yield from self.reader.space()
        if first != "{":
            self.answer.arguments("{}")
        else:
            with contextlib.suppress(Broken):
                yield from self.json_arguments(self.answer.arguments)
        ends = (*self._calls.ends, self._calls.start, self._calls.channel)
        marker = yield from self.skip_to(*ends)
        if marker not in self._calls.ends:
            self.reader.give_back(marker)
