"""Tools, reasoning and their history in chats: what is taken, what is refused, what goes to the
tokenizer."""

import json

import pytest
from api.checks import refused
from pagewire.offline.prompts import as_chats
from pagewire_protocol.sampling import AnswerOptions, ToolChoice

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
HISTORY = [
    USER,
    {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "42"},
]


def generated(server, **body: object):
    answer = server.chat("hi", **body)
    assert answer.status_code == 200, answer.text
    return server.stack.generates()[-1]


def test_tools_reach_the_tokenizer(server) -> None:
    generate = generated(server, tools=[TOOL])
    assert json.loads(generate.prompt.chat.tools) == [TOOL]
    assert generate.text.answer == AnswerOptions(ToolChoice.AUTO)
    first = generate.prompt.chat.tools
    assert generated(server, tools=[TOOL]).prompt.chat.tools == first, "the same bytes each turn"
    for choice, expected in (
        ("required", AnswerOptions(ToolChoice.REQUIRED)),
        ({"type": "function", "function": {"name": "f"}}, AnswerOptions(ToolChoice.NAMED, "f")),
    ):
        assert generated(server, tools=[TOOL], tool_choice=choice).text.answer == expected
    one = generated(server, tools=[TOOL], parallel_tool_calls=False)
    assert one.text.answer == AnswerOptions(ToolChoice.AUTO, parallel_tool_calls=False)


def test_without_a_choice_tools_are_not_shown(server) -> None:
    generate = generated(server, tools=[TOOL], tool_choice="none")
    assert generate.prompt.chat.tools == b"" and generate.text.answer is None
    for choice in ("none", "auto", None):
        assert generated(server, tool_choice=choice).text.answer is None


def allowing(mode: str, *names: str) -> dict[str, object]:
    named = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


def test_some_of_the_tools_are_allowed(server) -> None:
    """Clients may send the same tools each time, and say which of them count."""
    both = [TOOL, {"type": "function", "function": {"name": "g"}}]
    choices = {"auto": ToolChoice.AUTO, "required": ToolChoice.REQUIRED}
    for mode, choice in choices.items():
        generate = generated(server, tools=both, tool_choice=allowing(mode, "g"))
        assert json.loads(generate.prompt.chat.tools) == both[1:]
        assert generate.text.answer == AnswerOptions(choice)
    nothing = generated(server, tools=both, tool_choice=allowing("auto"))
    assert nothing.prompt.chat.tools == b"" and nothing.text.answer is None
    for choice in (allowing("required"), allowing("auto", "h"), allowing("none", "f")):
        refused(server.chat("hi", tools=both, tool_choice=choice), "tool_choice", "`tool_choice")
    refused(server.chat("hi", tool_choice=allowing("auto", "f")), "tool_choice", "needs `tools`")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"tools": [TOOL], "use_beam_search": True, "best_of": 2, "temperature": 0}, "tools"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ],
)
def test_what_is_no_tool_or_choice_is_refused(server, body: dict, param: str) -> None:
    refused(server.chat("hi", **body), param, f"`{param}")


def test_earlier_calls_reach_the_tokenizer(server) -> None:
    answer = server.post("/v1/chat/completions", messages=HISTORY)
    assert answer.status_code == 200, answer.text
    (entry,) = as_chats(HISTORY, True, False)
    for chat in (server.stack.generates()[-1].prompt.chat, entry.prompt.chat):
        _, call, result = chat.messages
        expected = {"tool_calls": [CALL], "reasoning_content": "hm"}
        assert (call.content, json.loads(call.fields)) == ("", expected)
        assert (result.role, result.content) == ("tool", "42")
        assert json.loads(result.fields) == {"tool_call_id": "call_1"}


def test_null_in_an_earlier_call_is_as_if_not_given(server) -> None:
    for function in ({"name": "f", "arguments": None}, {"name": "f"}):
        call = {"id": None, "type": None, "function": function}
        history = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, USER]
        answer = server.post("/v1/chat/completions", messages=history)
        assert answer.status_code == 200, answer.text
        (entry,) = as_chats(history, True, False)
        for chat in (server.stack.generates()[-1].prompt.chat, entry.prompt.chat):
            (sent,) = json.loads(chat.messages[1].fields)["tool_calls"]
            assert sent == {**CALL, "id": "call_0", "function": {"name": "f", "arguments": ""}}


def test_an_effort_is_a_variable_of_the_template(serve) -> None:
    def kwargs(**body: object) -> object:
        data = generated(server, **body).prompt.chat.template_kwargs
        return json.loads(data) if data else None

    with serve(has_reasoning=True) as server:
        assert kwargs(reasoning_effort="high") == {"reasoning_effort": "high"}
        assert kwargs(reasoning_effort="none") == {"enable_thinking": False}
        own = {"enable_thinking": True}
        assert kwargs(reasoning_effort="none", chat_template_kwargs=own) == own
        assert kwargs() is None


def test_a_model_that_thinks_has_parts_without_tools(serve) -> None:
    with serve(has_reasoning=True) as server:
        assert generated(server).text.answer == AnswerOptions()
        assert generated(server, thinking_token_budget=7).text.answer == AnswerOptions(
            thinking_budget=7
        )
        assert server.complete("hi").status_code == 200
        assert server.stack.generates()[-1].text.answer is None


def test_programs_have_tools() -> None:
    (entry,) = as_chats([USER], True, False, tools=[TOOL])
    assert entry.prompt.chat and json.loads(entry.prompt.chat.tools) == [TOOL]
    with pytest.raises(ValueError, match="web_search"):
        as_chats([USER], True, False, tools=[{"type": "web_search"}])
