"""Grammars for gpt-oss, whose answers are rows of messages, each with a header: what is forced, and
how much reasoning may come before it. In llguidance's Lark dialect; knows no requests and no
streams.
"""

from collections.abc import Callable, Sequence
from typing import Final

from .call_rules import ANY_TEXT, MOST_CALLS, CallRules
from .format import HarmonyCalls

MOST_MESSAGES: Final = 64
"""Of an answer whose messages are free."""
UNBOUNDED: Final = -1


class HarmonyRules:
    """Of one request. `budget`: the tokens that reasoning may have; UNBOUNDED: any number."""

    def __init__(
        self, calls: HarmonyCalls, rules: CallRules, terms: Callable[[str], str], budget: int
    ) -> None:
        self._calls = calls
        self._rules = rules
        self._terms = terms
        self._budget = budget

    def forced(self, names: Sequence[str], parallel: bool, content: str | None = None) -> str:
        """Reasoning, if the model likes, then calls of these functions; or else the JSON `content`
        as the final message."""
        following = f" (next call){{0,{MOST_CALLS - 1}}}" if parallel else ""
        options = [f"call{following}"] if names else []
        if content is not None:
            options.append("final")
        answer = " | ".join(f"({option})" for option in options)
        rules = [f"answer: {self._thinks()} ({answer})", self._call(names)] if names else []
        if not names:
            rules = [f"answer: {self._thinks()} ({answer})"]
        if content is not None:
            rules.append(f"final: {self._header('final')} {content} {self._end()}")
        return self._joined(rules)

    def free(self, names: Sequence[str] | None) -> str:
        """Any messages, with no more reasoning than the budget; `names`: calls are of these
        functions, by their schemas. None: of any."""
        say = f"{self._header('final')} | {self._header('commentary')}"
        others = f"((({say}) text {self._end()}) | call)"
        row = f"(next message){{0,{MOST_MESSAGES}}}"
        if self._budget == UNBOUNDED:
            answer = f"message {row}"
            message = f"message: analysis | {others}"
        else:
            answer = f"{self._thinks()} message {row}"
            message = f"message: {others}"
        call = self._any_call() if names is None else self._call(names)
        return self._joined([f"answer: {answer}", message, call])

    def _thinks(self) -> str:
        return "" if self._budget == 0 else "(analysis next)?"

    def _joined(self, rules: list[str]) -> str:
        calls = self._calls
        limit = "" if self._budget <= 0 else f"[max_tokens={self._budget}]"
        analysis = self._terms(f"{calls.channel}analysis{calls.message}")
        common = [
            f"next: {self._terms(calls.start + 'assistant')}",
            f"text: {ANY_TEXT}",
            f"thinking{limit}: {ANY_TEXT}",
            f"analysis: {analysis} thinking {self._terms(calls.ends[0])}",
        ]
        return "\n".join([*rules, *common, *self._rules.rules])

    def _header(self, channel: str) -> str:
        calls = self._calls
        as_json = self._terms(f" {calls.constrain}json")
        head = self._terms(f"{calls.channel}{channel}")
        return f"{head} ({as_json})? {self._terms(calls.message)}"

    def _end(self) -> str:
        """The token behind a message, which is not there where the answer ends."""
        ends = (self._terms(self._calls.ends[0]), self._terms(self._calls.ends[-1]))
        return f"({' | '.join(ends)})?"

    def _call(self, names: Sequence[str]) -> str:
        bodies = [self._call_of(name) for name in names]
        return f"call: {' | '.join(bodies)}"

    def _call_of(self, name: str) -> str:
        calls = self._calls
        terms = self._terms
        to = f" to=functions.{name}"
        headers = (
            f"{terms(f'{calls.channel}commentary{to} {calls.constrain}json')}",
            f"{terms(f'{to}{calls.channel}commentary')} ({terms(f' {calls.constrain}json')} | {terms(' json')})?",
        )
        body = f"{terms(calls.message)} {self._rules.arguments(name)} {terms(calls.ends[1])}"
        return f"({' | '.join(headers)}) {body}"

    def _any_call(self) -> str:
        calls = self._calls
        terms = self._terms
        to = r"/ to=[\w.:-]{1,128}/"
        kind = rf"({terms(f' {calls.constrain}')})? /[ a-z]{{0,16}}/"
        first = f"{terms(f'{calls.channel}commentary')} {to} {kind}"
        second = f"{to} {terms(f'{calls.channel}commentary')} {kind}"
        return f"call: ({first} | {second}) {terms(calls.message)} text {terms(calls.ends[1])}"
