"""What a prompt is worth to the model: echo, its log-probabilities in OpenAI's and in vLLM's shape,
whole and streamed.

The scripted stack cuts text at spaces, gives token i of a prompt the log-probability -i and the
rank i, and has the ids 7, 8, ... as its likeliest tokens, at -0.25, -0.5, ...
"""

import asyncio
import json

import msgspec
import pytest
from api.checks import refused
from api.fake_stack import FIRST_WORD, expected, word
from pagewire.frontend.events import SseReply
from pagewire.frontend.logprobs import chat_logprobs, completion_logprobs
from pagewire.frontend.rendering import Rendering
from pagewire.frontend.reply import Echo, Reply
from pagewire.frontend.responses import formatter_for
from pagewire.frontend.sse import Flusher
from pagewire_protocol.columns import unpack
from pagewire_protocol.structs import TokenLogprobs

TEXT = "one two three"


def test_echo(server) -> None:
    (choice,) = server.complete(TEXT, echo=True, max_tokens=3).json()["choices"]
    assert choice["text"] == TEXT + expected(3) and choice["logprobs"] is None
    assert server.stack.generates()[0].prompt.text == TEXT


def test_echo_of_several_prompts_and_choices(server) -> None:
    body = server.complete(["a", "b"], n=2, echo=True, max_tokens=2).json()
    assert [choice["text"] for choice in body["choices"]] == [
        p + expected(2) for p in ("a", "a", "b", "b")
    ]


def test_echo_of_ids_is_their_text(server) -> None:
    (choice,) = server.complete([100, 101, 7], echo=True, max_tokens=1).json()["choices"]
    assert choice["text"] == word(0) + word(1) + "<7>" + expected(1)


def test_echo_of_what_is_left_of_a_truncated_prompt(server) -> None:
    (choice,) = server.complete(TEXT, echo=True, max_tokens=1, truncate_prompt_tokens=2).json()[
        "choices"
    ]
    assert choice["text"] == " two three" + expected(1)
    (generate,) = server.stack.generates()
    assert len(generate.prompt.ids) == 8 and generate.text.truncate_prompt == 0
    (choice,) = server.complete(
        [5] * 20 + [7] * 4088, echo=True, max_tokens=8, truncate_prompt_tokens=-1
    ).json()["choices"]
    assert choice["text"] == "<7>" * 4088 + expected(8)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_a_prompt(server, max_tokens: int) -> None:
    body = server.complete(TEXT, echo=True, logprobs=1, max_tokens=max_tokens).json()
    (choice,) = body["choices"]
    assert choice["text"] == TEXT + expected(max_tokens) and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["one", " two", " three", *[word(0)][:max_tokens]]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, *[-0.5][:max_tokens]]
    assert choice["logprobs"]["text_offset"] == [0, 3, 7, 13][: 3 + max_tokens]
    assert choice["logprobs"]["top_logprobs"][:3] == [
        None,
        {"<7>": -0.25, " two": -1.0},
        {"<7>": -0.25, " three": -2.0},
    ]
    assert len(choice["logprobs"]["top_logprobs"]) == 3 + max_tokens
    assert body["usage"]["completion_tokens"] == max_tokens
    assert choice["prompt_logprobs"] is None


def test_scoring_without_candidates(server) -> None:
    (choice,) = server.complete([7, 8], echo=True, logprobs=0, max_tokens=0).json()["choices"]
    assert choice["logprobs"] == {
        "text_offset": [0, 3],
        "token_logprobs": [None, -1.0],
        "tokens": ["<7>", "<8>"],
        "top_logprobs": [None, {"<8>": -1.0}],
    }


def test_a_prompt_of_one_token_has_nothing_to_score(server) -> None:
    (choice,) = server.complete("one", echo=True, logprobs=1, max_tokens=0).json()["choices"]
    assert choice["logprobs"] == {
        "text_offset": [0],
        "token_logprobs": [None],
        "tokens": ["one"],
        "top_logprobs": [None],
    }


def test_choices_share_the_score_of_their_prompt(server) -> None:
    body = server.complete(
        ["one two", "three four five"], n=2, echo=True, logprobs=0, max_tokens=1
    ).json()
    assert [choice["logprobs"]["token_logprobs"] for choice in body["choices"]] == [
        [None, -1.0, -0.5]
    ] * 2 + [[None, -1.0, -2.0, -0.5]] * 2
    assert sorted(generate.sampling.prompt_logprobs for generate in server.stack.generates()) == [
        -1,
        -1,
        0,
        0,
    ]


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_streamed_score_comes_first(server, max_tokens: int) -> None:
    options = {"include_usage": True}
    body = {
        "prompt": TEXT,
        "echo": True,
        "logprobs": 1,
        "max_tokens": max_tokens,
        "n": 2,
        "stream_options": options,
    }
    events = server.events("/v1/completions", **body)
    assert events.pop()["usage"]["completion_tokens"] == 2 * max_tokens
    for index in range(2):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == TEXT + expected(max_tokens)
        assert mine[0]["text"] == TEXT and mine[0]["logprobs"]["token_logprobs"] == [
            None,
            -1.0,
            -2.0,
        ]
        assert [choice["logprobs"]["text_offset"] for choice in mine[1:] if choice["text"]] == [
            [13],
            [18],
        ][:max_tokens]
        assert mine[-1]["finish_reason"] == "length"


def test_a_streamed_echo_comes_first(server) -> None:
    events = server.events("/v1/completions", prompt=[100, 101], echo=True, max_tokens=2)
    assert [event["choices"][0]["text"] for event in events] == [
        word(0) + word(1),
        word(0),
        word(1),
    ]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prompt_logprobs(server, path: str) -> None:
    chat = path.endswith("chat/completions")
    asked = {"messages": [{"role": "user", "content": "two three"}]} if chat else {"prompt": TEXT}
    body = server.post(path, **asked, prompt_logprobs=1, max_tokens=1).json()
    rows = body["prompt_logprobs"] if chat else body["choices"][0]["prompt_logprobs"]
    assert rows[0] is None and len(rows) == 3
    told = [
        (int(own), row[own]["logprob"], row[own]["rank"])
        for row in rows[1:]
        for own in row
        if int(own) >= FIRST_WORD
    ]
    assert [(logprob, rank) for _, logprob, rank in told] == [(-1.0, 1), (-2.0, 2)]
    assert [
        row[str(own)]["decoded_token"] for row, (own, _, _) in zip(rows[1:], told, strict=True)
    ] == [" two", " three"]
    assert all(
        row["7"] == {"logprob": -0.25, "rank": 1, "decoded_token": "<7>"} for row in rows[1:]
    )


def test_prompt_logprobs_beside_a_scored_echo(server) -> None:
    (choice,) = server.complete(
        [8, 9], echo=True, logprobs=0, prompt_logprobs=2, max_tokens=0
    ).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"<9>": -1.0}]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "9": {"logprob": -1.0, "rank": 1, "decoded_token": "<9>"},
            "7": {"logprob": -0.25, "rank": 1, "decoded_token": "<7>"},
            "8": {"logprob": -0.5, "rank": 2, "decoded_token": "<8>"},
        },
    ]
    (choice,) = server.complete([8, 7], prompt_logprobs=1, max_tokens=1).json()["choices"]
    assert list(choice["prompt_logprobs"][1]) == ["7"], (
        "a token that is also the likeliest is told once"
    )
    (choice,) = server.complete([8, 9], max_tokens=1).json()["choices"]
    assert choice["prompt_logprobs"] is None


def test_prompt_logprobs_and_streams(server) -> None:
    refused(server.complete(TEXT, prompt_logprobs=0, stream=True), "prompt_logprobs", "stream=True")


def test_a_resumed_request_tells_its_score_once(server) -> None:
    (choice,) = server.complete("lost two three", prompt_logprobs=0, max_tokens=5).json()["choices"]
    assert len(server.stack.generates()) == 2
    assert [
        row and [one["logprob"] for one in row.values()] for row in choice["prompt_logprobs"]
    ] == [None, [-1.0], [-2.0]]


def test_tokens_by_id(server) -> None:
    (choice,) = server.complete(
        [7, 8], echo=True, logprobs=1, max_tokens=1, return_tokens_as_token_ids=True
    ).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:7", "token_id:8", "token_id:100"]
    assert choice["logprobs"]["top_logprobs"][1] == {"token_id:7": -0.25, "token_id:8": -1.0}
    (choice,) = server.chat(
        "hi", logprobs=True, top_logprobs=1, max_tokens=1, return_tokens_as_token_ids=True
    ).json()["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert (
        entry["token"] == "token_id:100"
        and entry["top_logprobs"][0]["token"] == "token_id:0"
        and bytes(entry["bytes"]) == b"Hello"
    )
    events = server.events(
        "/v1/completions", prompt="hi", max_tokens=2, logprobs=0, return_tokens_as_token_ids=True
    )
    assert [e["choices"][0]["logprobs"]["tokens"] for e in events[:2]] == [
        ["token_id:100"],
        ["token_id:101"],
    ]
    assert events[1]["choices"][0]["logprobs"]["text_offset"] == [len(word(0))]


# --- chats ---

CONTINUED = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "Well: "}]


def test_a_chat_echoes_the_message_that_it_continues(server) -> None:
    options = {
        "messages": CONTINUED,
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_tokens": 2,
    }
    for echo, opening in ((True, "Well: "), (False, "")):
        (choice,) = server.post("/v1/chat/completions", **options, echo=echo).json()["choices"]
        assert choice["message"]["content"] == opening + expected(2)
        events = server.events("/v1/chat/completions", **options, echo=echo)
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(
            event["choices"][0]["delta"].get("content", "") for event in events
        ) == opening + expected(2)


def test_the_role_of_an_answer_without_a_generation_prompt_is_the_last_one_s(server) -> None:
    (choice,) = server.chat("hi", add_generation_prompt=False, echo=True, max_tokens=1).json()[
        "choices"
    ]
    assert choice["message"]["role"] == "user"
    assert choice["message"]["content"] == "hi" + expected(1)
    (choice,) = server.chat("hi", echo=True, max_tokens=1).json()["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == expected(1)


def test_scoring_without_a_tokenizer(serve) -> None:
    with serve(has_text=False, has_chat_template=False) as server:
        (choice,) = server.complete([7, 8], echo=True, logprobs=0, max_tokens=0).json()["choices"]
        assert choice["logprobs"]["tokens"][0] == "token_id:7" and choice["text"] == ""
        refused(server.complete("text"), "prompt", "--skip-tokenizer-init")


def test_the_ids_of_an_echoed_prompt_are_those_of_its_text(server) -> None:
    server.complete(TEXT, echo=True, logprobs=0, max_tokens=0, add_special_tokens=False)
    ids = unpack("i", server.stack.generates()[0].prompt.ids).tolist()
    assert [server.stack.words.text(one) for one in ids] == ["one", " two", " three"]


# --- names of tokens


def entry(*candidates: tuple[int, bytes], offset: int = 0) -> TokenLogprobs:
    ids, texts = zip(*candidates, strict=True)
    values = tuple(-float(n + 1) for n in range(len(ids)))
    return TokenLogprobs(0, 0, 1, ids, values, texts, offset)


def as_json(form, *arguments):
    """What a client reads of it."""
    return json.loads(msgspec.json.encode(form(*arguments)))


def test_candidates_that_are_spelt_alike_are_all_there() -> None:
    """The token itself comes first and is among the likeliest too; another has the same bytes, and a
    third no text."""
    form = as_json(
        completion_logprobs,
        [entry((5, b"A"), (9, b"A"), (5, b"A"), (7, b"A"), (8, b"\xf0\x9f"), (6, b""))],
    )
    assert form["top_logprobs"] == [
        {
            "A": -1.0,
            r"bytes:\x41": -2.0,
            "token_id:7": -4.0,
            r"bytes:\xf0\x9f": -5.0,
            "token_id:6": -6.0,
        }
    ]
    assert form["tokens"] == ["A"]


def test_parts_of_characters_are_named_by_their_bytes() -> None:
    parts = [entry((1, b"\xf0\x9f")), entry((2, b"\x98\x80"))]
    assert completion_logprobs(parts)["tokens"] == [r"bytes:\xf0\x9f", r"bytes:\x98\x80"]
    content = as_json(chat_logprobs, parts)["content"]
    assert [token["token"] for token in content] == [r"bytes:\xf0\x9f", r"bytes:\x98\x80"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == "😀"


def test_what_a_stop_string_cut_off_begins_at_the_end() -> None:
    entries = [entry((1, b"ab")), entry((2, b"cd"), offset=2), entry((3, b"ef"), offset=4)]
    assert completion_logprobs(entries, 10, length=13)["text_offset"] == [10, 12, 13]
    assert completion_logprobs(entries, 10)["text_offset"] == [10, 12, 14]


Row = tuple[str, list[tuple[bytes, int]]]
"""The text that a row brings, and its tokens, each with where it begins."""
HELD: list[Row] = [("ab", [(b"ab", 0)]), ("", [(b"x", 2)]), ("", [(b"y", 3)])]
"""A text of which the end may become the stop string xyz."""
ROWS: dict[str, tuple[list[Row], str, list[int]]] = {
    # rows, text, where its tokens begin
    "cut off": ([*HELD, ("", [(b"z", 4)])], "ab", [0, 2, 2, 2]),
    "shown": ([*HELD, ("xyc", [(b"c", 4)])], "abxyc", [0, 2, 3, 4]),
    "shown at the end": ([*HELD, ("xy", [])], "abxy", [0, 2, 3]),
    "half of it shown": ([*HELD, ("xyc", [(b"c", 4), (b"xyz", 5)])], "abxyc", [0, 2, 3, 4, 5]),
    "one row": ([("ab", [(b"ab", 0), (b"x", 2), (b"yz", 3)])], "ab", [0, 2, 2]),
    "characters in pieces": (
        [
            ("", [(b"\xe4", 0)]),
            ("", [(b"\xbd", 0)]),
            ("\u4f60", [(b"\xa0", 0)]),
            ("!", [(b"!", 1)]),
        ],
        "\u4f60!",
        [0, 0, 0, 1],
    ),
}


def played(rows: list[Row], stream: bool, echo: str) -> list[dict]:
    """The choices of the answer's events, or its only one."""
    loop = asyncio.new_event_loop()
    try:
        rendering = Rendering(
            chat=False,
            n=1,
            per_prompt=1,
            stream=stream,
            include_usage=False,
            continuous_usage_stats=False,
            logprobs=0,
            prompt_logprobs=-1,
            return_token_ids=True,
            ids_as_text=False,
            echo=bool(echo),
        )
        formatter = formatter_for(rendering, "1", "m")
        echoes = [Echo(echo)]
        reply = (
            SseReply(formatter, loop, echoes, Flusher(loop))
            if stream
            else Reply(formatter, loop, echoes)
        )
        (choice,) = reply.choices
        choice.score = None
        for text, tokens in rows:
            entries = [entry((ord(raw[:1]), raw), offset=offset) for raw, offset in tokens]
            choice.tokens(text, [one.ids[0] for one in entries], entries)
        choice.finished("stop", None, 4)
        if isinstance(reply, SseReply):
            blocks = b"".join(reply.outlet.pieces).decode().split("\n\n")[:-2]
            return [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks]
        return json.loads(loop.run_until_complete(reply.body()))["choices"]
    finally:
        loop.close()


@pytest.mark.parametrize("echo", ["", "Hello "])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ROWS)
def test_offsets_of_text_that_is_held_back(case: str, stream: bool, echo: str) -> None:
    """A token is shown when it is certain where it begins: what a stop string cuts off begins at the
    end of the text."""
    rows, text, offsets = ROWS[case]
    choices = played(rows, stream, echo)
    assert "".join(choice["text"] for choice in choices) == ("" if stream else echo) + text
    shown = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [at for one in shown for at in one["text_offset"]] == [len(echo) + at for at in offsets]
    assert all(
        len(one["logprobs"]["tokens"]) == len(one["token_ids"])
        for one in choices
        if one["logprobs"]
    )
    ids = [token for one in choices for token in one["token_ids"]]
    assert ids == [ord(raw[:1]) for _, tokens in rows for raw, _ in tokens]
