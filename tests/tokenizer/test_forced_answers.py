"""Grammars of forced calls: what they let through is what the parser reads, in every format."""

import json
import random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from msgspec.structs import replace
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
        special.append("<|im_end|>")
        self.special = {text: self.tokenizer.token_to_id(text) for text in special}
        self.matching = LLTokenizer(self.tokenizer.to_str())
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        self.forced = ForcedAnswers(self.format, THINK, self.special)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        matcher = LLMatcher(self.matching, source_of(grammar, self.special))
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar.source}"
        return matcher

    def refusal(self, grammar: Grammar) -> str:
        """Why it is none; empty where it is one."""
        return LLMatcher(self.matching, source_of(grammar, self.special)).get_error()

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


FREE_NUMBER = {"oneOf": [{"type": "integer"}, {"type": "number"}]}


def test_json_beside_tools_or_a_budget_is_held_as_it_is_alone(bpe: Tokenizer) -> None:
    """Its whitespace, its closed objects, formats that are annotations, what is not held."""
    vocabulary = Vocabulary(bpe, "hermes")
    schema = json.dumps({"properties": {"a": {"type": "string", "format": "of-their-own"}}})
    wanted = Grammar(GrammarKind.JSON_SCHEMA, schema, whitespace="", additional_properties=False)
    overlapping = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(FREE_NUMBER))
    beside_tools = AnswerOptions(ToolChoice.AUTO)
    budget = AnswerOptions(thinking_budget=0)
    for options, before in ((beside_tools, ""), (budget, "</think>")):
        opens = bool(before)
        grammar = vocabulary.forced.grammar(options, Tools(TOOLS), wanted, opens)
        assert grammar is not None
        assert vocabulary.takes(grammar, before + '{"a":"x"}')
        assert not vocabulary.takes(grammar, before + '{"a": "x"}')
        assert not vocabulary.takes(grammar, before + '{"b":1}')
        grammar = vocabulary.forced.grammar(options, Tools(TOOLS), overlapping, opens)
        assert grammar is not None and "oneOf" in vocabulary.refusal(grammar)
        lenient = replace(overlapping, lenient=True)
        grammar = vocabulary.forced.grammar(options, Tools(TOOLS), lenient, opens)
        assert grammar is not None and vocabulary.takes(grammar, before + "1.5")
    nothing = Grammar(GrammarKind.JSON_SCHEMA, "false")
    grammar = vocabulary.forced.grammar(budget, Tools([]), nothing, opens_reasoning=True)
    assert grammar is not None and vocabulary.refusal(grammar)


def function(parameters: Any, **more: Any) -> Tools:
    return Tools([{"function": {"name": "f", "parameters": parameters, **more}}])


def test_a_strict_tool_has_no_keyword_that_is_not_held(bpe: Tokenizer) -> None:
    vocabulary = Vocabulary(bpe, "hermes")
    schema = {"type": "object", "properties": {"a": FREE_NUMBER}, "required": ["a"]}
    grammar = vocabulary.forced.grammar(REQUIRED, function(schema, strict=True), None, False)
    assert grammar is not None and "oneOf" in vocabulary.refusal(grammar)
    grammar = vocabulary.forced.grammar(REQUIRED, function(schema), None, False)
    assert grammar is not None and not vocabulary.refusal(grammar)
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": False}}}
    grammar = vocabulary.forced.grammar(REQUIRED, function(schema, strict=True), None, False)
    assert grammar is not None and not vocabulary.refusal(grammar)


ARGUMENTS_OF_ODD_SCHEMAS: list[tuple[Any, str]] = [
    ({"type": "object", "properties": {"a": {}}, "required": None, "$defs": None}, '{"a": 1}'),
    ({"type": "object", "properties": None, "required": None}, '{"a": 1}'),
    ({"type": "object", "properties": {"a": {"type": "integer", "enum": None}}}, '{"a": 1}'),
    ({"type": "object", "properties": {"a": {"const": None}}, "required": ["a"]}, '{"a": null}'),
    ({"type": "object", "properties": {}, "required": ["b"]}, '{"b": 1}'),
    ({"type": "object", "properties": {"a": {"type": "integer", "minimum": -(2**63)}}}, '{"a": 1}'),
    ({"properties": {"a": {"type": "integer"}}, "required": ["a", "b"]}, '{"a": 1, "b": [2]}'),
]


@pytest.mark.parametrize(("schema", "arguments"), ARGUMENTS_OF_ODD_SCHEMAS)
def test_tools_whose_schemas_programs_write_badly_can_be_called(
    bpe: Tokenizer, schema: Any, arguments: str
) -> None:
    """`null` for a keyword without a value, as Go's lists; required names without a schema."""
    vocabulary = Vocabulary(bpe, "hermes")
    grammar = vocabulary.forced.grammar(REQUIRED, function(schema), None, False)
    assert grammar is not None
    call = f'{{"name": "f", "arguments": {arguments}}}'
    assert vocabulary.takes(grammar, f"<tool_call>\n{call}\n</tool_call>")


def test_parameters_behind_a_reference_are_written(bpe: Tokenizer) -> None:
    """In formats that write one parameter after the other, which must know their names."""
    vocabulary = Vocabulary(bpe, "qwen3_coder")
    of_city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = function({"$ref": "#/$defs/City", "$defs": {"City": of_city}})
    grammar = vocabulary.forced.grammar(REQUIRED, tools, None, False)
    assert grammar is not None
    begin, end = "<tool_call>\n<function=f>\n", "</function>\n</tool_call>"
    parameter = "<parameter=city>\nRome\n</parameter>\n"
    assert vocabulary.takes(grammar, begin + parameter + end)
    assert not vocabulary.takes(grammar, begin + end)


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


# --- free answers with strict tools ---

STRICT = [
    {**tool, "function": {**tool["function"], "strict": True}}  # type: ignore[dict-item]
    for tool in TOOLS
]
AUTO = AnswerOptions(ToolChoice.AUTO)
BARE = ("phi4_mini", "llama3_json", "pythonic", "generic")
"""Formats in which a call may begin an answer without a marker; such calls are not held."""
MARKED = {
    "olmo3": 'Sure.<function_calls>\nget_weather(city="x", days=2)\nnow()\n</function_calls>',
    "phi4_mini": 'functools[{"name": "get_weather", "arguments": {"city": "x", "days": 2}}]',
    "llama3_json": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "x", "days": 2}}',
    "pythonic": 'Sure.<|python_start|>[get_weather(city="x", days=2)]<|python_end|>',
    "generic": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "x", "days": 2}}\n</tool_call>',
}
FREE_TEXTS = ("", "Hello <b>.", "1 < 2 and [3] {4}\n\n\n\n\n\nfunction")


def strict_grammar(vocabulary: Vocabulary, options: AnswerOptions = AUTO, **more: bool) -> Grammar:
    more = {"opens_reasoning": False, **more}
    grammar = vocabulary.forced.grammar(options, Tools(STRICT), None, **more)
    assert grammar is not None
    return grammar


@pytest.mark.parametrize("name", list(CASES))
def test_calls_of_strict_tools_in_a_free_answer_are_held(bpe: Tokenizer, name: str) -> None:
    vocabulary = Vocabulary(bpe, name)
    grammar = strict_grammar(vocabulary)
    if name != "gpt_oss":
        assert [text for text in FREE_TEXTS if not vocabulary.takes(grammar, text)] == []
    text = MARKED.get(name, CASES[name])
    assert vocabulary.takes(grammar, text), grammar.source
    more = (
        []
        if name in ("gpt_oss", "functionary_v32")
        else [f"{text} And so on.", f"<|im_end|>{text}"]
    )
    assert [text for text in more if not vocabulary.takes(grammar, text)] == []
    for right, wrong in (("get_weather", "get_whether"), ("days", "hours"), ("2", "two")):
        assert right in text
        assert not vocabulary.takes(grammar, text.replace(right, wrong)), (right, wrong)
    # Without a strict tool nothing is held.
    assert vocabulary.forced.grammar(AUTO, Tools(TOOLS), None, opens_reasoning=False) is None


@pytest.mark.parametrize("name", list(CASES))
def test_a_random_answer_with_strict_tools_is_read_whole(bpe: Tokenizer, name: str) -> None:
    """Free text that is drawn at random, and the arguments of what calls there are in it."""
    vocabulary = Vocabulary(bpe, name)
    source = random.Random(name)
    matcher = vocabulary.matcher(strict_grammar(vocabulary))
    assert name not in MARKED or vocabulary.takes(strict_grammar(vocabulary), MARKED[name])
    begin = next(iter(vocabulary.special.values()), None)
    ids: list[int] = []
    while len(ids) < 150 and not matcher.is_stopped():
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(3, vocabulary.matching.vocab_size) if mask >> token & 1]
        if not allowed:
            break
        token = begin if begin in allowed and source.random() < 0.2 else source.choice(allowed)
        ids.append(token)
        assert matcher.consume_token(token), matcher.get_error()
    text = vocabulary.tokenizer.decode(ids, skip_special_tokens=False)
    names = {piece for kind, _, piece in parsed(name, [text]) if kind is PartKind.CALL_NAME}
    assert names <= {"get_weather", "now"} or name in BARE, text


@pytest.mark.parametrize("special", [False, True])
def test_a_marker_within_reasoning_begins_nothing(bpe: Tokenizer, special: bool) -> None:
    vocabulary = Vocabulary(bpe, "hermes")
    if not special:
        vocabulary.special.clear()
        vocabulary.tokenizer = bpe
        vocabulary.matching = LLTokenizer(bpe.to_str())
        vocabulary.forced = ForcedAnswers(vocabulary.format, THINK, {})  # type: ignore[arg-type]
    grammar = strict_grammar(vocabulary)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for text in (f"\n<think>Or {call[:20]}?</think>{call}", f"<think>a</think>b{call}c", "a<b"):
        assert vocabulary.takes(grammar, text), text
    for text in ("<think>a</think><tool_call>x", "a <tool_call>x", "<tool_call>\n{}"):
        assert not vocabulary.takes(grammar, text), text
    opened = strict_grammar(vocabulary, opens_reasoning=True)
    assert opened.after == "</think>" and vocabulary.takes(opened, f"b{call}c")


def test_one_call_where_no_more_are_wanted(bpe: Tokenizer) -> None:
    vocabulary = Vocabulary(bpe, "kimi_k2")
    grammar = strict_grammar(vocabulary, AnswerOptions(ToolChoice.AUTO, parallel_tool_calls=False))
    call = "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert vocabulary.takes(grammar, f"a{call}b") and not vocabulary.takes(grammar, call + call)


# --- gpt-oss: reasoning is a message ---

THINKS = "<|channel|>analysis<|message|>Hm, let me see.<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
FINAL = "<|channel|>final<|message|>"
SCHEMA = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object", "required": ["a"]}')


def of_messages(
    bpe: Tokenizer, options: AnswerOptions, tools: list[Any], wanted: Grammar | None = None
) -> tuple[Vocabulary, Grammar]:
    vocabulary = Vocabulary(bpe, "gpt_oss")
    grammar = vocabulary.forced.grammar(options, Tools(tools), wanted, opens_reasoning=False)
    assert grammar is not None
    return vocabulary, grammar


def test_messages_may_reason_before_a_forced_call(bpe: Tokenizer) -> None:
    vocabulary, grammar = of_messages(bpe, REQUIRED, TOOLS)
    assert vocabulary.takes(grammar, CALL) and vocabulary.takes(grammar, THINKS + CALL)
    assert not vocabulary.takes(grammar, THINKS + THINKS + CALL)
    assert not vocabulary.takes(grammar, f"{THINKS}{FINAL}No.")


def test_messages_reason_no_longer_than_their_budget(bpe: Tokenizer) -> None:
    enough = len(bpe.encode("Hm, let me see.").ids)
    call = CALL.replace("functions.now", "functions.other")
    for budget in (0, enough - 1, enough):
        options = AnswerOptions(thinking_budget=budget)
        vocabulary, grammar = of_messages(bpe, options, [])
        assert grammar.param == "thinking_token_budget"
        assert vocabulary.takes(grammar, f"{THINKS}{FINAL}Yes.") is (budget == enough)
        assert not vocabulary.takes(grammar, f"{THINKS}{THINKS}{FINAL}Yes.")
        for text in (f"{FINAL}Yes.", f"{FINAL}Yes.<|return|>", call):
            assert vocabulary.takes(grammar, text), text
        forced = AnswerOptions(ToolChoice.NAMED, "now", thinking_budget=budget)
        vocabulary, grammar = of_messages(bpe, forced, TOOLS)
        assert vocabulary.takes(grammar, THINKS + CALL) is (budget == enough)
        strict = AnswerOptions(ToolChoice.AUTO, thinking_budget=budget)
        vocabulary, grammar = of_messages(bpe, strict, STRICT)
        assert vocabulary.takes(grammar, CALL) and not vocabulary.takes(grammar, call)


def test_a_form_of_the_content_is_that_of_the_final_message(bpe: Tokenizer) -> None:
    vocabulary, grammar = of_messages(bpe, AnswerOptions(), [], SCHEMA)
    for text in (
        f'{FINAL}{{"a": 1}}',
        f'{THINKS}{FINAL}{{"a": 1}}<|return|>',
        '<|channel|>final <|constrain|>json<|message|>{"a": 1}',
    ):
        assert vocabulary.takes(grammar, text), text
    assert not vocabulary.takes(grammar, '{"a": 1}')
    assert not vocabulary.takes(grammar, f'{FINAL}{{"b": 1}}') and not vocabulary.takes(
        grammar, CALL
    )
    vocabulary, grammar = of_messages(bpe, AUTO, TOOLS, SCHEMA)
    assert vocabulary.takes(grammar, CALL) and vocabulary.takes(grammar, f'{FINAL}{{"a": 1}}')
    wanted = Grammar(GrammarKind.REGEX, "[0-9]+")
    vocabulary, grammar = of_messages(bpe, AnswerOptions(), [], wanted)
    assert (grammar.after, grammar.source) == (FINAL, "[0-9]+")
