"""The APIs that agents speak, /v1/responses and /v1/messages, beside chats: what they take, what they
answer, whole and streamed."""

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from api.conftest import MODEL
from openai.types.responses import Response, ResponseStreamEvent
from pagewire.frontend.anthropic_answers import error_body
from pagewire.frontend.errors import ApiError
from pagewire_protocol.prompt_checks import far_too_long, too_long, too_many_characters
from pagewire_protocol.sampling import ToolChoice
from pydantic import TypeAdapter

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"type": "function", "name": "f", "description": "F.", "parameters": SCHEMA}
TOOL = {"name": "f", "description": "F.", "input_schema": SCHEMA}
AS_CHAT = [
    {"type": "function", "function": {"name": "f", "description": "F.", "parameters": SCHEMA}}
]


def ok(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(server, path: str, **body: object) -> list[dict[str, Any]]:
    """The events of a stream, whose names are their types."""
    answer = server.http.post(path, json={"stream": True, **body})
    assert answer.status_code == 200, answer.text
    events: list[dict[str, Any]] = []
    for block in answer.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def chat_of(server) -> list[tuple[str, str, Any]]:
    """The messages that went to the tokenizer."""
    messages = server.stack.generates()[-1].prompt.chat.messages
    return [
        (one.role, one.content, json.loads(one.fields) if one.fields else None) for one in messages
    ]


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key != "id"} for item in items]


def message_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that a stream of /v1/messages adds up to."""
    blocks: list[dict[str, Any]] = []
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                for name, text in event["delta"].items():
                    if name in ("text", "thinking"):
                        blocks[-1][name] += text
                    elif name == "partial_json":
                        blocks[-1]["input"] = blocks[-1]["input"] or ""
                        blocks[-1]["input"] += text
            case _:
                pass
    for block in blocks:
        if isinstance(block.get("input"), str):
            block["input"] = json.loads(block["input"])
    return blocks


# --- chats ---


def test_a_chat_with_calls(server) -> None:
    body = ok(server.chat("calls", tools=AS_CHAT))
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning"]) == ("Sure.", "Hm, 世界.")
    assert [(call["id"], call["function"]) for call in message["tool_calls"]] == [
        ("call_a", {"name": "f", "arguments": '{"a": "1"}'}),
        ("call_b", {"name": "g", "arguments": "{}"}),
    ]
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    hidden = ok(server.chat("calls", tools=AS_CHAT, include_reasoning=False))
    assert "reasoning" not in hidden["choices"][0]["message"]


def test_a_chat_with_calls_is_streamed(server) -> None:
    messages = [{"role": "user", "content": "calls"}]
    options = {"tools": AS_CHAT, "n": 2, "stream_options": {"include_usage": True}}
    events = server.events("/v1/chat/completions", messages=messages, **options)
    for index in range(2):
        choices = [e["choices"][0] for e in events if e["choices"]]
        own = [choice for choice in choices if choice["index"] == index]
        assert own[-1]["finish_reason"] == "tool_calls"
        calls = [c for choice in own for c in choice["delta"].get("tool_calls", [])]
        assert [(c["index"], c["id"]) for c in calls if "id" in c] == [(0, "call_a"), (1, "call_b")]
        assert "".join(c["function"]["arguments"] for c in calls if c["index"] == 0) == '{"a": "1"}'
        reasoning = [choice["delta"].get("reasoning_content", "") for choice in own]
        assert "".join(reasoning) == "Hm, 世界."
    assert events[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


# --- /v1/messages ---


def test_a_message_with_calls(server) -> None:
    user = {"role": "user", "content": "calls"}
    body = ok(server.post("/v1/messages", messages=[user], max_tokens=64, tools=[TOOL]))
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", MODEL)
    assert body["id"].startswith("msg_") and body["stop_reason"] == "tool_use"
    assert body["content"] == [
        {"type": "thinking", "thinking": "Hm, 世界.", "signature": ""},
        {"type": "text", "text": "Sure."},
        {"type": "tool_use", "id": "call_a", "name": "f", "input": {"a": "1"}},
        {"type": "tool_use", "id": "call_b", "name": "g", "input": {}},
    ]
    assert body["usage"] == {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 2,
        "output_tokens": 7,
    }
    generate = server.stack.generates()[-1]
    assert json.loads(generate.prompt.chat.tools) == AS_CHAT
    assert generate.max_tokens_is_rest, "no more than the context leaves"


def test_a_message_is_streamed(server) -> None:
    user = {"role": "user", "content": "calls"}
    options = {"messages": [user], "max_tokens": 64, "tools": [TOOL]}
    events = events_of(server, "/v1/messages?beta=true", **options)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    starts = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    pieces = [e["delta"] for e in events if e.get("index") == 2 and "delta" in e]
    assert "".join(piece["partial_json"] for piece in pieces) == '{"a": "1"}'
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 2
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] == 7


def test_a_plain_message_ends_by_its_length_or_a_stop_sequence(server) -> None:
    user = {"role": "user", "content": "hi"}
    body = ok(server.post("/v1/messages", messages=[user], max_tokens=3))
    assert body["stop_reason"] == "max_tokens" and body["content"][0]["type"] == "text"
    user = {"role": "user", "content": "stop"}
    options = {"messages": [user], "max_tokens": 9, "stop_sequences": ["x"]}
    body = ok(server.post("/v1/messages", **options))
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "x")
    options = {**options, "messages": [{"role": "user", "content": "late"}], "tools": [TOOL]}
    body = ok(server.post("/v1/messages", **options))
    assert [block["type"] for block in body["content"]].count("tool_use") == 1
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "x")
    delta = events_of(server, "/v1/messages", **options)[-2]["delta"]
    assert delta == {"stop_reason": "stop_sequence", "stop_sequence": "x"}


@pytest.mark.parametrize("text", ["calls", "late", "silent", "hi"])
def test_a_streamed_message_is_the_whole_one(server, text: str) -> None:
    user = {"role": "user", "content": text}
    options = {"messages": [user], "max_tokens": 3, "tools": [TOOL]}
    whole = ok(server.post("/v1/messages", **options))
    events = events_of(server, "/v1/messages", **options)
    assert message_of(events) == whole["content"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    if text == "late":
        kinds = [block["type"] for block in whole["content"]]
        assert kinds == ["thinking", "text", "tool_use", "text"], "in the order of the answer"


def test_an_answer_that_was_begun_is_continued(server) -> None:
    user = {"role": "user", "content": "hi"}
    text = {"type": "text", "text": "Once"}
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    for content, is_begun in (("Once", True), ([text], True), ("", False), ([text, call], False)):
        body = {"messages": [user, {"role": "assistant", "content": content}], "tools": [TOOL]}
        ok(server.post("/v1/messages/count_tokens", **body))
        counted = server.stack.received[-1].prompt.chat
        server.post("/v1/messages", max_tokens=3, **body)
        chat = server.stack.generates()[-1].prompt.chat
        assert chat == counted
        assert chat.continue_final_message is is_begun
        assert chat.add_generation_prompt is not is_begun


def test_a_conversation_of_claude_code(server) -> None:
    """Its fields, its first system block, a system message in between, a tool's result."""
    body = {
        "max_tokens": 32000,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1f;"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "one"}]},
            {"role": "system", "content": "Remember."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "Yes."},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "1"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": [{"type": "text", "text": "42"}],
                    },
                    {"type": "text", "text": "go on"},
                ],
            },
        ],
        "tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}],
        "metadata": {"user_id": "u"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
        "output_config": {"effort": "high"},
    }
    ok(server.post("/v1/messages?beta=true", **body))
    call = {"name": "f", "arguments": '{"a":"1"}'}
    assert chat_of(server) == [
        ("system", "Be brief.", None),
        ("user", "one\n\nRemember.", None),
        (
            "assistant",
            "Yes.",
            {
                "tool_calls": [{"id": "t1", "type": "function", "function": call}],
                "reasoning_content": "hm",
            },
        ),
        ("tool", "42", {"tool_call_id": "t1"}),
        ("user", "go on", None),
    ]
    state = server.frontend.service.state
    assert {"context_management", "tool web_search_20250305"} <= state.ignored
    count = {name: body[name] for name in ("system", "messages", "tools", "thinking")}
    assert ok(server.post("/v1/messages/count_tokens", **count))["input_tokens"] > 0
    assert server.http.head("/").status_code == 200


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "budget_tokens"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"model": "none"}, "none"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        (
            {
                "tools": [{"type": "web_search_20250305", "name": "web_search"}],
                "tool_choice": {"type": "tool", "name": "web_search"},
            },
            "tool_choice",
        ),
    ],
)
def test_errors_have_the_shape_of_the_api(server, more: dict, part: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, **more}
    answer = server.post("/v1/messages", **body)
    assert answer.status_code in (400, 404)
    error = answer.json()
    assert error["type"] == "error" and part in error["error"]["message"]
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    assert error["error"]["type"] == kinds[answer.status_code]


@pytest.mark.parametrize(
    ("refusal", "counted"),
    [
        (too_long(4096, 5000, 1), ": 5000 tokens > 4096 maximum"),
        (far_too_long(4096, 90_000, 30_000, 6000), ": 6000 tokens > 4096 maximum"),
        (too_many_characters(4096, 900_000, 400_000), ""),
    ],
)
def test_a_prompt_that_is_too_long_is_said_to_be_in_the_words_of_the_api(
    refusal: str, counted: str
) -> None:
    """Claude Code shortens the conversation where it reads them."""
    message = error_body(ApiError(400, refusal))["error"]["message"]
    assert message == f"prompt is too long{counted}. {refusal}"
    assert error_body(ApiError(400, "x"))["error"]["message"] == "x"


def test_keys_of_both_kinds_pass(serve) -> None:
    with serve(keys=("secret",)) as server:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        for headers, status in (
            ({"x-api-key": "secret"}, 200),
            ({"Authorization": "Bearer secret"}, 200),
            ({"x-api-key": "wrong"}, 401),
            ({}, 401),
        ):
            answer = server.http.post("/v1/messages", json=body, headers=headers)
            assert answer.status_code == status
        assert answer.json()["error"]["type"] == "authentication_error"


# --- /v1/responses ---


def test_a_response_with_calls(server) -> None:
    body = ok(server.post("/v1/responses", input="calls", tools=[FUNCTION], instructions="Be."))
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", MODEL)
    assert body["instructions"] == "Be." and body["tools"] == [FUNCTION]
    kinds = [item["type"] for item in body["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    reasoning, message, call, _ = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm, 世界."}]
    assert message["content"][0]["text"] == "Sure."
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_a", "f", '{"a": "1"}')
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 2, "cache_write_tokens": 0}
    assert chat_of(server) == [("system", "Be.", None), ("user", "calls", None)]
    short = ok(server.post("/v1/responses", input="hi", max_output_tokens=3))
    assert short["status"] == "incomplete"
    assert short["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_response_is_streamed(server) -> None:
    events = events_of(server, "/v1/responses", input="calls", tools=[FUNCTION])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-1] == "completed"
    for name in (
        "reasoning_text.delta",
        "reasoning_text.done",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ):
        assert name in names
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    whole = ok(server.post("/v1/responses", input="calls", tools=[FUNCTION]))
    assert without_ids(done) == without_ids(whole["output"])
    assert events[-1]["response"]["output"] == done


@pytest.mark.parametrize(
    ("text", "statuses"),
    [
        ("hi", ["incomplete"]),
        ("late", ["completed", "completed", "completed", "incomplete"]),
        ("silent", ["completed"]),
    ],
)
def test_a_streamed_response_is_the_whole_one(server, text: str, statuses: list[str]) -> None:
    """Also where it is cut off, has text behind a call, or nothing at all."""
    options = {"input": text, "max_output_tokens": 3, "tools": [FUNCTION]}
    whole = ok(server.post("/v1/responses", **options))
    events = events_of(server, "/v1/responses", **options)
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    last = events[-1]["response"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [item["status"] for item in done] == statuses
    assert without_ids(done) == without_ids(whole["output"]) == without_ids(last["output"])
    assert last["status"] == whole["status"] == statuses[-1]


def test_a_conversation_of_codex(server) -> None:
    """Developer messages, a namespace of tools, hosted tools; its second turn."""
    first = ok(server.post("/v1/responses", input="calls", tools=[FUNCTION]))
    reasoning, message, call, _ = first["output"]
    del reasoning["content"]
    namespace = {"type": "namespace", "name": "mcp__x__", "tools": [{**FUNCTION, "name": "g"}]}
    body = {
        "tools": [FUNCTION, namespace, {"type": "web_search", "external_web_access": True}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "client_metadata": {"x": 1},
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Rules."}],
            },
            {"role": "user", "content": [{"type": "input_text", "text": "calls"}]},
            reasoning,
            message,
            call,
            {"type": "function_call_output", "call_id": "call_a", "output": "42"},
            {"type": "web_search_call", "id": "w"},
            {"role": "user", "content": "calls"},
        ],
    }
    second = ok(server.post("/v1/responses", **body))
    function = {"name": "f", "arguments": '{"a": "1"}'}
    assert chat_of(server) == [
        ("system", "Rules.", None),
        ("user", "calls", None),
        (
            "assistant",
            "Sure.",
            {
                "tool_calls": [{"id": "call_a", "type": "function", "function": function}],
                "reasoning_content": "Hm, 世界.",
            },
        ),
        ("tool", "42", {"tool_call_id": "call_a"}),
        ("user", "calls", None),
    ]
    assert second["output"][-1]["name"] == "g" and second["output"][-1]["namespace"] == "mcp__x__"
    names = [
        t["function"]["name"] for t in json.loads(server.stack.generates()[-1].prompt.chat.tools)
    ]
    assert names == ["f", "g"]
    assert {"tool web_search", "item web_search_call"} <= server.frontend.service.state.ignored


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": "hi"}, {"id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ],
)
def test_what_needs_a_memory_is_refused(server, more: dict, param: str) -> None:
    answer = server.post("/v1/responses", **{"input": "hi", **more})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("BadRequestError", param)


def test_what_has_no_effect_is_logged(server) -> None:
    ok(
        server.post(
            "/v1/responses",
            input="hi",
            include=["reasoning.encrypted_content", "message.output_text.logprobs"],
            truncation="auto",
            text={"verbosity": "low"},
            service_tier="flex",
        )
    )
    result = {"type": "tool_result", "tool_use_id": "t", "content": "no", "is_error": True}
    messages = [{"role": "user", "content": [result]}]
    for thinking in ({"type": "adaptive", "display": "omitted"}, {"type": "new"}):
        ok(server.post("/v1/messages", messages=messages, max_tokens=3, thinking=thinking))
    assert server.frontend.service.state.ignored >= {
        "include message.output_text.logprobs",
        "truncation auto",
        "text.verbosity",
        "service_tier",
        "tool_result.is_error",
        "thinking.display",
        "thinking new",
    }
    assert "include reasoning.encrypted_content" not in server.frontend.service.state.ignored


def test_some_of_the_tools_are_allowed(server) -> None:
    """Clients may send the same tools each time, and say which of them count."""

    def ask(mode: str, *allowed: str) -> Any:
        tools = [{"type": "function", "name": name} for name in allowed]
        choice = {"type": "allowed_tools", "mode": mode, "tools": tools}
        both = [FUNCTION, {**FUNCTION, "name": "g"}]
        return server.post("/v1/responses", input="hi", tools=both, tool_choice=choice)

    choices = {"auto": ToolChoice.AUTO, "required": ToolChoice.REQUIRED}
    for mode, choice in choices.items():
        body = ok(ask(mode, "g"))
        assert body["tool_choice"]["mode"] == mode and len(body["tools"]) == 2
        generate = server.stack.generates()[-1]
        shown = json.loads(generate.prompt.chat.tools)
        assert [tool["function"]["name"] for tool in shown] == ["g"]
        assert generate.text.answer.tool_choice is choice
    ok(ask("auto"))
    assert server.stack.generates()[-1].prompt.chat.tools == b""
    for answer in (ask("required"), ask("auto", "h"), ask("perhaps", "f")):
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tool_choice"


def test_an_answer_is_one_message_whatever_the_order_of_its_items(server) -> None:
    """Reasoning and text between calls, as models write them, do not part calls from their
    results."""

    def reasoning(text: str) -> dict:
        return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}

    def call(call_id: str) -> dict:
        return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}

    results = [
        {"type": "function_call_output", "call_id": call_id, "output": "42"}
        for call_id in ("a", "b")
    ]
    text = {"type": "message", "role": "assistant", "content": "Now b."}
    answer = [reasoning("one"), call("a"), reasoning("two"), text, call("b")]
    user = {"role": "user", "content": "hi"}
    ok(server.post("/v1/responses", input=[user, *answer, *results, user], tools=[FUNCTION]))
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": one, "type": "function", "function": function} for one in ("a", "b")]
    assert chat_of(server) == [
        ("user", "hi", None),
        ("assistant", "Now b.", {"tool_calls": calls, "reasoning_content": "one\n\ntwo"}),
        ("tool", "42", {"tool_call_id": "a"}),
        ("tool", "42", {"tool_call_id": "b"}),
        ("user", "hi", None),
    ]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}},
        {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "x", "stderr": ""}]},
        {"type": "tool_search_call", "arguments": {"query": "x"}, "execution": "client"},
        {"type": "unheard_of", "content": 1, "summary": {}, "name": [], "role": 7},
    ],
    ids=lambda item: item["type"],
)
def test_unknown_items_may_hold_anything(server, item: dict) -> None:
    user = {"role": "user", "content": "hi"}
    tools = [FUNCTION, {"type": "strange", "name": 1, "parameters": "none", "tools": {}}]
    ok(server.post("/v1/responses", input=[user, item, user], tools=tools))
    assert chat_of(server) == [("user", "hi\n\nhi", None)]
    ignored = server.frontend.service.state.ignored
    assert {f"item {item['type']}", "tool strange"} <= ignored
    answer = server.post("/v1/responses", input=[user, item, {"role": "user", "content": 1}])
    assert answer.status_code == 400 and "input[2].content" in answer.json()["message"]


@pytest.mark.parametrize(
    "block",
    [
        {
            "type": "web_search_tool_result",
            "tool_use_id": "s",
            "content": {"type": "web_search_tool_result_error", "error_code": "unavailable"},
        },
        {
            "type": "code_execution_tool_result",
            "content": {"type": "code_execution_result", "stdout": "", "content": []},
        },
        {"type": "unheard_of", "input": [1], "text": {}, "id": 4},
    ],
    ids=lambda block: block["type"],
)
def test_unknown_blocks_may_hold_anything(server, block: dict) -> None:
    text = {"type": "text", "text": "hi"}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [block, text]}
    messages = [
        {"role": "assistant", "content": [block, text]},
        {"role": "user", "content": [result, block, text]},
    ]
    tools = [TOOL, {"type": "mcp_toolset", "mcp_server_name": "x"}]
    body = {"messages": messages, "tools": tools}
    ok(server.post("/v1/messages", max_tokens=3, **body))
    assert [message[:2] for message in chat_of(server)] == [
        ("assistant", "hi"),
        ("tool", "hi"),
        ("user", "hi"),
    ]
    ignored = server.frontend.service.state.ignored
    assert {f"content block {block['type']}", "tool mcp_toolset"} <= ignored
    ok(server.post("/v1/messages/count_tokens", **body))


def test_errors_call_parameters_by_their_names(server) -> None:
    """Those of the API, not those of the chat that it becomes."""
    call = {"type": "function_call", "call_id": "c", "name": "no name", "arguments": "{}"}
    user = {"role": "user", "content": "hi"}
    for more, param, part in (
        ({"max_output_tokens": 0}, "max_output_tokens", "`max_output_tokens`"),
        ({"input": []}, "input", "`input`"),
        ({"input": [user, user, call]}, "input", "`input[2].name`"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "`text.format`"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "`text.format.schema`"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort", "`reasoning.effort`"),
        ({"tools": [{**FUNCTION, "name": "no name"}]}, "tools", "`tools[0].name`"),
        ({"input": "refuse400"}, "input", "System"),
    ):
        answer = server.post("/v1/responses", **{"input": "hi", **more})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param
        assert part in error["message"]
    use = {"type": "tool_use", "id": "t", "name": "no name", "input": {}}
    for more, part in (
        ({"stop_sequences": [""]}, "`stop_sequences`"),
        ({"output_config": {"effort": "much"}}, "`output_config.effort`"),
        ({"tools": [{**TOOL, "name": "no name"}]}, "`tools[0].name`"),
        ({"messages": [user, {"role": "assistant", "content": [use]}]}, "`messages[1].content[0]"),
    ):
        answer = server.post("/v1/messages", **{"messages": [user], "max_tokens": 3, **more})
        assert answer.status_code == 400 and part in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["calls", "late", "silent", "hi", "failed"])
def test_answers_fit_the_types_of_the_clients(server, text: str) -> None:
    """All fields that OpenAI's and Anthropic's own clients know as required are there."""
    options: dict[str, Any] = {"input": text, "tools": [FUNCTION], "max_output_tokens": 3}
    events = events_of(server, "/v1/responses", **options)
    TypeAdapter(list[ResponseStreamEvent]).validate_python(events)
    user = {"role": "user", "content": text}
    message: dict[str, Any] = {"messages": [user], "max_tokens": 3, "tools": [TOOL]}
    events = events_of(server, "/v1/messages", **message)
    if text != "failed":
        TypeAdapter(list[RawMessageStreamEvent]).validate_python(events)
        Response.model_validate(ok(server.post("/v1/responses", **options)))
        Message.model_validate(ok(server.post("/v1/messages", **message)))


def test_a_stream_that_fails_says_so(server) -> None:
    events = events_of(server, "/v1/responses", input="failed")
    assert events[-1]["type"] == "response.failed" and events[-1]["response"]["error"]["message"]
    user = {"role": "user", "content": "failed"}
    events = events_of(server, "/v1/messages", messages=[user], max_tokens=9)
    assert events[-1]["type"] == "error" and events[-1]["error"]["type"] == "api_error"


def test_what_is_known_of_the_tokenizer(server) -> None:
    info = ok(server.http.get("/tokenizer_info"))
    assert info["has_chat_template"] is True and "tool_call_parser" in info
    messages = [{"role": "user", "content": "hi"}]
    assert ok(server.post("/tokenize", messages=messages, tools=AS_CHAT))["count"]
    assert server.stack.received[-1].prompt.chat.tools
    rendered = server.post("/v1/chat/completions/render", messages=messages, tools=AS_CHAT)
    assert ok(rendered)["token_ids"] and server.stack.received[-1].prompt.chat.tools
