"""Both generation endpoints against a scripted stack: shapes, streams, choices, logprobs, usage,
accidents."""

import json
import socket
import struct
import threading

import httpx2 as httpx
import openai
import pytest
from aiohttp import ClientConnectionResetError, web
from api.checks import refused
from api.fake_stack import expected, tokens_of, word
from pagewire.config import FrontendConfig
from pagewire_protocol.columns import unpack

MODEL = "/models/tiny one/"
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 8,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 2},
}


def test_completion(server) -> None:
    body = server.complete("hi", max_tokens=8).json()
    assert (
        body["id"].startswith("cmpl-")
        and body["object"] == "text_completion"
        and body["model"] == MODEL
    )
    choice = {
        "index": 0,
        "text": expected(8),
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
    }
    assert body["choices"] == [choice] and body["usage"] == USAGE
    assert server.complete("hi").json()["usage"]["completion_tokens"] == 16


def test_chat(server) -> None:
    body = server.chat("hi", model="alias").json()
    assert (
        body["id"].startswith("chatcmpl-")
        and body["object"] == "chat.completion"
        and body["model"] == MODEL
    )
    message = {"role": "assistant", "content": expected(8), "refusal": None}
    assert body["choices"] == [
        {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == USAGE
    assert body["prompt_logprobs"] is None and body["prompt_token_ids"] is None
    (generate,) = server.stack.generates()
    assert (
        generate.max_tokens_is_rest
        and generate.prompt.chat.add_generation_prompt
        and not generate.add_special_tokens
    )


def test_content_parts_and_roles_reach_the_tokenizer(server) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "system", "content": "be"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": parts, "name": "Bo"},
    ]
    assert server.post("/v1/chat/completions", messages=messages).status_code == 200
    chat = server.stack.generates()[0].prompt.chat
    assert [(m.role, m.content, m.name) for m in chat.messages] == [
        ("system", "be", None),
        ("assistant", "", None),
        ("user", "one\ntwo", "Bo"),
    ]


def test_strings_among_parts_are_texts(server) -> None:
    """As LangChain sends them, also beside parts with a field that no model reads."""
    part = {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}
    contents = {"one": ["one"], "one\ntwo": ["one", part]}
    for text, content in contents.items():
        assert server.chat(content).status_code == 200
        assert server.stack.generates()[-1].prompt.chat.messages[0].content == text
    image = {"type": "image_url", "image_url": {"url": "x"}}
    refused(server.chat(["one", image]), "messages", "image_url")
    refused(server.chat(["one", 2]), "messages", "messages[0].content[1]")


def test_chat_stream(server) -> None:
    events = server.events(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        stream_options={"include_usage": True},
    )
    assert {event["object"] for event in events} == {"chat.completion.chunk"} and len(
        {event["id"] for event in events}
    ) == 1
    first, *texts, usage = events
    assert (
        first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        and first["choices"][0]["finish_reason"] is None
    )
    assert "".join(event["choices"][0]["delta"]["content"] for event in texts) == expected(8)
    assert [event["choices"][0]["delta"]["content"] for event in texts] == [
        word(p) for p in range(8)
    ]
    reasons = [event["choices"][0]["finish_reason"] for event in texts]
    assert reasons == [None] * 7 + ["length"], "with the last text"
    assert (
        usage["choices"] == []
        and usage["usage"] == USAGE
        and all(event["usage"] is None for event in events[:-1])
    )


def test_completion_stream_without_usage(server) -> None:
    events = server.events("/v1/completions", prompt="hi", max_tokens=3)
    assert [event["choices"][0]["text"] for event in events] == ["Hello", ",", " 世界"]
    assert events[-1]["choices"][0]["finish_reason"] == "length" and all(
        "usage" not in event for event in events
    )


def test_continuous_usage(server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    events = server.events("/v1/completions", prompt="hi", max_tokens=3, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]
    assert {event["usage"]["prompt_tokens"] for event in events} == {3}


def test_continuous_usage_needs_the_usage_at_the_end(server) -> None:
    events = server.events(
        "/v1/completions",
        prompt="hi",
        max_tokens=3,
        stream_options={"continuous_usage_stats": True},
    )
    assert not any("usage" in event for event in events)


def test_usage_may_be_told_in_every_stream(serve) -> None:
    with serve(config=FrontendConfig(enable_force_include_usage=True)) as server:
        events = server.events("/v1/completions", prompt="hi", max_tokens=2)
        assert (
            events[-1]["usage"]["completion_tokens"] == 2
            and events[-1]["choices"] == []
            and events[0]["usage"] is None
        )


@pytest.mark.parametrize("header", [b"", b"Connection: keep-alive\r\n"])
def test_an_http_1_0_client_gets_the_stream_unchunked(server, header: bytes) -> None:
    """The end of the connection is the end of the stream, whatever the client wishes."""
    body = json.dumps({"prompt": "hi", "stream": True, "max_tokens": 2}).encode()
    with socket.create_connection(("127.0.0.1", server.frontend.port), 5) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.0\r\n%bContent-Length: %d\r\n\r\n" % (header, len(body))
            + body
        )
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"200 OK" in head and b"chunked" not in head.lower()
    assert events.startswith(b"data: {") and events.endswith(b"}\n\ndata: [DONE]\n\n")


def test_the_connection_serves_the_next_request_after_a_stream(server) -> None:
    for _ in range(3):
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "hi", "stream": True}
        ) as answer:
            local = answer.extensions["network_stream"].get_extra_info("client_addr")
            assert b"[DONE]" in b"".join(answer.iter_bytes())
        assert local == getattr(server, "local", local)
        server.local = local


@pytest.mark.parametrize("at", ["prepare", "write", "write_eof"])
def test_a_client_that_leaves_at_the_ends_of_a_stream_is_no_fault(
    server, at: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """aiohttp raises where it finds the connection closed."""
    raised = threading.Event()

    async def fails(self: web.StreamResponse, *_: object) -> None:
        raised.set()
        raise ClientConnectionResetError("Cannot write to closing transport")

    with monkeypatch.context() as patch:
        patch.setattr(web.StreamResponse, at, fails)
        body = json.dumps({"prompt": "hi", "stream": True, "max_tokens": 2}).encode()
        with socket.create_connection(("127.0.0.1", server.frontend.port), 5) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )
            assert raised.wait(10)
        server.settle(lambda: not server.frontend.service.state.generating)
    assert server.complete("hi").status_code == 200
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


def test_prompts_and_choices_get_their_places(server) -> None:
    body = server.complete(["a", "b stop"], n=2, max_tokens=6, seed=41).json()
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (0, expected(6), "length"),
        (1, expected(6), "length"),
        (2, expected(5), "stop"),
        (3, expected(5), "stop"),
    ]
    assert body["usage"]["prompt_tokens"] == 6 and body["usage"]["completion_tokens"] == 22
    seeds = {}
    for generate in server.stack.generates():
        seeds.setdefault(generate.prompt.text, []).append(generate.sampling.seed)
    (one, two) = seeds.values()
    assert one == two and one[0] == 41 and one[1] not in (41, 42)


def test_streamed_choices_are_told_apart(server) -> None:
    events = server.events(
        "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], n=3, max_tokens=4
    )
    texts = dict.fromkeys(range(3), "")
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {i: expected(4) for i in range(3)}
    assert sum(event["choices"][0]["finish_reason"] == "length" for event in events) == 3


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
def test_token_ids_as_prompt(server, prompt) -> None:
    assert server.complete(prompt).status_code == 200
    assert unpack("i", server.stack.generates()[0].prompt.ids).tolist() == [1, 2, 3]


def test_random_seeds_differ_and_given_ones_stay(server) -> None:
    server.complete("hi")
    server.complete("hi", seed=-1)
    server.complete(["hi", "hi"])
    drawn = [generate.sampling.seed for generate in server.stack.generates()]
    assert len(set(drawn)) == 4 and all(0 <= seed < 2**63 for seed in drawn)
    server.stack.received.clear()
    for seed in (7, 2**63 - 1, -5):
        server.complete("hi", seed=seed)
    server.complete(["hi", "hi"], seed=9)
    given = [generate.sampling.seed for generate in server.stack.generates()]
    assert given == [7, 2**63 - 1, 2**63 - 5, 9, 9]


def test_parameters_arrive(server) -> None:
    sampling = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "max_tokens": 9,
        "ignore_eos": True,
    }
    other = {
        "stop": ["###", "\n\n"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "priority": -3,
        "cache_salt": "pepper",
    }
    accepted = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "response_format": {"type": "text"},
        "add_special_tokens": False,
    }
    answer = server.complete(
        "hi",
        **sampling,
        **other,
        **accepted,
        stop_token_ids=[5, 6],
        spaces_between_special_tokens=False,
    )
    assert answer.status_code == 200
    generate = server.stack.generates()[0]
    assert {
        name: getattr(generate.sampling, name) for name in sampling
    } == sampling and generate.sampling.stop_token_ids == (5, 6)
    text = generate.text
    assert (
        text.stop == ("###", "\n\n")
        and text.include_stop
        and not text.skip_special_tokens
        and not text.spaces_between_special_tokens
    )
    assert (generate.priority, generate.cache_salt, generate.add_special_tokens) == (
        -3,
        "pepper",
        False,
    )


def test_chat_template_switches(server) -> None:
    server.chat(
        "hi",
        continue_final_message=True,
        add_generation_prompt=False,
        max_completion_tokens=3,
        max_tokens=9,
    )
    generate = server.stack.generates()[0]
    assert (
        generate.prompt.chat.continue_final_message
        and not generate.prompt.chat.add_generation_prompt
    )
    assert generate.sampling.max_tokens == 3 and not generate.max_tokens_is_rest
    answer = server.chat("hi", continue_final_message=True, add_generation_prompt=True)
    assert answer.status_code == 400


def bytes_name(text: str) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text.encode())


def test_completion_logprobs(server) -> None:
    (choice,) = server.complete("hi", max_tokens=3, logprobs=2).json()["choices"]
    assert choice["logprobs"] == {
        "text_offset": [0, 5, 6],
        "token_logprobs": [-0.5] * 3,
        "tokens": ["Hello", ",", " 世界"],
        # the likeliest token is another one that is spelt alike
        "top_logprobs": [{"t1": -1.0, word(p): -0.5, bytes_name(word(p)): -0.5} for p in range(3)],
    }
    (choice,) = server.complete("hi", max_tokens=1, logprobs=0).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"Hello": -0.5}]


def test_streamed_completion_logprobs_continue_their_offsets(server) -> None:
    events = server.events("/v1/completions", prompt="hi", max_tokens=3, logprobs=1)
    assert [
        event["choices"][0]["logprobs"] and event["choices"][0]["logprobs"]["text_offset"]
        for event in events
    ] == [[0], [5], [6]]


def test_chat_logprobs(server) -> None:
    (choice,) = server.chat("hi", max_tokens=3, logprobs=True, top_logprobs=2).json()["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["Hello", ",", " 世界"]
    last = choice["logprobs"]["content"][2]
    assert bytes(last["bytes"]).decode() == " 世界" and [
        top["token"] for top in last["top_logprobs"]
    ] == [" 世界", "t1"]
    (choice,) = server.chat("hi", max_tokens=1, logprobs=True).json()["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    messages = [{"role": "user", "content": "hi"}]
    events = server.events(
        "/v1/chat/completions", messages=messages, max_tokens=2, logprobs=True, top_logprobs=1
    )
    assert [
        e["choices"][0]["logprobs"]["content"][0]["token"]
        for e in events
        if e["choices"][0]["logprobs"]
    ] == ["Hello", ","]


def test_token_ids_on_request(server) -> None:
    (choice,) = server.complete([5, 6, 7], max_tokens=3, return_token_ids=True).json()["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([100, 101, 102], [5, 6, 7])
    body = server.chat("hi", max_tokens=2, return_token_ids=True).json()
    chat = server.stack.words.encode(server.stack.generates()[-1].prompt)
    assert body["prompt_token_ids"] == chat and body["choices"][0]["token_ids"] == [100, 101]
    events = server.events("/v1/completions", prompt=[5, 6], max_tokens=2, return_token_ids=True)
    assert [event["choices"][0]["token_ids"] for event in events] == [[100], [101]]
    assert [event["choices"][0].get("prompt_token_ids") for event in events] == [[5, 6], None]
    events = server.events(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=2,
        return_token_ids=True,
    )
    assert [event.get("prompt_token_ids") for event in events] == [chat, None, None]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"


def test_stop_reason(server) -> None:
    (choice,) = server.complete("stop", stop="##").json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == (
        "stop",
        "##",
        expected(5),
    )


# --- accidents ---


@pytest.mark.parametrize("accident", ["lost", "gap"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_accident_is_not_seen_by_the_client(server, accident: str, stream: bool) -> None:
    if stream:
        events = server.events(
            "/v1/completions", prompt=accident, max_tokens=8, stream_options={"include_usage": True}
        )
        assert [event["choices"][0]["text"] for event in events[:-1]] == [word(p) for p in range(8)]
        usage = events[-1]["usage"]
    else:
        body = server.complete(accident, max_tokens=8).json()
        assert body["choices"][0]["text"] == expected(8)
        usage = body["usage"]
    first, second = server.stack.generates()
    assert (
        usage == USAGE
        and (first.attempt, second.attempt) == (1, 2)
        and tokens_of(second) == [100, 101, 102]
    )


@pytest.mark.parametrize("accident", ["kill_tokenizer", "new_scheduler"])
def test_a_stack_in_pieces_is_not_seen_by_the_client(serve, accident: str) -> None:
    with (
        serve() as server,
        server.http.stream(
            "POST", "/v1/completions", json={"prompt": "slow", "stream": True, "max_tokens": 12}
        ) as answer,
    ):
        text, broken = "", False
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            if text and not broken:
                broken = True
                getattr(server.stack, accident)()
        assert text == expected(12) and server.stack.generates()[-1].attempt == 2


def test_a_failure_is_told_without_its_details(server) -> None:
    answer = server.complete("failed", max_tokens=8)
    assert answer.status_code == 500 and "0x" not in answer.text and "/opt" not in answer.text
    assert answer.json()["error"]["type"] == "request_failed"


def test_a_failure_in_a_stream_is_an_event(server) -> None:
    events = server.events("/v1/completions", prompt="failed", max_tokens=8)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == expected(3)
    assert events[-1]["error"]["code"] == 500 and "0x" not in json.dumps(events[-1])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [400, 429])
def test_a_refusal_is_an_http_status(server, status: int, stream: bool) -> None:
    answer = server.complete(f"refuse{status}", stream=stream)
    body = answer.json()
    assert (
        answer.status_code == status
        and body["message"] == body["error"]["message"] == "System role not supported"
    )
    assert body["param"] == "messages" and answer.headers.get("retry-after") == (
        "7" if status == 429 else None
    )


def test_one_refused_choice_ends_the_others(server) -> None:
    assert server.complete(["hang", "refuse400"]).status_code == 400
    server.settle(lambda: len(server.stack.cancels()) == 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels(server, stream: bool) -> None:
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.3) as client:
        client.post("/v1/completions", json={"prompt": ["hang", "hang"], "stream": stream})
    server.settle(lambda: len(server.stack.cancels()) == 2)
    assert server.stack.cancels() == {(g.rid, 1) for g in server.stack.generates()}
    server.settle(lambda: len(server.owner) == 0)


# --- the openai client ---


def test_openai_client_streams(server) -> None:
    chunks = list(
        server.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(8)
    assert (
        chunks[0].choices[0].delta.role == "assistant"
        and chunks[-1].choices[0].finish_reason == "length"
    )
    text = server.client.completions.create(model=MODEL, prompt="hi", max_tokens=4).choices[0].text
    assert text == expected(4)


def test_openai_client_errors(server) -> None:
    messages = [{"role": "user", "content": "refuse400"}]
    with pytest.raises(openai.BadRequestError) as bad:
        server.client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    assert (
        str(bad.value.code) == "400"
        and bad.value.type == "BadRequestError"
        and "System role" in bad.value.message
    )
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="other", prompt="hi")
    with pytest.raises(openai.RateLimitError):
        server.client.completions.create(model=MODEL, prompt="refuse429")
    with pytest.raises(openai.APIError) as failed:
        list(server.client.completions.create(model=MODEL, prompt="failed", stream=True))
    assert "could not finish" in failed.value.message


def test_openai_client_models(server) -> None:
    assert [model.id for model in server.client.models.list().data] == [MODEL, "alias"]
    assert server.client.models.retrieve(MODEL).id == MODEL


def test_a_client_that_hangs_up_at_done_is_no_error(server, caplog) -> None:
    body = json.dumps({"prompt": "hi", "stream": True, "max_tokens": 2}).encode()
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", server.frontend.port), 5) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )
            answer = b""
            while b"[DONE]" not in answer:
                answer += client.recv(65536)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert server.complete("hi").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
