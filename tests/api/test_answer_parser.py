"""Answers that come in parts, streamed and whole: here by a toy format with reasoning between <think>
tags and calls between <call> tags."""

import asyncio
import json
import re
from collections.abc import Sequence

import pytest
from api.fake_stack import WORDS
from pagewire.frontend.events import ParsedSseChoice, SseChoice, SseReply
from pagewire.frontend.rendering import Rendering
from pagewire.frontend.reply import Echo, Reply
from pagewire.frontend.responses import ChoiceData, formatter_for
from pagewire.frontend.sse import Flusher
from pagewire.requests.answers import (
    ContentDelta,
    Delta,
    Output,
    ReasoningDelta,
    ToolCallDelta,
    outputs_of,
)
from pagewire_protocol.columns import pack
from pagewire_protocol.messages import Deltas
from pagewire_protocol.structs import PartKind, TokenLogprobs

TAG = re.compile(r"</?think>|<call [a-z]+>|</call>")
LONGEST_TAG = len("<call lookup>")


class ToyParser:
    """Holds back what could become a tag."""

    def __init__(self) -> None:
        self._held = ""
        self._thinking = False
        self._calls = 0
        self._calling = False

    def feed(self, text: str) -> Sequence[Delta]:
        deltas: list[Delta] = []
        self._held += text
        while tag := TAG.search(self._held):
            self._take(deltas, tag.start())
            self._open_or_close(deltas, tag[0])
            self._held = self._held[len(tag[0]) :]
        bracket = self._held.rfind("<")
        may_be_tag = bracket >= 0 and len(self._held) - bracket < LONGEST_TAG
        self._take(deltas, bracket if may_be_tag else len(self._held))
        return deltas

    def finish(self) -> Sequence[Delta]:
        deltas: list[Delta] = []
        self._take(deltas, len(self._held))
        return deltas

    def _take(self, deltas: list[Delta], length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if not text:
            return
        if self._calling:
            deltas.append(ToolCallDelta(self._calls - 1, arguments=text))
        else:
            deltas.append(ReasoningDelta(text) if self._thinking else ContentDelta(text))

    def _open_or_close(self, deltas: list[Delta], tag: str) -> None:
        if tag.startswith("<call "):
            name = tag[len("<call ") : -1]
            deltas.append(ToolCallDelta(self._calls, f"call-{self._calls}", name))
            self._calls += 1
            self._calling = True
        elif tag == "</call>":
            self._calling = False
        else:
            self._thinking = tag == "<think>"


TEXT = '<think>Sums, "quoted".\n</think>It is <b>4</b>.<call add>{"a":2,"b":2}</call><call lookup>{"of":"🦙"}</call>'
CALLS = [
    {"id": "call-0", "type": "function", "function": {"name": "add", "arguments": '{"a":2,"b":2}'}},
    {
        "id": "call-1",
        "type": "function",
        "function": {"name": "lookup", "arguments": '{"of":"🦙"}'},
    },
]
MESSAGE = {
    "role": "assistant",
    "refusal": None,
    "content": "It is <b>4</b>.",
    "reasoning": 'Sums, "quoted".\n',
    "reasoning_content": 'Sums, "quoted".\n',
    "tool_calls": CALLS,
}
CUTS = [1, 2, 3, 5, 7, 11, len(TEXT)]
"""Characters in a piece of a stream."""


def rendering(*, stream: bool, chat: bool = True, **more: object) -> Rendering:
    fields = {
        "n": 1,
        "per_prompt": 1,
        "include_usage": False,
        "continuous_usage_stats": False,
        "logprobs": -1,
        "prompt_logprobs": -1,
        "return_token_ids": False,
        "ids_as_text": False,
    }
    return Rendering(chat=chat, stream=stream, **{**fields, **more})


class Loop:
    """As much of an event loop as a reply and its outlet need."""

    def create_future(self):
        return Future()


class Future:
    def __init__(self) -> None:
        self.is_set = False

    def done(self) -> bool:
        return self.is_set

    def set_result(self, result: None) -> None:
        self.is_set = True


def outputs(pieces: Sequence[str], parser: type | None) -> list[Output]:
    """What a sink gets of each piece; what comes at the end goes with the last one."""
    if parser is None:
        return list(pieces)
    toy = parser()
    rows = [list(toy.feed(piece)) for piece in pieces]
    rows[-1] += toy.finish()
    return [tuple(row) for row in rows]


def whole(text: str, parser: type | None = ToyParser, **more: object) -> dict:
    shown = rendering(stream=False, has_parts=parser is not None, **more)
    reply = Reply(formatter_for(shown, "1", "m"), Loop(), [Echo()])
    (choice,) = reply.choices
    for output in outputs([text], parser):
        choice.text(output)
    choice.finished("stop", None, 5, 2)
    return json.loads(asyncio.run(reply.body()))["choices"][0]


def streamed(pieces: Sequence[str], parser: type | None = ToyParser, **more: object) -> list[dict]:
    """The choice of every event, after those that precede the text."""
    shown = rendering(stream=True, has_parts=parser is not None, **more)
    reply = SseReply(formatter_for(shown, "1", "m"), Loop(), [Echo()], Flusher(Loop()))
    (choice,) = reply.choices
    for position, output in enumerate(outputs(pieces, parser)):
        if choice.wants_tokens:
            text = pieces[position].encode()
            choice.tokens(
                output, [position], [TokenLogprobs(0, 0, 1, (position,), (-1.0,), (text,))]
            )
        elif output:
            choice.text(output)
    choice.finished("stop", None, len(pieces), 2)
    blocks = b"".join(reply.outlet.pieces).decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks[:-2]]


def cut(text: str, length: int) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text), length)]


def joined(events: list[dict]) -> dict:
    """The message that a client puts together from a stream's deltas."""
    message = {"role": "assistant", "content": "", "refusal": None}
    message |= {"reasoning": "", "reasoning_content": ""}
    calls: list[dict] = []
    for event in events:
        delta = dict(event["delta"])
        for call in delta.pop("tool_calls", []):
            function = call["function"]
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({"id": call["id"], "type": call["type"], "function": function})
            else:
                calls[call["index"]]["function"]["arguments"] += function["arguments"]
        for name, text in delta.items():
            message[name] += text
    return {**message, "tool_calls": calls}


def test_a_whole_answer() -> None:
    choice = whole(TEXT)
    assert choice["message"] == MESSAGE
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("length", CUTS)
def test_a_stream_says_the_same_however_it_is_cut(length: int) -> None:
    events = streamed(cut(TEXT, length))
    assert joined(events) == MESSAGE
    assert events[-1]["finish_reason"] == "tool_calls"
    assert [event["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)


@pytest.mark.parametrize("length", CUTS)
def test_a_stream_with_log_probabilities_says_the_same(length: int) -> None:
    pieces = cut(TEXT, length)
    events = streamed(pieces, logprobs=0)
    assert joined(events) == MESSAGE
    tokens = [
        entry for event in events if event["logprobs"] for entry in event["logprobs"]["content"]
    ]
    assert [entry["token"] for entry in tokens] == pieces, (
        "each row's once, also of a held-back text"
    )


def test_a_call_without_content_has_null_content() -> None:
    assert whole("<call add>{}</call>")["message"]["content"] is None


def test_a_length_end_stays_one() -> None:
    formatter = formatter_for(rendering(stream=False, has_parts=True), "1", "m")
    reply = Reply(formatter, Loop(), [Echo()])
    (choice,) = reply.choices
    choice.text((ToolCallDelta(0, "x", "add"), ToolCallDelta(0, arguments="{")))
    choice.finished("length", None, 5)
    body = json.loads(asyncio.run(reply.body()))["choices"][0]
    assert body["finish_reason"] == "length"
    assert body["message"]["tool_calls"][0]["function"]["arguments"] == "{"


@pytest.mark.parametrize("pieces", [list(WORDS), ["x", "<think>x"]])
def test_without_parts_all_text_is_content(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert whole(text, None)["message"] == {
        "role": "assistant",
        "content": text,
        "refusal": None,
    }
    events = streamed(pieces, None)
    assert [event["delta"] for event in events] == [{"content": piece} for piece in pieces]


def test_only_parts_leave_the_fast_path() -> None:
    for has_parts, kind in ((False, SseChoice), (True, ParsedSseChoice)):
        formatter = formatter_for(rendering(stream=True, has_parts=has_parts), "1", "m")
        reply = SseReply(formatter, Loop(), [Echo()], Flusher(Loop()))
        assert type(reply.choices[0]) is kind


def test_reasoning_is_counted_and_may_be_left_out() -> None:
    message = whole(TEXT, include_reasoning=False)["message"]
    assert "reasoning" not in message and message["content"] == MESSAGE["content"]
    events = streamed(cut(TEXT, 3), include_reasoning=False)
    assert not any("reasoning" in event["delta"] for event in events)
    formatter = formatter_for(rendering(stream=False, has_parts=True), "1", "m")
    reply = Reply(formatter, Loop(), [Echo()])
    reply.choices[0].finished("stop", None, 5, 3)
    usage = json.loads(asyncio.run(reply.body()))["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}


def deltas(texts: tuple[str, ...], parts: list[tuple[int, int, int, str]]) -> Deltas:
    rows, kinds, calls, part_texts = zip(*parts, strict=True)
    column = pack("I", range(len(texts)))
    return Deltas(
        column,
        column,
        bytes(2 * len(column)),
        column,
        column,
        b"",
        texts,
        part_rows=pack("i", rows),
        part_kinds=bytes(kinds),
        part_calls=pack("i", calls),
        part_texts=part_texts,
    )


def test_parts_come_in_columns() -> None:
    parts = [
        (0, PartKind.REASONING, 0, "hm"),
        (2, PartKind.CONTENT, 0, "yes"),
        (2, PartKind.CALL_ID, 1, "id"),
        (2, PartKind.CALL_NAME, 1, "f"),
        (2, PartKind.ARGUMENTS, 1, "{}"),
    ]
    assert outputs_of(deltas(("", "plain", ""), parts)) == [
        (ReasoningDelta("hm"),),
        "plain",
        (ContentDelta("yes"), ToolCallDelta(1, "id", "f"), ToolCallDelta(1, arguments="{}")),
    ]
    for wrong in ((3, PartKind.CONTENT, 0, ""), (0, 9, 0, ""), (-1, PartKind.CONTENT, 0, "")):
        with pytest.raises(ValueError):
            outputs_of(deltas(("", "", ""), [wrong]))


def test_deltas_of_parallel_calls_may_alternate() -> None:
    data = ChoiceData(0)
    for delta in (
        ToolCallDelta(0, "x", "f", "{"),
        ToolCallDelta(1, "y", "g", "["),
        ToolCallDelta(0, arguments="}"),
        ToolCallDelta(1, arguments="]"),
    ):
        data.add(delta)
    assert data.tool_calls == [ToolCallDelta(0, "x", "f", "{}"), ToolCallDelta(1, "y", "g", "[]")]


@pytest.mark.parametrize("has_parts", [False, True])
def test_the_finish_reason_comes_with_the_last_text_of_each_choice(has_parts: bool) -> None:
    shown = rendering(stream=True, n=2, per_prompt=2, has_parts=has_parts)
    reply = SseReply(formatter_for(shown, "1", "m"), Loop(), [Echo()], Flusher(Loop()))
    for piece in ("a", "b"):
        for choice in reply.choices:
            choice.text((ContentDelta(piece),) if has_parts else piece)
    for choice in reply.choices:
        choice.finished("stop", None, 2)
    blocks = b"".join(reply.outlet.pieces).decode().split("\n\n")[:-2]
    events = [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks]
    seen = [(one["index"], one["delta"]["content"], one["finish_reason"]) for one in events]
    assert seen == [(0, "a", None), (1, "a", None), (0, "b", "stop"), (1, "b", "stop")]


def test_the_finish_reason_comes_alone_after_text_that_was_sent() -> None:
    formatter = formatter_for(rendering(stream=True), "1", "m")
    reply = SseReply(formatter, Loop(), [Echo()], Flusher(Loop()))
    (choice,) = reply.choices
    choice.text("a")
    reply.outlet.pieces.clear()
    choice.finished("stop", None, 1)
    block, *_ = b"".join(reply.outlet.pieces).decode().split("\n\n")
    event = json.loads(block.removeprefix("data: "))["choices"][0]
    assert event["delta"] == {} and event["finish_reason"] == "stop"
