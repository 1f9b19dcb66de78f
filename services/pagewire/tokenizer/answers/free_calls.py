"""Grammars for answers that are free but for their calls: once a call has begun, it is one of a
known tool, with arguments by its schema. In llguidance's Lark dialect; knows no requests and no
streams.

A special token begins a call wherever it comes. A marker that is text does where it is complete: a
lazy rule takes the text up to it. Reasoning that the answer itself opens is passed over, since a
marker in it begins nothing.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from ...grammar.lark import escaped
from .call_rules import ANY_TEXT, Opening
from .format import Reasoning

_SPACE: Final = r"[ \n\t]{0,8}"
Terms = Callable[[str], str]
"""A fixed text as terms of a rule: strings, and special tokens by their ids."""
_TOKEN: Final = re.compile(r"<\[(\d+)\]>")


class _Begin(NamedTuple):
    """How a call begins: a special token, or a text (then `token` is empty); and what follows."""

    token: str
    text: str
    rest: str


class FreeAnswer:
    """The rule `answer` of one request, and the rules that it needs."""

    def __init__(
        self,
        openings: Iterable[Opening],
        reasoning: Reasoning | None,
        terms: Terms,
        special: Mapping[str, int],
    ) -> None:
        """`reasoning`: how the answer may mark reasoning of its own. `special`: ids by texts."""
        self._terms = terms
        self._special = special
        self._begins = [self._begin(opening) for opening in openings]
        self._reasoning = reasoning
        self._rules: list[str] = [f"text: {ANY_TEXT}"]

    def lark(self, parallel: bool) -> str:
        """`parallel`: more than one call."""
        between = self._other_tokens()
        calls = self._rule("call", self._calls("text", ""))
        chunk = self._rule("chunk", " | ".join(filter(None, (calls, between))))
        rest = f"{chunk}* text"
        if not parallel:
            others = f"({between})*" if between else ""
            rest = f"{others} ({calls} {others})? text"
        answer = self._with_reasoning(rest, calls, between)
        return "\n".join([f"answer: {answer}", *self._rules])

    def _with_reasoning(self, rest: str, calls: str, between: str) -> str:
        reasoning = self._reasoning
        if reasoning is None:
            return rest
        begin = self._terms(reasoning.begin)
        end = self._terms(reasoning.end)
        if _TOKEN.fullmatch(begin) and _TOKEN.fullmatch(end):
            within = _tokens(set(self._special.values()) - {_id(begin), _id(end)})
            inner = f"(text {within})*" if within else ""
            return f"(text {begin} {inner} text {end})? {rest}"
        opening = f"{_SPACE}{escaped(reasoning.begin)}"
        self._rules += [
            f"thought[lazy]: /{opening}(.|\\n)*{escaped(reasoning.end)}/",
            f"PLAIN: {ANY_TEXT} & ~/{opening}(.|\\n)*/",
            "plain: PLAIN",
        ]
        first = self._rule("first", self._calls("plain", f" & ~/{opening}(.|\\n)*/"))
        first_between = f"plain ({between.removeprefix('text ')} {rest})?" if between else "plain"
        return f"(thought {rest}) | ({first} {rest}) | ({first_between})"

    def _begin(self, opening: Opening) -> _Begin:
        terms = self._terms(opening.marker)
        token = _TOKEN.search(terms)
        if token is None:
            return _Begin("", opening.marker, opening.rest)
        # What stands before the token is free text like any other.
        return _Begin(token[0], "", f"{terms[token.end() :]} {opening.rest}")

    def _calls(self, free: str, but: str) -> str:
        """A call and the free text before it, that is no text of the kind `but`."""
        options: list[str] = []
        for number, begin in enumerate(self._begins):
            if begin.token:
                options.append(f"{free} {begin.token} {begin.rest}")
                continue
            name = f"{free}_up_to_{number}"
            self._rules += [
                f"{name}[lazy]: {name.upper()}",
                f"{name.upper()}: /(.|\\n)*{escaped(begin.text)}/{but}",
            ]
            options.append(f"{name} {begin.rest}")
        return " | ".join(options)

    def _other_tokens(self) -> str:
        """Free text with a special token behind it that begins nothing; empty where there is
        none."""
        taken = {_id(begin.token) for begin in self._begins if begin.token}
        if self._reasoning is not None:
            taken |= {self._special.get(text, -1) for text in _marks(self._reasoning)}
        others = _tokens(set(self._special.values()) - taken)
        return f"text {others}" if others else ""

    def _rule(self, name: str, body: str) -> str:
        self._rules.append(f"{name}: {body}")
        return name


def _marks(reasoning: Reasoning) -> tuple[str, str]:
    return reasoning.begin, reasoning.end


def _id(term: str) -> int:
    match = _TOKEN.fullmatch(term)
    assert match is not None
    return int(match[1])


def _tokens(ids: set[int]) -> str:
    """The term for one of these special tokens; empty for none."""
    return f"<[{','.join(map(str, sorted(ids)))}]>" if ids else ""
