"""Grammars of forced calls: what they let through is what the parser reads, in every format."""

import json
import random

import pytest
from llguidance import LLMatcher, LLTokenizer
from pagewire.grammar.sources import source_of
from pagewire.tokenizer.answers.forced import ForcedAnswers
from pagewire.tokenizer.answers.format import markers_of
from pagewire.tokenizer.answers.formats import named_format
from pagewire.tokenizer.answers.tools import Tools
from pagewire_protocol.grammar import Grammar, GrammarKind
from pagewire_protocol.sampling import AnswerOptions, ToolChoice
from pagewire_protocol.structs import PartKind
from tokenizer.answer_cases import CASES, THINK, TOOLS, parsed
from tokenizers import AddedToken, Tokenizer

REQUIRED = AnswerOptions(ToolChoice.REQUIRED)
NAMED = AnswerOptions(ToolChoice.NAMED, "now", parallel_tool_calls=False)


class Vocabulary:
    """The small tokenizer with a format's markers as special tokens, where they look like such."""

    def __init__(self, bpe: Tokenizer, name: str) -> None:
        self.format = named_format(name)
        assert self.format is not None
        self.tokenizer = Tokenizer.from_str(bpe.to_str())
        special = [m for m in markers_of(self.format, THINK) if m[0] in "<[" and m[-1] in ">]"]
        self.tokenizer.add_special_tokens([AddedToken(m, special=True) for m in special])
        self.special = {text: self.tokenizer.token_to_id(text) for text in special}
        self.matching = LLTokenizer(self.tokenizer.to_str())
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        self.forced = ForcedAnswers(self.format, THINK, self.special)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        matcher = LLMatcher(self.matching, source_of(grammar, self.special))
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar.source}"
        return matcher

    def takes(self, grammar: Grammar, text: str) -> bool:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        matcher = self.matcher(grammar)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def draw(self, grammar: Grammar, source: random.Random, most: int = 400) -> tuple[str, bool]:
        """A random text by the grammar, and whether it has come to its end."""
        matcher = self.matcher(grammar)
        ids: list[int] = []
        while len(ids) < most and not matcher.is_stopped():
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            allowed = [token for token in range(self.matching.vocab_size) if mask >> token & 1]
            ends = [token for token in allowed if token not in range(3, 400)]
            token = source.choice(ends if ends and source.random() < 0.6 else allowed)
            if token < 3:
                return self.tokenizer.decode(ids, skip_special_tokens=False), True
            ids.append(token)
            assert matcher.consume_token(token)
        return self.tokenizer.decode(ids, skip_special_tokens=False), matcher.is_stopped()


@pytest.mark.parametrize("name", list(CASES))
def test_a_forced_call_is_one_that_is_read(bpe: Tokenizer, name: str) -> None:
    vocabulary = Vocabulary(bpe, name)
    tools = Tools(TOOLS)
    source = random.Random(name)
    grammar = vocabulary.forced.grammar(REQUIRED, tools, None, opens_reasoning=False)
    named = vocabulary.forced.grammar(NAMED, tools, None, opens_reasoning=False)
    assert grammar is not None and named is not None
    ended = 0
    for number in range(6):
        text, has_ended = vocabulary.draw(named if number % 3 == 0 else grammar, source)
        parts = parsed(name, [text])
        names = [piece for kind, _, piece in parts if kind is PartKind.CALL_NAME]
        assert set(names) <= {"get_weather", "now"}, text
        if has_ended:
            ended += 1
            assert names and PartKind.CONTENT not in [kind for kind, _, _ in parts], text
            if number % 3 == 0:
                assert names == ["now"]
            for kind, call, piece in parts:
                if kind is PartKind.ARGUMENTS:
                    arguments = json.loads(piece)
                    assert names[call] == "now" or isinstance(arguments["city"], str), text
    assert ended


def test_json_or_calls(bpe: Tokenizer) -> None:
    """A form for the answer beside tools: either is possible."""
    vocabulary = Vocabulary(bpe, "hermes")
    wanted = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object", "required": ["a"]}')
    options = AnswerOptions(ToolChoice.AUTO)
    grammar = vocabulary.forced.grammar(options, Tools(TOOLS), wanted, opens_reasoning=False)
    assert grammar is not None
    assert vocabulary.takes(grammar, '{"a": 1}') and not vocabulary.takes(grammar, '{"b": 1}')
    assert vocabulary.takes(grammar, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')


def test_what_is_forced_begins_behind_the_reasoning(bpe: Tokenizer) -> None:
    vocabulary = Vocabulary(bpe, "hermes")
    grammar = vocabulary.forced.grammar(NAMED, Tools(TOOLS), None, opens_reasoning=True)
    assert grammar is not None and grammar.after == "</think>"
    wanted = Grammar(GrammarKind.REGEX, "[0-9]+")
    grammar = vocabulary.forced.grammar(AnswerOptions(), Tools([]), wanted, opens_reasoning=True)
    assert grammar is not None and (grammar.after, grammar.source) == ("</think>", "[0-9]+")


def test_a_budget_ends_the_reasoning(bpe: Tokenizer) -> None:
    vocabulary = Vocabulary(bpe, "hermes")
    for budget in (0, 3):
        options = AnswerOptions(thinking_budget=budget)
        grammar = vocabulary.forced.grammar(options, Tools([]), None, opens_reasoning=True)
        assert grammar is not None
        assert vocabulary.takes(grammar, "</think>\n\nHello <b>.")
        assert vocabulary.takes(grammar, "abc</think>x") is (budget > 0)
        assert not vocabulary.takes(grammar, "The quick brown foxes</think>x")
    forced = AnswerOptions(ToolChoice.NAMED, "now", thinking_budget=2)
    grammar = vocabulary.forced.grammar(forced, Tools(TOOLS), None, opens_reasoning=True)
    assert grammar is not None
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert vocabulary.takes(grammar, f"a</think>\n{call}")
    assert not vocabulary.takes(grammar, "a</think>\nHello")
