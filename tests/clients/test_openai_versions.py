"""The OpenAI client, today's and the one the tutorials pin: the same program, against a stack
without and one with a key."""

import json
from typing import Any

import pytest


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, Any]]:
    """What the program printed, by version: it runs once with each."""
    return {}


@pytest.fixture
def told(call_openai: Any, endpoint: Any, said: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if call_openai.version not in said:
        said[call_openai.version] = json.loads(
            call_openai("openai_calls.py", endpoint.base, endpoint.key)
        )
    return said[call_openai.version]


def test_an_open_stack(told: dict[str, Any], call_openai: Any) -> None:
    assert (told["version"] == "1.17.1") is (call_openai.version == "1.17.1")
    assert (
        told["model"] == told["retrieved"] == told["keyless"] == "google/gemma-2b"
        and told["system"] == "assistant"
    )
    completion = told["completion"]
    assert completion["object"] == "text_completion" and completion["id"].startswith("cmpl-")
    (choice,) = completion["choices"]
    assert (
        choice["text"] == told["text_stream"]
        and choice["finish_reason"] == "length"
        and choice["logprobs"] is None
    )
    usage = completion["usage"]
    assert usage["completion_tokens"] == 20 and usage["total_tokens"] == usage["prompt_tokens"] + 20
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0

    chat = told["chat"]
    assert (
        chat["object"] == "chat.completion" and chat["choices"][0]["message"]["role"] == "assistant"
    )
    assert chat["choices"][0]["message"]["content"] == told["chat_stream"]["text"] != ""
    assert told["chat_stream"]["role"] == "assistant" and told["chat_stream"]["reason"] == "length"
    assert told["chat_stream"]["usage"]["completion_tokens"] == 20
    assert set(told["chat_logprobs"]) >= {"token", "logprob", "bytes", "top_logprobs"}


def test_choices_and_scores(told: dict[str, Any]) -> None:
    assert len(told["several"]) == 4 and len(set(told["several"])) > 1 and told["best"] == 2
    assert (
        len(told["beams"]) == 2
        and told["beams"][0] != told["beams"][1]
        and told["extra"]
        and told["biased"] == "length"
    )
    (scored,) = told["scored"]["choices"]
    assert (
        scored["text"].startswith("JupySQL is") and scored["logprobs"]["token_logprobs"][0] is None
    )
    assert "".join(scored["logprobs"]["tokens"]) == scored["text"]
    columns = {
        len(scored["logprobs"][name])
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    assert columns == {told["scored"]["usage"]["prompt_tokens"] + 1}


def test_failures(told: dict[str, Any]) -> None:
    assert told["no_model"] == {
        **told["no_model"],
        "kind": "NotFoundError",
        "status": 404,
        "type": "NotFoundError",
    }
    assert "The model `no/such` does not exist" in told["no_model"]["text"]
    assert told["bad"] == {
        **told["bad"],
        "kind": "BadRequestError",
        "status": 400,
        "type": "BadRequestError",
    }
    assert "max_tokens" in told["bad"]["text"] and "1024" in told["bad_stream"]["text"]


def test_many_at_once(told: dict[str, Any]) -> None:
    assert len(told["many"]) == 20 and all(told["many"])


def test_a_stack_with_a_key_and_a_template_without_system(call_openai: Any, guarded: Any) -> None:
    told = json.loads(call_openai("openai_calls.py", guarded.base, guarded.key))
    assert (
        told["model"] == "/input0/Qwen-1_8B-Chat/"
        and told["chat"]["choices"][0]["message"]["content"]
    )
    assert "Error code: 401" in told["keyless"]
    assert told["system"]["type"] == "BadRequestError" and str(told["system"]["code"]) == "400"
    assert (
        told["system"]["text"].startswith("Error code: 400 - ")
        and "System role not supported" in told["system"]["text"]
    )
    if call_openai.version == "1.17.1":
        assert told["keyless"] == "Error code: 401 - {'error': 'Unauthorized'}"
        assert (
            "{'object': 'error', 'message': 'System role not supported', 'type': 'BadRequestError'"
            in told["system"]["text"]
        )
