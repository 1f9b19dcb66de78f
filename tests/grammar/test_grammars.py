"""Grammars with the demo model's vocabulary: what each form takes and refuses, and the matchers of
the process, without the process."""

import json
import lzma
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from pagewire.config import ModelConfig
from pagewire.grammar.compiler import Compiler
from pagewire.grammar.errors import GrammarError
from pagewire.grammar.matchers import Matchers
from pagewire.grammar.messages import mask_words
from pagewire.grammar.vocabulary import Vocabulary, load_vocabulary
from pagewire.hub.huggingface import demo_gguf
from pagewire.requests.errors import RequestError
from pagewire.requests.grammars import json_rule, schema_grammar
from pagewire.tokenizer.load import load
from pagewire_protocol.grammar import MAX_CHOICES, Grammar, GrammarKind

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PERSON = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TAG = {
    "type": "tag",
    "begin": "<f>",
    "content": {"type": "json_schema", "json_schema": PERSON},
    "end": "</f>",
}


class Bench:
    def __init__(self) -> None:
        self.tokenizer = load(demo_gguf()).tokenizer
        self.vocabulary = Vocabulary(self.tokenizer, 49152, (2, 0))
        self.compiler = Compiler(self.vocabulary)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def takes(self, grammar: Grammar, text: str) -> bool:
        """Whether the whole text matches."""
        matcher = self.compiler.matcher(grammar)
        ids = self.ids(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def tags(form: dict[str, Any]) -> Grammar:
    return Grammar(GrammarKind.STRUCTURAL_TAG, json.dumps(form))


def schema(value: Any, **options: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value), **options)


OLDER = tags(
    {
        "structures": [
            {"begin": "<f>", "schema": PERSON, "end": "</f>"},
            {"begin": "<|im_start|>x", "schema": PERSON, "end": "!"},
        ],
        "triggers": ["<f", "<|im_start|>"],
    }
)
ALLOWS_EVERYTHING = {
    "items": {"not": False},
    "uniqueItems": False,
    "unevaluatedItems": {},
    "unevaluatedProperties": True,
    "propertyNames": True,
    "dependentRequired": {},
    "dependentSchemas": {},
}
MATCHES: list[tuple[Grammar, list[str], list[str]]] = [
    (
        schema(PERSON),
        ['{"a":1}', '{"a": 1}', '{\n  "a": 1\n}'],
        ['{"a":\n\n\n\n\n1}', '{"a":1,"b":2}', '{"a":"1"}', "{}", '{"a":1} '],
    ),
    (schema(PERSON, whitespace=""), ['{"a":1}'], ['{"a": 1}']),
    (schema(True), ["[]", "1", '"x"'], ["x"]),
    (schema({"properties": {"a": {}}}), ['{"a":1,"b":2}'], []),
    (schema({"properties": {"a": {}}}, additional_properties=False), ['{"a":1}'], ['{"b":2}']),
    (schema({"type": "string", "format": "of-their-own"}), ['"x"'], ["x"]),
    (schema({"type": "string", "format": "date"}), ['"2024-02-03"'], ['"x"']),
    (schema({"type": "string", "not": {}}, lenient=True), ['"x"'], ["1"]),
    (
        schema({"type": "integer", "minimum": -(2**63), "exclusiveMaximum": 2**64}),
        ["-9223372036854774784", "0", "9223372036854774783"],
        ["-9223372036854775809", "18446744073709551616"],
    ),
    (
        schema({"type": "number", "exclusiveMinimum": -1.8e308, "maximum": 3.4e38}),
        ["-1.5", "0", "1234567890123456789"],
        ["1e309", "x"],
    ),
    (
        schema(ALLOWS_EVERYTHING),
        ["[1, 1]"],
        ["[1"],
    ),
    (
        schema({"type": "object", "x-guidance": {"whitespace_pattern": "x+", "lenient": True}}),
        ['{"a": 1}'],
        ['{x"a":1}'],
    ),
    (Grammar(GrammarKind.JSON_OBJECT), ["{}", '{"a": [1]}'], ["[]", "1"]),
    (Grammar(GrammarKind.REGEX, r"\d{3}/\w+\s?"), ["123/ab ", "123/x"], ["12/x", "１23/a", "123/é"]),
    (Grammar(GrammarKind.REGEX, "^abc$"), ["abc"], ["abcd", "ab"]),
    (Grammar(GrammarKind.REGEX, "a\nb"), ["a\nb"], ["ab"]),
    (Grammar(GrammarKind.CHOICE, '["yes","no\\n\\"x"]'), ["yes", 'no\n"x'], ["no", "yess"]),
    (Grammar(GrammarKind.CHOICE, json.dumps(["a\x7f\0\\"])), ["a\x7f\0\\"], ["a"]),
    (
        Grammar(GrammarKind.CHOICE, json.dumps([f"v{number}" for number in range(MAX_CHOICES)])),
        ["v0", "v40", "v4095"],
        ["v", "v4096", "v00"],
    ),
    (Grammar(GrammarKind.GBNF, 'root ::= "a" b*\nb ::= [0-9] | "x"'), ["a", "a1x"], ["b", "ax!"]),
    (Grammar(GrammarKind.LARK, 'start: "a" b\nb: /[0-9]+/'), ["a12"], ["a", "12"]),
    (
        # A name that is a special token elsewhere stands for its text; strings stay.
        Grammar(GrammarKind.LARK, 'start: <tool_call> "<x>" /<y>/ %json {"const":"<z>"}'),
        ['<tool_call><x><y>"<z>"'],
        ["<tool_call><x>"],
    ),
    (
        Grammar(GrammarKind.LARK, f"start: <|im_start|> body\nbody: {json_rule(PERSON, 'p')}"),
        ['<|im_start|>{"a": 1}'],
        ['{"a": 1}', '<|im_start|>{"a":\n\n\n\n\n1}'],
    ),
    (
        OLDER,
        ["hello", 'x <f>{"a": 1}</f> and', 'q <|im_start|>x{"a":1}! more', "x <g>"],
        ['x <f>{"a": "x"}</f>', "x<f>", "q <|im_start|>y"],
    ),
    (
        tags({"format": {"type": "triggered_tags", "triggers": ["<f"], "tags": [TAG], "at_least_one": True}}),
        ['x <f>{"a": 1}</f> and'],
        ["x"],
    ),
    (
        tags({"format": {"type": "triggered_tags", "triggers": ["<f"], "tags": [TAG], "stop_after_first": True}}),
        ["x", 'x <f>{"a": 1}</f>'],
        ['x <f>{"a": 1}</f> and'],
    ),
    (
        tags({"format": {"type": "tags_with_separator", "tags": [TAG], "separator": ","}}),
        ["", '<f>{"a": 1}</f>', '<f>{"a": 1}</f>,<f>{"a": 2}</f>'],
        ["x", '<f>{"a": 1}</f><f>{"a": 2}</f>'],
    ),
    (
        tags({"format": {"type": "or", "elements": [{"type": "const_string", "value": "x"}, {"type": "regex", "pattern": "a/b+"}]}}),
        ["x", "a/bb"],
        ["y"],
    ),
    (tags({"format": {"type": "regex", "pattern": r"\d\/[a-z]"}}), ["1/x"], ["１/x", "1\\/x"]),
    (
        tags({"format": {"type": "any_text", "excludes": ["bad", "a/b\n"]}}),
        ["good\nab", "ba d"],
        ["is bad.", "x a/b\n"],
    ),
    (
        tags({"format": {"type": "triggered_tags", "triggers": ["<f"], "tags": [TAG], "excludes": ["no"]}}),
        ['x <f>{"a": 1}</f> and', "x"],
        ['no <f>{"a": 1}</f>', '<f>{"a": 1}</f> no'],
    ),
    (
        tags({"format": {**TAG, "content": {"type": "any_text", "excludes": ["no"]}, "end": ["</f>", "!"]}}),
        ["<f>yes!", "<f></f>"],
        ["<f>no!", "<f>yes"],
    ),
    (
        tags({"format": {"type": "json_schema", "json_schema": PERSON, "style": "json"}}),
        ['{"a":1}'],
        ["x"],
    ),
    (
        tags({"format": None, "structures": [{"begin": "<f", "schema": None, "end": None}], "triggers": ["<f"]}),
        ["x", "x<f{}"],
        ["x<fx"],
    ),
    (
        tags({"format": {"type": "sequence", "elements": [
            {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
            {"type": "json_schema", "json_schema": PERSON},
        ]}}),
        ['<think>abc</think>{"a":1}'],
        ['{"a":1}', "<think>abc</think> x"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "right", "wrong"), MATCHES, ids=lambda v: str(v)[:60])
def test_what_each_form_takes(bench: Bench, grammar: Grammar, right, wrong) -> None:
    assert [text for text in right if not bench.takes(grammar, text)] == []
    assert [text for text in wrong if bench.takes(grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (schema({"not": {}, "if": {}}), '"if", "not"'),
        (schema({"uniqueItems": True, "propertyNames": False}), '"propertyNames", "uniqueItems"'),
        (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "with `strict` false"),
        (schema({"$ref": "#"}), "no text matches"),
        (schema({"$ref": "http://a.b/c"}), "never fetched"),
        (schema({"type": "string", "format": "iri"}), "this format is not supported: iri"),
        (schema(False), "must be an object"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "no JSON"),
        (Grammar(GrammarKind.REGEX, "(?=x)"), "look-around"),
        (Grammar(GrammarKind.REGEX, ".{0,50}" * 100), "takes too much"),
        (schema(PERSON, whitespace="("), "`whitespace_pattern`: regex"),
        (schema({"not": {}}, whitespace=" ?"), '"not"'),
        (Grammar(GrammarKind.CHOICE, "[]"), "one string or more"),
        (Grammar(GrammarKind.GBNF, "root ::= ((("), "GBNF"),
        (Grammar(GrammarKind.LARK, "start: x"), "x"),
        (tags({}), "structures"),
        (tags({"format": {"type": "strange"}}), "strange"),
        (tags({"structures": [{"begin": "x"}], "triggers": ["y"]}), "start with"),
        (tags({"format": {"type": "json_schema", "json_schema": {}, "style": "xml"}}), "`style`"),
        (tags({"format": {"type": "any_text", "excludes": [""]}}), "`excludes`"),
        (tags({"format": {"type": "regex", "pattern": "a\\"}}), "single backslash"),
        (Grammar(GrammarKind.REGEX, "a\\"), "single backslash"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_grammar_is_said_in_one_line(bench: Bench, grammar: Grammar, words) -> None:
    for _ in range(2):  # the outcome is kept
        with pytest.raises(GrammarError) as caught:
            bench.compiler.compiled(grammar)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_lenient_schema_does_not_hold_is_named(bench: Bench) -> None:
    value = {
        "type": "object",
        "properties": {
            "a": {"if": {}, "not": {}},
            "b": {"not": {}, "format": "iri", "type": "string"},
            "c": {"oneOf": [{"type": "string"}, {"minLength": 2}]},
        },
    }
    ignored = bench.compiler.compiled(schema(value, lenient=True)).ignored
    assert ignored == ("Unknown format: iri", "if", "not", "oneOf (held as anyOf)")
    assert bench.compiler.compiled(schema(PERSON, lenient=True)).ignored == ()


def matchers_of(bench: Bench, rows: int) -> tuple[Matchers, np.ndarray]:
    masks = np.zeros((rows, mask_words(49152)), np.uint32)
    return Matchers(bench.vocabulary, bench.compiler, masks), masks


def allowed(masks: np.ndarray, row: int) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(masks[row].view(np.uint8), bitorder="little"))


def test_an_output_is_free_up_to_the_text_after_which_a_grammar_begins(bench: Bench) -> None:
    matchers, masks = matchers_of(bench, 2)
    grammar = schema(PERSON, after="</think>")
    matchers.open(7, 1, grammar, bench.ids("Hm, a < b"))
    assert not matchers.write(7)
    assert len(allowed(masks, 1)) == 49152 - 2 and not {0, 2} & set(allowed(masks, 1).tolist())
    rest = [*bench.ids(" so </thi"), *bench.ids("nk>")]
    matchers.advance([7] * len(rest), rest)
    assert not matchers.write(7)
    assert matchers.position(7) == len(bench.ids("Hm, a < b")) + len(rest)
    assert {bench.vocabulary.raw[token] for token in allowed(masks, 1)} == {b"{", b'{"'}
    matchers.advance([7] * 6, bench.ids('{"a":12}'))
    assert not matchers.write(7)
    assert allowed(masks, 1).tolist() == [0, 2] and not masks[0].any()


@pytest.mark.parametrize("rows", [3, 12])
def test_walks_by_masks_are_valid_and_can_be_taken_up_anywhere(bench: Bench, rows: int) -> None:
    grammar = schema({"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3})
    matchers, masks = matchers_of(bench, rows)
    make = Random(rows)
    outputs: dict[int, list[int]] = {key: [] for key in range(rows)}
    for key in outputs:
        matchers.open(key, rows - 1 - key, grammar, [])
    live = list(outputs)
    while live:
        assert not any(map(matchers.write, live))
        assert [matchers.position(key) for key in live] == [len(outputs[key]) for key in live]
        drawn = {key: make.choice(allowed(masks, rows - 1 - key).tolist()) for key in live}
        # Digits may go on for ever.
        for key in live:
            ending = [t for t in allowed(masks, rows - 1 - key) if b"}" in bench.vocabulary.raw[t]]
            if len(outputs[key]) > 60 and ending:
                drawn[key] = int(ending[0])
        matchers.advance(list(drawn), list(drawn.values()))
        for key, token in drawn.items():
            outputs[key].append(token)
        if make.random() < 0.3:
            moved = make.choice(live)
            matchers.close(moved)
            matchers.open(moved, rows - 1 - moved, grammar, outputs[moved])
        live = [key for key in live if outputs[key][-1] not in (0, 2)]
    for output in outputs.values():
        value = json.loads(b"".join(bench.vocabulary.raw[token] for token in output[:-1]))
        assert 1 <= len(value) <= 3 and all(isinstance(part["a"], int) for part in value)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar(GrammarKind.CHOICE, '["a<|im_end|>b"]'), "a<|im_end|>b"),
        (Grammar(GrammarKind.REGEX, r"a<\|im_start\|>"), "a<|im_start|>"),
        (schema({"const": "x<|im_end|>"}), '"x<|im_end|>"'),
    ],
)
def test_the_name_of_a_special_token_is_written_as_text(
    bench: Bench, grammar: Grammar, text: str
) -> None:
    matchers, masks = matchers_of(bench, 1)
    matchers.open(1, 0, grammar, [])
    written: list[int] = []
    while not written or written[-1] not in bench.vocabulary.eos:
        assert not matchers.write(1)
        token = int(allowed(masks, 0)[0])
        matchers.advance([1], [token])
        written.append(token)
    assert bench.vocabulary.special.isdisjoint(written[:-1])
    assert b"".join(bench.vocabulary.raw[token] for token in written[:-1]).decode() == text


def test_a_model_without_text_or_fixed_tokens_says_so() -> None:
    with pytest.raises(GrammarError, match="--skip-tokenizer-init"):
        load_vocabulary(ModelConfig(skip_tokenizer_init=True), 100, ())


# --- the data beside the project ---


def _judge(bench: Bench, value: Any, tests: list[dict[str, Any]]) -> tuple[str, int]:
    """How a schema is taken, and how many of its invalid instances are."""
    try:
        grammar = schema_grammar(value, "json")
        bench.compiler.compiled(grammar)
    except (GrammarError, RequestError):
        return "refused", 0
    texts = [json.dumps(test["data"], ensure_ascii=False) for test in tests if not test["valid"]]
    return "taken", sum(bench.takes(grammar, text) for text in texts)


def test_no_invalid_instance_of_the_json_schema_test_suite_is_taken(bench: Bench) -> None:
    folder = DATA / "json-schema-test-suite" / "tests" / "draft2020-12"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    groups = [g for file in sorted(folder.glob("*.json")) for g in json.loads(file.read_text())]
    outcomes = [_judge(bench, group["schema"], group["tests"]) for group in groups]
    assert sum(wrong for _, wrong in outcomes) == 0
    assert sum(outcome == "taken" for outcome, _ in outcomes) >= 160


def test_no_invalid_instance_of_maskbench_is_taken(bench: Bench) -> None:
    """A sample; bench/structured.py has all of it."""
    file = DATA / "maskbench-1000.jsonl.xz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with lzma.open(file, "rt") as lines:
        entries = [json.loads(line) for line in lines][::20]
    outcomes = [_judge(bench, entry["schema"], entry["tests"]) for entry in entries]
    assert sum(wrong for _, wrong in outcomes) == 0
    assert sum(outcome == "taken" for outcome, _ in outcomes) >= 0.75 * len(entries)
