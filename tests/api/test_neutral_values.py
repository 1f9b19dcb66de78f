"""What a body may hold without asking for anything: accepted and without effect. What would change
the answer is refused by name."""

import pytest
from api.checks import check_error, refused
from pagewire.frontend.neutral import NEUTRAL
from pagewire.offline.prompts import as_chats

ROUTED_CHAT = {
    "logprobs": False,
    "no_stop_trim": False,
    "ignore_eos": False,
    "continue_final_message": False,
    "skip_special_tokens": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
    "include_reasoning": True,
}
ROUTED_COMPLETION = {
    "echo": False,
    "no_stop_trim": False,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "return_hidden_states": False,
}
"""What vLLM's and SGLang's routers add to every body."""
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("stream", [True, False])
def test_bodies_that_came_through_a_router(server, stream: bool) -> None:
    plain = server.chat("hi", model="alias", max_tokens=3, seed=7)
    routed = server.chat("hi", model="alias", max_tokens=3, seed=7, stream=stream, **ROUTED_CHAT)
    assert routed.status_code == plain.status_code == 200
    assert server.complete("hi", stream=stream, **ROUTED_COMPLETION).status_code == 200
    first, second, _ = server.stack.generates()
    assert (first.prompt, first.sampling, first.text) == (
        second.prompt,
        second.sampling,
        second.text,
    )


def test_every_neutral_value_means_nothing(server) -> None:
    """All at once, each with each of its values, and null."""
    longest = max(len(values) for values in NEUTRAL.values())
    for turn in range(longest + 1):
        body = {name: [*values, None][min(turn, len(values))] for name, values in NEUTRAL.items()}
        assert server.chat("hi", seed=1, **body).status_code == 200, body
        assert server.complete("hi", seed=1, **body).status_code == 200, body
    chats = [one for one in server.stack.generates() if one.prompt.chat]
    texts = [one for one in server.stack.generates() if one.prompt.text]
    for same in (chats, texts):
        first = same[0]
        for one in same:
            assert (one.prompt, one.sampling, one.text) == (
                first.prompt,
                first.sampling,
                first.text,
            )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("verbosity", "low"),
        ("no_stop_trim", True),
        ("return_hidden_states", True),
        ("separate_reasoning", False),
        ("lora_path", "x"),
        ("typical_p", 0.5),
        ("no_such_thing", 0),
        ("no_such_thing", ""),
        ("stream_options", {"include_usage": True, "no_such_thing": 1}),
    ],
)
def test_what_would_change_the_answer_is_refused(server, name: str, value: object) -> None:
    for answer in (
        server.chat("hi", stream=True, **{name: value}),
        server.complete("hi", stream=True, **{name: value}),
    ):
        param = f"{name}.no_such_thing" if isinstance(value, dict) else name
        refused(answer, param, f"`{param}`", "not supported")
    assert not server.stack.received


def test_null_is_as_good_as_nothing_for_any_name(server) -> None:
    body = {"no_such_thing": None, "stream_options": {"include_usage": True, "new_option": None}}
    assert server.chat("hi", stream=True, **body).status_code == 200
    assert server.post("/tokenize", prompt="hi", no_such_thing=None).status_code == 200
    for options in ({}, {"include_usage": None}, {"new_option": None}):
        assert server.chat("hi", stream_options=options).status_code == 200
        assert server.complete("hi", stream_options=options).status_code == 200


def test_what_programs_note_about_messages_passes(server) -> None:
    said = {
        "role": "assistant",
        "content": [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": None}],
        "refusal": None,
        "annotations": [{"type": "url_citation", "url_citation": {"url": "x"}}],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning_content": "",
        "id": "msg_1",
        "prefix": False,
    }
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    asks = {"role": "user", "content": [part], "name": None, "timestamp": 1.5, "no_such": None}
    refuses = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    answer = server.post("/v1/chat/completions", messages=[USER, said, asks, refuses, USER])
    assert answer.status_code == 200, answer.text
    (generate,) = server.stack.generates()
    assert [(one.role, one.content) for one in generate.prompt.chat.messages] == [
        ("user", "hi"),
        ("assistant", "yes"),
        ("user", "hi"),
        ("assistant", "no"),
        ("user", "hi"),
    ]


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"refusal": "I cannot"}, "refusal"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"prefix": True}, "prefix"),
        ({"parts": [{"text": "x"}]}, "parts"),
        ({"content": [{"type": "text", "text": "x", "more": "y"}]}, "content[0].more"),
    ],
)
def test_content_that_would_be_lost_is_refused(server, message: dict, where: str) -> None:
    body = {"messages": [USER, {**USER, **message}]}
    name = f"messages[1].{where}"
    for path in ("/v1/chat/completions", "/tokenize"):
        refused(server.post(path, **body), name, f"`{name}`", "not supported")


def test_messages_of_another_shape_are_explained(server) -> None:
    for messages in (["hi"], "hi", {"role": "user"}, [USER, {"role": "user", "content": [1]}]):
        answer = server.post("/v1/chat/completions", messages=messages, no_such_thing=None)
        check_error(answer, 400, "BadRequestError", "messages")


def test_a_body_without_a_model_is_answered(server) -> None:
    assert server.post("/v1/completions", prompt="hi").status_code == 200
    assert server.post("/v1/chat/completions", messages=[USER], model=None).status_code == 200


def test_llm_takes_the_same_messages() -> None:
    said = {"role": "assistant", "content": "yes", "tool_calls": [], "refusal": None, "id": "1"}
    refuses = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    (strings,) = as_chats([{**USER, "content": ["a", {"type": "text", "text": "b"}]}], True, False)
    assert strings.prompt.chat is not None and strings.prompt.chat.messages[0].content == "a\nb"
    for content in ({"type": "text", "text": "a"}, ["a", 2]):
        with pytest.raises(ValueError, match="content must be text"):
            as_chats([{**USER, "content": content}], True, False)
    (entry,) = as_chats([USER, said, refuses, {**USER, "name": "Bo"}], True, False)
    chat = entry.prompt.chat
    assert chat and [one.content for one in chat.messages] == ["hi", "yes", "no", "hi"]
    assert [one.name for one in chat.messages] == [None, None, None, "Bo"]
    for lost in ({"prefix": True}, {"tool_calls": [{}]}, {"function_call": {"name": "f"}}):
        with pytest.raises(ValueError, match=next(iter(lost))):
            as_chats([{**USER, **lost}], True, False)
