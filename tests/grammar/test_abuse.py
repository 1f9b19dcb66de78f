"""Grammars that are made to cost much: each is refused, or means what it says, after a bounded amount
of processor time, which does not depend on what else runs.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pagewire.config import ModelConfig
from pagewire.grammar.child import MatcherGone, MatcherProcess
from pagewire.grammar.messages import Check, Checked, Start
from pagewire.hub.huggingface import demo_gguf
from pagewire.requests.errors import RequestError
from pagewire.requests.grammars import (
    choice_grammar,
    regex_grammar,
    schema_grammar,
    tag_grammar,
    text_grammar,
)
from pagewire_protocol.grammar import Grammar, GrammarKind

PROCESSOR_S = 2.0
"""One check of a size, of a grammar's compilation and of its first mask; most take a hundredth."""
EOS = (2, 0)


def nested(opening: str, depth: int, closing: str) -> str:
    return opening * depth + "{}" + closing * depth


def chain(length: int, end: Any) -> dict[str, Any]:
    """References, each to the next one."""
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": end}}


def doubling(depth: int) -> dict[str, Any]:
    """Each definition refers to the next one twice."""
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2}
        for i in range(depth)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{depth}": {"type": "null"}}}


SCHEMAS: dict[str, tuple[Any, str]] = {
    "1 MB of title": ({"title": "x" * 2**20}, "131072"),
    "1 MB of properties": ({"properties": {f"p{i}": {} for i in range(80_000)}}, "131072"),
    "2,000 properties": ({"properties": {f"p{i}": {} for i in range(2000)}}, "1000"),
    "900 properties": ({"properties": {f"p{i}": {"type": "string"} for i in range(900)}}, ""),
    "900 required": (
        {
            "type": "object",
            "properties": {f"p{i}": {"enum": [i]} for i in range(900)},
            "required": [f"p{i}" for i in range(900)],
        },
        "",
    ),
    "400 lists in each other": (nested('{"items":', 400, "}"), "64 levels"),
    "100,000 objects in each other": (nested('{"properties":{"a":', 20_000, "}}")[:131_000], ""),
    "60 levels": (nested('{"items":', 60, "}"), ""),
    "20,000 values": ({"enum": list(range(20_000))}, "20000"),
    "4,000 values": ({"enum": [f"value {i}" for i in range(4000)]}, ""),
    "a loop of one": ({"$ref": "#"}, "no text matches"),
    "a loop of two": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "no text matches",
    ),
    "a loop through allOf": ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, ""),
    "a loop through properties": (
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        "",
    ),
    "1,000 references": (chain(1000, {"type": "null"}), ""),
    "2 to the 40th lists": (doubling(40), ""),
    "a remote reference": ({"$ref": "http://127.0.0.1:9/schema"}, "never fetched"),
    "a file": ({"$ref": "file:///etc/passwd"}, "never fetched"),
    "a pattern of patterns": ({"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}, ""),
    "a pattern that backtracks": ({"type": "string", "pattern": "^(.*a){200}$"}, ""),
    "a long string": ({"type": "string", "minLength": 10**9, "maxLength": 10**9}, ""),
    "a long list": ({"type": "array", "items": {"type": "null"}, "minItems": 10**9}, ""),
    "a small multiple": ({"type": "number", "multipleOf": 1e-300}, ""),
    "500 alternatives of 20": (
        {"anyOf": [{"properties": {f"p{i}": {"const": j} for i in range(20)}, "type": "object"} for j in range(49)]},
        "",
    ),
    "NUL": ({"enum": ["\x00", "a\x00"]}, ""),
}  # fmt: skip
OTHERS: dict[str, tuple[Any, Any, str]] = {
    "repeated repetition": (regex_grammar, "(a{1,1000}){1,1000}", ""),
    "200 stars": (regex_grammar, "(.*a){200}", ""),
    "four repetitions": (regex_grammar, "((((a{0,50}){0,50}){0,50}){0,50})x", ""),
    "100,000 groups": (regex_grammar, "(" * 60_000 + "a" + ")" * 60_000, ""),
    "all of Unicode": (regex_grammar, r"(\p{L}|\p{N}){1,500}\p{Lu}{1,500}", ""),
    "a NUL": (regex_grammar, "a\x00b", ""),
    "too long": (regex_grammar, "a" * 200_000, "131072"),
    "5,000 choices": (choice_grammar, [f"c{i}" for i in range(5000)], "4096"),
    "4,000 choices": (choice_grammar, [f"choice {i}" for i in range(4000)], ""),
    "rules of repetitions": (text_grammar, "start: a{1,1000}\na: b{1,1000}\nb: /x(y|z)*/", ""),
    "a rule of itself": (text_grammar, "start: start", ""),
    "a rule that doubles": (text_grammar, "start: start start | /x?/", ""),
    "4,000 rules": (
        text_grammar,
        "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(4000)) + '\nr4000: "b"',
        "",
    ),
    "as many rules as fit": (
        text_grammar,
        "start: r0\n" + "\n".join(f"r{i}:r{i + 1}" for i in range(9500)) + '\nr9500: "b"',
        "",
    ),
    "5,000 rules of GBNF": (
        text_grammar,
        "root ::= r0\n" + "\n".join(f'r{i} ::= "a" r{i + 1}' for i in range(5000)),
        "500 and",
    ),
    "450 rules of GBNF": (
        text_grammar,
        "root ::= r0\n" + "\n".join(f'r{i} ::= "a" r{i + 1}' for i in range(450)) + '\nr450 ::= "b"',
        "",
    ),
    "long GBNF": (text_grammar, "root ::= " + '"a" ' * 10_000, "32768"),
    "long rules of GBNF": (
        text_grammar,
        "root ::= r0\n"
        + "\n".join(f"r{i} ::= " + f"r{i + 1} " * 25 for i in range(200))
        + '\nr200 ::= "b"',
        "",
    ),
    "GBNF of brackets": (text_grammar, "root ::= " + "(" * 20_000, "GBNF"),
    "tags of bombs": (
        tag_grammar,
        {
            "structures": [
                {"begin": f"<f{i}>", "schema": {"type": "string", "pattern": "(.*a){100}"}, "end": "</f>"}
                for i in range(200)
            ],
            "triggers": ["<f"],
        },
        "",
    ),
    "tags in tags": (
        tag_grammar,
        json.loads('{"type":"sequence","elements":[' * 30 + '{"type":"any_text"}' + "]}" * 30),
        "",
    ),
}  # fmt: skip
CASES = [
    *((name, schema_grammar, value, words) for name, (value, words) in SCHEMAS.items()),
    *((name, make, value, words) for name, (make, value, words) in OTHERS.items()),
]


class Checker:
    """The process of a tokenizer that checks grammars, or its successor where it has died."""

    def __init__(self) -> None:
        self._process: MatcherProcess | None = None
        self._keys = itertools.count(1)

    def check(self, grammar: Grammar) -> tuple[str, float]:
        """What is wrong with the grammar, and the seconds of processor time that the process took
        to find out. Raises MatcherGone."""
        if self._process is None:
            model = ModelConfig(model=str(demo_gguf()))
            self._process = MatcherProcess(Start(model, 49152, EOS))
            self._ask(Grammar(GrammarKind.REGEX, "a"))
        before = self._processor_s()
        message = self._ask(grammar)
        return message, self._processor_s() - before

    def _ask(self, grammar: Grammar) -> str:
        assert self._process is not None
        self._process.send(Check(next(self._keys), grammar))
        while True:
            self._process.wait(1.0)
            try:
                for answer in self._process.receive():
                    assert isinstance(answer, Checked)
                    return answer.message
            except MatcherGone:
                self._process = None
                raise

    def _processor_s(self) -> float:
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self._process is not None:
            self._process.close()


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    checker = Checker()
    yield checker
    checker.close()


@pytest.mark.parametrize(
    ("make", "value", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_it_costs_little_and_no_process_dies(
    checker: Checker, make: Any, value: Any, words: str
) -> None:
    began = time.thread_time()
    taken_s = 0.0
    try:
        grammar = make(value, "guided_json")
    except RequestError as error:
        refusal = str(error)
    else:
        refusal, taken_s = checker.check(grammar)
    assert time.thread_time() - began < PROCESSOR_S
    assert taken_s < PROCESSOR_S
    assert words in refusal and "\n" not in refusal
    if words:
        assert refusal
