"""Grammars for what an answer must hold: calls of tools in the model's own format, JSON or calls,
arguments of strict tools, an end of reasoning after so many tokens. In llguidance's Lark dialect;
knows no streams.

A call is written as the model has learnt it, its arguments by the schema of the tool; so what is
forced is read back by the same parser as what a model writes by itself.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from msgspec.structs import replace
from pagewire_protocol.grammar import MAX_GRAMMAR_SOURCE, Grammar, GrammarKind
from pagewire_protocol.sampling import AnswerOptions, ToolChoice

from ...grammar.lark import literal
from ...grammar.schemas import json_term
from .call_rules import ANY_TEXT, CallRules
from .format import AnswerFormat, HarmonyCalls, Reasoning
from .free_calls import FreeAnswer
from .harmony_rules import HarmonyRules
from .tools import Tools

FORCING: Final = (ToolChoice.REQUIRED, ToolChoice.NAMED)
_NOTHING: Final[dict[str, Any]] = {"enum": []}
"""The schema `false`, as an object."""


class UnsupportedAnswer(ValueError):
    """No grammar can be made of what a request asks for; `param` is what is at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class ForcedAnswers:
    """The grammars of one model."""

    def __init__(
        self, answer_format: AnswerFormat, reasoning: Reasoning | None, special: Mapping[str, int]
    ) -> None:
        """`special`: ids of special tokens, by their texts."""
        self._format = answer_format
        self._reasoning = reasoning
        self._special = special
        names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
        self._names = re.compile(f"({names})") if special else None

    def grammar(
        self,
        options: AnswerOptions,
        tools: Tools,
        content_grammar: Grammar | None,
        opens_reasoning: bool,
    ) -> Grammar | None:
        """What holds the answer to its options. `content_grammar`: what the request says of its
        content; it begins behind the reasoning that the prompt has opened. Raises
        UnsupportedAnswer."""
        if isinstance(self._format.calls, HarmonyCalls) and self._has_tokens(self._format.calls):
            return self._of_messages(self._format.calls, options, tools, content_grammar)
        reasoning = self._reasoning
        lark = self._calls(options, tools, content_grammar, None if opens_reasoning else reasoning)
        budget = options.thinking_budget
        if budget >= 0 and opens_reasoning and reasoning is not None:
            return self._budgeted(budget, lark, content_grammar)
        after = reasoning.end if opens_reasoning and reasoning is not None else ""
        if lark is not None:
            return _grammar(lark, after=after, param="tools")
        return _behind(after, content_grammar)

    def _has_tokens(self, calls: HarmonyCalls) -> bool:
        """The model's vocabulary has the tokens between messages."""
        return all(text in self._special for text in (calls.start, calls.channel, calls.message))

    def _of_messages(
        self,
        calls: HarmonyCalls,
        options: AnswerOptions,
        tools: Tools,
        content_grammar: Grammar | None,
    ) -> Grammar | None:
        budget = options.thinking_budget
        writer = HarmonyRules(calls, CallRules(self._terms, tools), self._terms, budget)
        param = "tools" if budget < 0 else "thinking_token_budget"
        names = _names(options, tools)
        parallel = options.parallel_tool_calls
        content = _json_rule(content_grammar)
        if options.tool_choice in FORCING and names:
            return _grammar(writer.forced(names, parallel), param=param)
        if content is not None:
            return _grammar(
                writer.forced(names, parallel, content),
                param=content_grammar.param if content_grammar is not None and not names else param,
            )
        if content_grammar is not None:
            if budget >= 0:
                raise _not_beside_a_budget()
            return _behind(f"{calls.channel}final{calls.message}", content_grammar)
        if _any_strict(tools, options):
            return _grammar(writer.free(names), param=param)
        return _grammar(writer.free(None), param=param) if budget >= 0 else None

    def _budgeted(self, budget: int, lark: str | None, content_grammar: Grammar | None) -> Grammar:
        """Reasoning of at most `budget` tokens, its end, then the answer."""
        reasoning = self._reasoning
        assert reasoning is not None
        if lark is None:
            body = _json_rule(content_grammar)
            if content_grammar is not None and body is None:
                raise _not_beside_a_budget()
            lark = f"answer: {body or ANY_TEXT}"
        end = self._terms(reasoning.end)
        thinking = f"thinking[max_tokens={budget}]: {ANY_TEXT}" if budget else 'thinking: ""'
        lark = f"start: thinking {end} /[ \\n\\t]{{0,4}}/ answer\n{thinking}\n{lark}"
        return _grammar(lark, param="thinking_token_budget")

    def _calls(
        self,
        options: AnswerOptions,
        tools: Tools,
        content_grammar: Grammar | None,
        own_reasoning: Reasoning | None,
    ) -> str | None:
        """The rule `answer` and what it needs; None where calls are free, or not possible.
        `own_reasoning`: how an answer may open reasoning that the prompt has not opened."""
        names = _names(options, tools)
        if not names:
            return None
        parallel = options.parallel_tool_calls
        if options.tool_choice in FORCING:
            return self._rules(names, tools, parallel, None)
        if content_grammar is not None:
            content = _json_rule(content_grammar)
            return self._rules(names, tools, parallel, content) if content is not None else None
        if not _any_strict(tools, options):
            return None
        rules = CallRules(self._terms, tools, is_free=True)
        openings = rules.openings(self._format, names, parallel)
        if not openings:
            return None
        free = FreeAnswer(openings, own_reasoning, self._terms, self._special)
        return "\n".join([free.lark(parallel), *rules.rules])

    def _rules(
        self, names: Iterable[str], tools: Tools, parallel: bool, content: str | None
    ) -> str:
        writer = CallRules(self._terms, tools)
        answer = writer.answer(self._format, list(names), parallel)
        if content is not None:
            answer = f"({answer}) | ({content})"
        return "\n".join([f"answer: {answer}", *writer.rules])

    def _terms(self, text: str) -> str:
        """A literal text as terms of a rule: special tokens by their ids."""
        parts = self._names.split(text) if self._names else [text]
        terms = [
            f"<[{self._special[part]}]>" if part in self._special else literal(part)
            for part in parts
            if part
        ]
        return " ".join(terms)


def _names(options: AnswerOptions, tools: Tools) -> list[str]:
    """The functions that the answer may call."""
    match options.tool_choice:
        case ToolChoice.NONE:
            return []
        case ToolChoice.NAMED:
            return [options.tool_name] if tools.functions else []
        case _:
            return list(tools.functions)


def _any_strict(tools: Tools, options: AnswerOptions) -> bool:
    """One of the functions that may be called wants its arguments by its schema."""
    return any(tools.functions[name].get("strict") is True for name in _names(options, tools))


def _not_beside_a_budget() -> UnsupportedAnswer:
    return UnsupportedAnswer(
        "`thinking_token_budget` is not supported together with this form of the answer; JSON schemas "
        "and tools are",
        "thinking_token_budget",
    )


def _behind(after: str, content_grammar: Grammar | None) -> Grammar | None:
    """The form of the content, which begins behind the text `after`."""
    if content_grammar is None or not after:
        return content_grammar
    return replace(content_grammar, after=after)


def _grammar(lark: str, *, param: str, after: str = "") -> Grammar:
    if not lark.startswith("start:"):
        lark = "start: answer\n" + lark
    if len(lark) > MAX_GRAMMAR_SOURCE:
        raise UnsupportedAnswer(
            f"the schemas of the tools make a grammar of {len(lark)} characters; at most "
            f"{MAX_GRAMMAR_SOURCE} are possible where calls are held to them",
            "tools",
        )
    return Grammar(GrammarKind.LARK, lark, after=after, param=param)


def _json_rule(content_grammar: Grammar | None) -> str | None:
    """The term of a grammar for JSON; None for one of another kind."""
    if content_grammar is None:
        return None
    if content_grammar.kind is GrammarKind.JSON_OBJECT:
        return json_term({"type": "object"}, content_grammar)
    if content_grammar.kind is GrammarKind.JSON_SCHEMA:
        schema = json.loads(content_grammar.source)
        if isinstance(schema, bool):
            schema = {} if schema else _NOTHING
        return json_term(schema, content_grammar)
    return None
