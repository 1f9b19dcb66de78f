"""The parser of answers, over all formats: whatever the cuts, whatever the text.

PAGEWIRE_ANSWERS=10000 tries so many random outputs of each format.
"""

import json
import os
import random

import pytest
from pagewire.tokenizer.answers.format import markers_of
from pagewire.tokenizer.answers.formats import FORMATS, named_format
from pagewire.tokenizer.answers.json_text import JsonScanner
from pagewire_protocol.structs import PartKind
from tokenizer.answer_cases import CASES, THINK, WEATHER, parsed, parser_of

OUTPUTS = int(os.environ.get("PAGEWIRE_ANSWERS", "150"))
WORDS = (
    "Sure. ", "\n", "\n\n", " ", "{", "}", "[", "]", '"', ",", ":", "\\", "\\u00", "\\ud83d", "7", "-", "1e", "tru", "null",
    '{"name": "now"', ', "arguments": {', '"city"', ': "x"', "get_weather", "now", "(", ")", "=", "city=", "'", "🦙", "é",
    "functions.", "call:", "to=", "analysis", "commentary ", "final", "function", "```json\n", "<", ">", "|", "<｜", "</",
)  # fmt: skip


def cut(text: str, source: random.Random) -> list[str]:
    pieces: list[str] = []
    longest = source.choice((1, 2, 5, 20))
    while text:
        size = source.randint(1, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def output_of(name: str, source: random.Random) -> str:
    """A text that looks like the format: its own calls, changed, cut off, mixed with markers."""
    answer_format = named_format(name.strip())
    assert answer_format is not None
    fragments = (*WORDS, *markers_of(answer_format, THINK))
    case = CASES[name]
    match source.randrange(4):
        case 0:
            return "".join(source.choice(fragments) for _ in range(source.randint(1, 25)))
        case 1:
            return case[: source.randint(0, len(case))]
        case 2:
            at = source.randint(0, len(case))
            return case[:at] + source.choice(fragments) + case[at + source.randint(0, 5) :]
        case _:
            start, end = sorted(source.randint(0, len(case)) for _ in range(2))
            return case[start:end] + source.choice(fragments) + case


@pytest.mark.parametrize("name", CASES)
def test_what_a_model_writes_becomes_calls(name: str) -> None:
    parts = parsed(name, [CASES[name]])
    by_kind = {kind: [text for of, _, text in parts if of is kind] for kind in PartKind}
    assert by_kind[PartKind.CALL_NAME] == ["get_weather", "now"]
    assert [json.loads(text) for text in by_kind[PartKind.ARGUMENTS]] == [WEATHER, {}]
    assert len(set(by_kind[PartKind.CALL_ID])) == 2
    assert "".join(by_kind[PartKind.CONTENT]) == ("Sure." if "Sure." in CASES[name] else "")


@pytest.mark.parametrize("name", CASES)
def test_no_cut_changes_an_answer(name: str) -> None:
    source = random.Random(name)
    answer_format = named_format(name.strip())
    assert answer_format is not None
    hidden = parser_of(name)._hidden  # pyright: ignore[reportPrivateUsage]
    for _ in range(OUTPUTS):
        text = output_of(name, source)
        opens = source.random() < 0.2
        whole = parsed(name, [text], opens)
        assert parsed(name, cut(text, source), opens) == whole, text
        last = max((call for kind, call, _ in whole if kind is PartKind.CALL_NAME), default=-1)
        for kind, call, piece in whole:
            if kind is PartKind.CONTENT:
                assert hidden.find(piece) is None, text
            elif kind is PartKind.ARGUMENTS and call < last:
                assert isinstance(json.loads(piece), dict), text
            elif kind is PartKind.ARGUMENTS:
                scanner = JsonScanner()
                assert scanner.feed(piece)[1] == len(piece) and not scanner.broken, text


@pytest.mark.parametrize("name", CASES)
def test_a_call_that_breaks_off_keeps_what_was_said(name: str) -> None:
    """At every length: no letter of the city is lost, once it was said."""
    case = CASES[name]
    begin = case.index("São Paulo")
    for length in range(begin + 1, begin + len("São Paulo")):
        text = "".join(piece for _, _, piece in parsed(name, [case[:length]]))
        assert case[begin:length] in text


@pytest.mark.parametrize("name", CASES)
def test_a_marker_behind_a_call_that_is_cut_off_is_no_content(name: str) -> None:
    """At every length: the text is not blamed for the marker that max_tokens cut off."""
    case = CASES[name]
    answer_format = named_format(name.strip())
    assert answer_format is not None
    texts = markers_of(answer_format, THINK)
    for length in range(len(case)):
        parts = parsed(name, [case[:length]])
        content = "".join(text for kind, _, text in parts if kind is PartKind.CONTENT)
        content = content.removeprefix("Sure.").strip()
        if content and any(kind is PartKind.CALL_NAME for kind, _, _ in parts):
            assert not any(text.startswith(content) for text in texts), case[:length]


def test_reasoning_comes_before_the_answer() -> None:
    text = "<think>\nHm, <b>.\n</think>\n\nYes."
    expected = [(PartKind.CONTENT, 0, "Yes."), (PartKind.REASONING, 0, "Hm, <b>.")]
    assert parsed("hermes", list(text)) == expected
    assert parsed("hermes", [text.removeprefix("<think>")], opens_reasoning=True) == expected
    # Without an end all of it is reasoning; and only a call's own markers begin one.
    assert parsed("hermes", ["Hm <tool_call>"], opens_reasoning=True) == [
        (PartKind.REASONING, 0, "Hm <tool_call>")
    ]


def test_text_that_keeps_to_no_format_is_content() -> None:
    for name in (item.name for item in FORMATS):
        text = 'Just "text", {"with": ["JSON"]}, a < b and b > c.\n'
        assert parsed(name, list(text)) == [(PartKind.CONTENT, 0, text)]
    assert parsed("hermes", ["<tool_call>nonsense</tool_call>"]) == [
        (PartKind.CONTENT, 0, "nonsense")
    ]
    # JSON that is an answer and no call of a known tool.
    for text in ('{"name": "Ada", "arguments": 1}', '{"answer": 5}', "[1, 2]", "[f(x)]"):
        assert parsed("llama3_json", list(text)) == [(PartKind.CONTENT, 0, text)]
        assert parsed("pythonic", list(text)) == [(PartKind.CONTENT, 0, text)]


def test_arguments_have_the_types_of_the_schema() -> None:
    def arguments(*values: str) -> dict[str, object]:
        body = "".join(f"<parameter={value}\n</parameter>\n" for value in values)
        parts = parsed("qwen3_coder", [f"<function=get_weather>\n{body}</function>"])
        return json.loads(parts[-1][2])

    assert arguments("zip>\n7", "days>\n7") == {"zip": "7", "days": 7}
    assert arguments('options>\n{"a": [1]}', "unknown>\n1.5") == {
        "options": {"a": [1]},
        "unknown": 1.5,
    }
    assert arguments('city>\nSay "hi"\nin\t\\two lines') == {"city": 'Say "hi"\nin\t\\two lines'}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ('{"a": "1\n2"}', {"a": "1\n2"}),
        (r'{"a": "\d+\'s"}', {"a": r"\d+'s"}),
        ('{"a": [1, 2,], }', {"a": [1, 2]}),
        ('{"a": {"b": tru!!}}', {"a": {"b": None}}),
        ('{"a": 01}', {"a": None}),
        ('{"a" "b"}', {"a": None}),
    ],
)
def test_broken_json_is_mended(said: str, meant: object) -> None:
    text = f'<tool_call>{{"name": "now", "arguments": {said}}}</tool_call>'
    arguments = [piece for kind, _, piece in parsed("hermes", [text]) if kind is PartKind.ARGUMENTS]
    assert json.loads("".join(arguments)) == meant
