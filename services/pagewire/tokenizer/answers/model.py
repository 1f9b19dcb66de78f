"""How the answers of the model at hand are written, and the parsers of its streams.

The format is the one that --tool-call-parser names; else the one whose markers are in the
checkpoint's own description of answers (transformers' `response_template`); else the one whose
markers the chat template writes, found by rendering it with tools and a call; else JSON.
"""

import hashlib
from collections.abc import Iterable
from typing import Final, NamedTuple

from msgspec.structs import replace
from pagewire_protocol.messages import Generate
from pagewire_protocol.sampling import ToolChoice
from pagewire_protocol.structs import Chat
from tokenizers import Tokenizer

from ..template import ChatTemplate, TemplateRefused
from .forced import ForcedAnswers
from .format import AnswerFormat, HarmonyCalls, Reasoning, markers_of
from .formats import FORMATS, GENERIC, REASONING, named_format, named_reasoning
from .parser import AnswerParser
from .tools import Tools, tools_of

NO_TOOLS: Final = Tools([])
SHORT_ID: Final = 9
_ALPHABET: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class StreamParser(NamedTuple):
    """The parser of one stream, and what of its tokens has no text for it."""

    parser: AnswerParser
    hidden: frozenset[int]
    """Special tokens that are no markers."""
    only_first: bool
    """Calls after the first one are left out."""


class ModelAnswers:
    """Made once, when the tokenizer is loaded."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer | None,
        tool_parser: str = "",
        reasoning_parser: str = "",
        response_template: str = "",
    ) -> None:
        """`response_template`: JSON text; empty for none. Raises ValueError for a parser that is
        not known."""
        self.template = template
        self.format = _format_of(template, tool_parser, response_template)
        source = response_template + template.source
        self.reasoning = _reasoning_of(source, self.format, reasoning_parser)
        template.short_ids = self.format.id_style == "nine"
        self.special: dict[str, int] = {}
        """Ids of special tokens, by their texts."""
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder()
            self.special = {entry.content: token for token, entry in added.items() if entry.special}
        markers = markers_of(self.format, self.reasoning)
        self._hidden = frozenset(
            token
            for text, token in self.special.items()
            if not any(text in marker for marker in markers)
        )

        self._forced = ForcedAnswers(self.format, self.reasoning, self.special)

    def with_grammar(self, request: Generate, opens_reasoning: bool) -> Generate:
        """The request with the grammar that holds its answer to what it asks for: calls that must
        be, content behind the reasoning. Raises UnsupportedAnswer."""
        options = request.text.answer
        if options is None:
            return request
        grammar = self._forced.grammar(
            options, self.tools(request), request.grammar, opens_reasoning
        )
        return request if grammar is request.grammar else replace(request, grammar=grammar)

    @property
    def is_harmony(self) -> bool:
        """Reasoning is a kind of message in the format itself."""
        return isinstance(self.format.calls, HarmonyCalls)

    @property
    def reasoning_name(self) -> str:
        """How reasoning is marked, for a log."""
        if self.reasoning is None:
            return "harmony" if self.is_harmony else "none"
        return self.reasoning.name

    @property
    def has_reasoning(self) -> bool:
        """An answer may begin with reasoning, whether tools are given or not."""
        return self.reasoning is not None or self.is_harmony

    def opens_reasoning(self, chat: Chat, rendered: str) -> bool:
        """Whether the answer that follows the prompt `rendered` begins within reasoning. The text
        that begins the answer decides, never the rest of the prompt. Raises TemplateRefused."""
        if self.reasoning is None:
            return False
        begun = (
            chat.messages[-1].content
            if chat.continue_final_message
            else self.template.generation_prompt(chat, rendered)
        )
        return begun.rfind(self.reasoning.begin) > begun.rfind(self.reasoning.end)

    def parser(self, request: Generate, opens_reasoning: bool) -> StreamParser | None:
        """The parser of a request's output; None where all of it is content."""
        options = request.text.answer
        if options is None:
            return None
        tools = self.tools(request)
        calls = options.tool_choice is not ToolChoice.NONE and bool(tools.functions)
        if not calls and not self.has_reasoning:
            return None
        parser = AnswerParser(
            self.format if calls or self.is_harmony else None,
            self.reasoning,
            tools,
            lambda index: self._call_id(request.rid, index),
            opens_reasoning,
        )
        return StreamParser(parser, self._hidden, not options.parallel_tool_calls)

    def tools(self, request: Generate) -> Tools:
        """Those that the request may call."""
        chat = request.prompt.chat
        return tools_of(chat.tools) if chat is not None and chat.tools else NO_TOOLS

    def _call_id(self, rid: bytes, index: int) -> str:
        """The same for every attempt at a request."""
        digest = hashlib.sha256(rid + index.to_bytes(4, "little")).digest()
        if self.format.id_style == "nine":
            return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:SHORT_ID])
        return f"call_{digest[:12].hex()}"


def _format_of(template: ChatTemplate, name: str, response_template: str) -> AnswerFormat:
    if name and name != "auto":
        answer_format = named_format(name)
        if answer_format is None:
            raise _unknown_parser("--tool-call-parser", name, FORMATS)
        return answer_format
    described = _with_signs(response_template)
    if described is not None:
        return described
    try:
        support = template.support
    except TemplateRefused:
        return GENERIC
    text = template.source + support.rendered
    if not (support.tools or support.calls) and "<|channel|>" not in text:
        return GENERIC
    return _with_signs(text) or GENERIC


def _unknown_parser(flag: str, name: str, items: Iterable[AnswerFormat | Reasoning]) -> ValueError:
    names = sorted({name for item in items for name in item.parser_names})
    return ValueError(f"{flag} {name} is not known; there are auto, {', '.join(names)}")


def _with_signs(text: str) -> AnswerFormat | None:
    """The first format whose signs are all in `text`."""
    return next(
        (item for item in FORMATS if item.signs and all(sign in text for sign in item.signs)), None
    )


def _reasoning_of(source: str, answer_format: AnswerFormat, name: str) -> Reasoning | None:
    if isinstance(answer_format.calls, HarmonyCalls):
        return None
    if name and name != "auto":
        reasoning = named_reasoning(name)
        if reasoning is None:
            raise _unknown_parser("--reasoning-parser", name, REASONING)
        return reasoning
    if answer_format.name == "kimi_k2" and "</think>" in source:
        return named_reasoning("kimi_k2")
    return next(
        (item for item in REASONING if item.begin in source or item.end in source),
        None,
    )
