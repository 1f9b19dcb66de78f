"""GBNF grammars match the texts that llama.cpp and xgrammar would have them match, however they cut
a text."""

import functools
import itertools
import json
import random
import re
from collections.abc import Callable

import pytest
from llguidance import LLMatcher
from pagewire.grammar import gbnf
from pagewire.grammar.errors import GrammarError
from pagewire.grammar.gbnf import lark_of_gbnf
from pagewire.grammar.vocabulary import Vocabulary
from pagewire.hub.huggingface import demo_gguf
from pagewire.tokenizer.load import load

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,3})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
Takes = Callable[[str, str], bool]


@pytest.fixture(scope="module")
def takes() -> Takes:
    """Whether a whole text matches a grammar."""
    tokenizer = load(demo_gguf()).tokenizer
    vocabulary = Vocabulary(tokenizer, 49152, (2, 0))

    @functools.cache
    def compiled(grammar: str) -> LLMatcher:
        source = LLMatcher.grammar_from_lark(lark_of_gbnf(grammar))
        return LLMatcher(vocabulary.matching, source, log_level=0)

    def takes(grammar: str, text: str) -> bool:
        matcher = compiled(grammar).deep_copy()
        assert not matcher.is_error(), f"{matcher.get_error()}\n{lark_of_gbnf(grammar)}"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return takes


MATCHES: list[tuple[str, list[str], list[str]]] = [
    (JSON, ['{"a": 1}', '{"a": [1.5e3, true, {"b": "\\u00e9\\n"}]}'], ['{"a": "\\x"}', "[]"]),
    # What a rule takes is not more than leaves something for the next one.
    (
        'root ::= name " is " [a-z]+\nname ::= [A-Za-z ]+',
        ["Bob is ok", "a is is is b"],
        ["Bob is "],
    ),
    ("root ::= n n\nn ::= [0-9]+", ["12", "1234"], ["1"]),
    ('root ::= [a-z]+ "!" | "iffy" "1"', ["iffyx!", "if!", "iffy1"], ["ifx1"]),
    # Repetitions of repetitions.
    ("root ::= ([a-c]+)?", ["", "abc"], ["d"]),
    ('root ::= ("a"{1,3}){2} ("b"*)+', ["aa", "aaaaaabb"], ["a", "aaaaaaa"]),
    ('root ::= "a"{0} "b"{,2} "c"{1,}', ["c", "bbcc"], ["ac", "bbbc", "b"]),
    # Names.
    (
        'root ::= start a-b a_b A\nstart ::= "s"\na-b ::= "-"\na_b ::= "_"\nA ::= "A"',
        ["s-_A"],
        ["s"],
    ),
    # Escapes, and characters that mean something to expressions.
    (r'root ::= "\u00e9\U0001F600\x41\t\"\\"', ['é😀A\t"\\'], ["é"]),
    (r"root ::= [\-\^\]/.*]+", ["-^]/.*"], ["a"]),
    ("root ::= [a&&b]+ [a~~c]?", ["a&b", "b~"], ["x"]),
    ("root ::= [-a] [a-] [^^]", ["--a", "a-b"], ["a-^"]),
    ("root ::= . .", ["a\n", "é😀"], ["a"]),
    ('root ::= "//" [#] "/" # a note', ["//#/"], ["//"]),
    # Line ends.
    ('\n  root ::= "a"\n    | x\n\n  x ::=\n    "b"\n    "c" |\n "d"\n', ["a", "bc", "d"], ["b"]),
    ('root ::= "a" |\r\nroot-of-all ::= "b"', ["a", ""], ["b"]),
]


@pytest.mark.parametrize(("grammar", "right", "wrong"), MATCHES)
def test_what_grammars_match(takes: Takes, grammar: str, right, wrong) -> None:
    assert [text for text in right if not takes(grammar, text)] == []
    assert [text for text in wrong if takes(grammar, text)] == []


def test_strings_of_json_are_one_lexeme() -> None:
    """They cost much where each character is one."""
    lark = lark_of_gbnf(JSON)
    assert lark.count("\nT") == 1 and '"true"' in lark


def test_how_much_is_looked_at_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters and ranges count, not nodes alone: large classes took seconds."""
    steps = 0

    def counted(ranges, real=gbnf._merged):
        nonlocal steps
        ranges = list(ranges)
        steps += len(ranges)
        return real(ranges)

    monkeypatch.setattr(gbnf, "_merged", counted)
    for classes, characters in ((75, 400), (4, 4000), (2000, 4)):
        every = [
            "".join(chr(0x4E00 + 2 * i + j % 50) for i in range(characters)) for j in range(classes)
        ]
        steps = 0
        gbnf.lark_of_gbnf("root ::= " + " ".join(f"[{one}]+" for one in every))
        assert steps < 10 * gbnf.MOST_WORK


def drawn(source: random.Random, depth: int = 0) -> tuple[str, str]:
    """A random expression as GBNF, and as an expression of Python's."""
    kind = source.randrange(7 if depth < 3 else 2)
    if kind == 0:
        text = "".join(source.choices("abc", k=source.randrange(4)))
        return json.dumps(text), f"(?:{text})"
    if kind == 1:
        ranges = source.choice(["[a-b]", "[^a]", "[c]", "[bc]"])
        return ranges, ranges
    if kind in (2, 3):
        parts = [drawn(source, depth + 1) for _ in range(source.randrange(1, 4))]
        return f"({' '.join(p for p, _ in parts)})", f"(?:{''.join(p for _, p in parts)})"
    if kind == 4:
        parts = [drawn(source, depth + 1) for _ in range(source.randrange(1, 4))]
        return f"({' | '.join(p for p, _ in parts)})", f"(?:{'|'.join(p for _, p in parts)})"
    grammar, pattern = drawn(source, depth + 1)
    times = source.choice(["*", "+", "?", "{2}", "{1,2}", "{2,}"])
    return f"({grammar}){times}", f"(?:{pattern}){times}"


@pytest.mark.parametrize("seed", range(40))
def test_a_random_grammar_matches_what_an_expression_matches(takes: Takes, seed: int) -> None:
    source = random.Random(seed)
    parts = [drawn(source) for _ in range(3)]
    rules = "\n".join(f"r{i} ::= {grammar}" for i, (grammar, _) in enumerate(parts))
    grammar = f"root ::= r0 r1 | r2 r0 | r2 r2 r1\n{rules}"
    one, two, three = (f"(?:{pattern})" for _, pattern in parts)
    pattern = re.compile(f"{one}{two}|{three}{one}|{three}{three}{two}")
    for length in range(5):
        for letters in itertools.product("abc", repeat=length):
            text = "".join(letters)
            assert takes(grammar, text) is bool(pattern.fullmatch(text)), (grammar, text)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('x ::= "a"', "no rule `root`"),
        ("root ::= x", "no rule `x`"),
        ('root ::= "a"\n\nx = "b"', "line 3: a text"),
        ('root ::= "a', "no end"),
        ("root ::= [a", "no end"),
        ("root ::= (((", "line 1: `)` should follow"),
        ("root ::= " + "(" * 100, "64 levels"),
        ('root ::= "a"' + "+" * 100, "more than 64 repetitions"),
        ('root ::= "a"{3,2}', "wrong way round"),
        ('root ::= "a"{x}', "a number should follow"),
        ('root ::= "a"{9999999999}', "too large"),
        ('root ::= "\\q"', "escape"),
        ('root ::= "\\ud83d"', "code of no character"),
        ('root ::= "\\xg1"', "code of no character"),
        ("root ::= [z-a]", "ends before it begins"),
        ("root ::= []", "no character is in the class"),
        ("root ::= 'a'", "a text, a class, a group or a name"),
    ],
)
def test_what_is_no_grammar_is_said_with_its_line(grammar: str, words: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(words)):
        lark_of_gbnf(grammar)
