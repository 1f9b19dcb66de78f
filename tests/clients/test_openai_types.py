"""Every shape of an answer against the types of OpenAI's own client, which checks them strictly when
it is asked to: fields, their types, and the values that a field may have."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from clients.conftest import Endpoint
from openai.types import Completion
from openai.types.chat import ChatCompletionMessageParam

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something."}]
USAGE = {"include_usage": True}
ALWAYS_USAGE: Any = {"include_usage": True, "continuous_usage_stats": True}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "to the end of a text": {"stop": ["a", "e", "i"], "max_tokens": 64},
    "several": {"n": 3, "temperature": 1.0},
    "best of": {"extra_body": {"best_of": 3}, "n": 2},
    "beams": {"extra_body": {"use_beam_search": True, "best_of": 3}, "n": 2, "temperature": 0},
    "token ids": {"extra_body": {"return_token_ids": True}},
    "scored prompt": {"extra_body": {"prompt_logprobs": 2}},
    "one token": {"max_tokens": 1},
}
STREAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"n": 3, "temperature": 1.0},
    "usage": {"stream_options": USAGE},
    "usage in each": {"stream_options": ALWAYS_USAGE},
    "token ids": {"extra_body": {"return_token_ids": True}},
    "beams": {"extra_body": {"use_beam_search": True, "best_of": 3}, "n": 2, "temperature": 0},
}
NO_TOOLS: dict[str, Any] = {
    "extra_body": {"tools": None, "tool_choice": None, "functions": None, "reasoning_effort": None}
}


@pytest.fixture(scope="module")
def strict(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    """It raises APIResponseValidationError where an answer does not fit its type."""
    with openai.OpenAI(
        base_url=endpoint.base, api_key="EMPTY", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="module")
def lax(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.base, api_key="EMPTY", max_retries=0) as client:
        yield client


def completions(client: openai.OpenAI, model: str, **options: Any) -> Any:
    return client.completions.create(
        model=model, prompt="Mexico is", **{"max_tokens": 6, **options}
    )


def checked(completion: Completion) -> Completion:
    """A completion that a client without checks has read, against its type but for two values which
    OpenAI itself sends as null and the type forgets: the finish reason before the end, and the
    log-probability of a prompt's first token."""
    body = completion.model_dump()
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        if choice["logprobs"] and choice["logprobs"]["token_logprobs"][0] is None:
            del choice["logprobs"]["token_logprobs"][0]
            del choice["logprobs"]["top_logprobs"][0]
    Completion.model_validate(body)
    return completion


def chats(client: openai.OpenAI, model: str, **options: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=MESSAGES, **{"max_tokens": 6, **options}
    )


def test_a_wrong_shape_would_be_noticed(strict: openai.OpenAI) -> None:
    with pytest.raises(openai.APIResponseValidationError):
        strict.get("/models", cast_to=openai.types.Completion)


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_completions(strict: openai.OpenAI, endpoint: Endpoint, shape: str) -> None:
    answer = completions(strict, endpoint.model, **SHAPES[shape])
    assert len(answer.choices) == SHAPES[shape].get("n", 1)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    if shape != "scored prompt":
        assert answer.choices[0].prompt_logprobs is None
    if shape != "token ids":
        assert answer.choices[0].prompt_token_ids is None


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_chats(strict: openai.OpenAI, endpoint: Endpoint, shape: str) -> None:
    answer = chats(strict, endpoint.model, **SHAPES[shape])
    assert len(answer.choices) == SHAPES[shape].get("n", 1)
    assert "refusal" in answer.choices[0].message.model_fields_set
    assert answer.choices[0].message.refusal is None
    if shape != "scored prompt":
        assert answer.prompt_logprobs is None
    if shape != "token ids":
        assert answer.prompt_token_ids is None


def test_log_probabilities(strict: openai.OpenAI, lax: openai.OpenAI, endpoint: Endpoint) -> None:
    assert completions(strict, endpoint.model, logprobs=0).choices[0].logprobs.tokens
    scored = checked(completions(lax, endpoint.model, logprobs=2, echo=True))
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    for chunk in completions(lax, endpoint.model, logprobs=2, echo=True, stream=True):
        assert checked(chunk).choices[0].logprobs

    chat = chats(strict, endpoint.model, logprobs=True, top_logprobs=2).choices[0]
    assert len(chat.logprobs.content) == 6
    assert "refusal" in chat.logprobs.model_fields_set and chat.logprobs.refusal is None
    for chunk in chats(strict, endpoint.model, logprobs=True, top_logprobs=2, stream=True):
        logprobs = chunk.choices[0].logprobs
        assert logprobs is None or logprobs.refusal is None


@pytest.mark.parametrize("shape", STREAMS)
def test_completion_streams(lax: openai.OpenAI, endpoint: Endpoint, shape: str) -> None:
    stream = completions(lax, endpoint.model, stream=True, **STREAMS[shape])
    chunks = [checked(chunk) for chunk in stream]
    check_ends(chunks, shape)
    if shape == "token ids":
        assert chunks[0].choices[0].prompt_token_ids
    if shape == "plain":
        last = chunks[-1].choices[0]
        assert last.text and last.finish_reason == "length", "it comes with the last text"


@pytest.mark.parametrize("shape", STREAMS)
def test_chat_streams(strict: openai.OpenAI, endpoint: Endpoint, shape: str) -> None:
    chunks = list(chats(strict, endpoint.model, stream=True, **STREAMS[shape]))
    check_ends(chunks, shape)
    if shape == "token ids":
        assert chunks[0].prompt_token_ids
    if shape == "plain":
        last = chunks[-1].choices[0]
        assert last.delta.content and last.finish_reason == "length", "it comes with the last text"


def check_ends(chunks: list[Any], shape: str) -> None:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    ends = [choice for choice in choices if choice.finish_reason]
    assert len(ends) == STREAMS[shape].get("n", 1)
    assert bool(chunks[-1].usage) is ("stream_options" in STREAMS[shape])


def test_what_is_sent_as_null(strict: openai.OpenAI, endpoint: Endpoint) -> None:
    message = chats(strict, endpoint.model, **NO_TOOLS).choices[0].message
    assert message.tool_calls is None and message.content


def test_a_conversation_that_goes_on(strict: openai.OpenAI, endpoint: Endpoint) -> None:
    """Programs send the message that they got, with all its fields."""
    message = chats(strict, endpoint.model).choices[0].message
    again = strict.chat.completions.create(
        model=endpoint.model,
        messages=[*MESSAGES, message.model_dump(), *MESSAGES],
        max_tokens=2,
    )
    assert again.choices[0].message.content


def test_models(strict: openai.OpenAI, endpoint: Endpoint) -> None:
    (card,) = strict.models.list().data
    assert card.id == endpoint.model and card == strict.models.retrieve(endpoint.model)
    assert card.root == "HuggingFaceTB/SmolLM2-135M-Instruct", "the model's own path"


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (openai.NotFoundError, {"model": "no/such"}),
        (openai.BadRequestError, {"max_tokens": 0}),
        (openai.BadRequestError, {"extra_body": {"no_such_thing": 1}}),
        (openai.BadRequestError, {"messages": [{"role": "usr", "content": "x"}]}),
        (openai.BadRequestError, {"messages": []}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_errors(
    strict: openai.OpenAI,
    endpoint: Endpoint,
    error: type[openai.APIStatusError],
    options: dict[str, Any],
    stream: bool,
) -> None:
    request = {"model": endpoint.model, "messages": MESSAGES, **options}
    with pytest.raises(error) as refusal:
        strict.chat.completions.create(stream=stream, **request)
    body = refusal.value.body
    assert isinstance(body, dict)
    assert {"message", "type", "param", "code"} <= body.keys()
    assert refusal.value.type and refusal.value.code == str(refusal.value.status_code)
