"""Several choices: n, the best of several, beam search, and the rules between them."""

import httpx2 as httpx
import pytest
from api.checks import check_error, refused
from api.fake_stack import HANG, expected
from pagewire.requests.beam_search import BeamSearch

BEAMS = {"use_beam_search": True, "best_of": 3, "temperature": 0}


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        (
            {"n": 2, "best_of": 1},
            "best_of",
            "best_of must be greater than or equal to n, got n=2 and best_of=1.",
        ),
        ({"n": 2, "temperature": 0}, "n", "n must be 1 when using greedy sampling, got 2."),
        (
            {"best_of": 2, "temperature": 0},
            "best_of",
            "best_of must be 1 when using greedy sampling.Got 2.",
        ),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        (
            {**BEAMS, "best_of": 1},
            "best_of",
            "best_of must be greater than 1 when using beam search. Got 1.",
        ),
        (
            {"use_beam_search": True},
            "best_of",
            "best_of must be greater than 1 when using beam search. Got 1.",
        ),
        ({**BEAMS, "best_of": 17}, "best_of", "16"),
        (
            {**BEAMS, "temperature": 0.5},
            "temperature",
            "temperature must be 0 when using beam search.",
        ),
        ({**BEAMS, "top_p": 0.5}, "top_p", "top_p must be 1 when using beam search."),
        ({**BEAMS, "top_k": 5}, "top_k", "top_k must be -1 when using beam search."),
        ({**BEAMS, "early_stopping": "soon"}, "early_stopping", "True, False, or 'never'"),
        ({**BEAMS, "early_stopping": 1}, "early_stopping", "int"),
        ({**BEAMS, "length_penalty": 101}, "length_penalty", "100"),
        ({**BEAMS, "stop": "x"}, "stop", "beam search"),
        ({**BEAMS, "presence_penalty": 1}, "presence_penalty", "beam search"),
        ({**BEAMS, "repetition_penalty": 1.1}, "repetition_penalty", "beam search"),
        ({**BEAMS, "logit_bias": {"1": 1}}, "logit_bias", "beam search"),
        ({**BEAMS, "prompt_logprobs": 0}, "prompt_logprobs", "beam search"),
        ({**BEAMS, "echo": True, "logprobs": 1}, "echo", "beam search"),
        ({**BEAMS, "max_tokens": 4096}, "max_tokens", "4096"),
    ],
)
def test_rules(server, body: dict, param: str, text: str) -> None:
    refused(server.complete("hi", **body), param, text)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_best_of_several(server, path: str) -> None:
    body = (
        {"prompt": "varied"}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "varied"}]}
    )
    asked = {"logprobs": True, "top_logprobs": 0} if "messages" in body else {"logprobs": 0}
    answer = server.post(path, **body, **asked, n=2, best_of=6, max_tokens=3, seed=11).json()
    values = sorted(generate.sampling.seed % 97 for generate in server.stack.generates())
    assert len(values) == 6 and len(set(values)) > 2
    shown = [choice["logprobs"] for choice in answer["choices"]]
    firsts = [
        logprobs["content"][0]["logprob"]
        if "content" in logprobs
        else logprobs["token_logprobs"][0]
        for logprobs in shown
    ]
    assert firsts == [-0.5 - value for value in values[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 18 and answer["usage"]["prompt_tokens"] == 3


def test_ranking_shows_no_log_probabilities_that_were_not_asked_for(server) -> None:
    answer = server.complete(["varied a", "varied b"], best_of=4, max_tokens=2).json()
    assert [
        (choice["index"], choice["text"], choice["logprobs"]) for choice in answer["choices"]
    ] == [
        (0, expected(2), None),
        (1, expected(2), None),
    ]
    assert {generate.sampling.logprobs for generate in server.stack.generates()} == {0} and len(
        server.stack.generates()
    ) == 8


def test_best_of_n_is_n(server) -> None:
    assert len(server.complete("hi", n=2, best_of=2, stream=False).json()["choices"]) == 2
    assert server.complete("hi", n=2, best_of=2, stream=True).status_code == 200


# --- beam search: every token of the scripted stack has the same candidates, ids 0, 1, 2 (the end),
#   ... at -0.5, -1.0, -1.5, ... ---


def searched(width: int, max_tokens: int, ends: set[int], **options: object) -> list:
    search = BeamSearch(width, max_tokens, ends, **options)
    while search.live:
        row = [(i, -0.5 * (i + 1)) for i in range(search.candidates)]
        search.advance([row] * len(search.live))
    return search.best(width)


def names(hypothesis, text: bool = True) -> str:
    tokens = hypothesis.beam.tokens()
    return "".join(
        f"<{token}>" for token in (tokens if hypothesis.end is None or not text else tokens[:-1])
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": -1.0},
        {"length_penalty": 2.0, "early_stopping": True},
        {"early_stopping": "never"},
    ],
)
def test_beam_search(server, options: dict) -> None:
    answer = server.complete("one two", **{**BEAMS, "n": 3}, max_tokens=4, **options).json()
    best = searched(3, 4, {2}, **options)
    assert [choice["text"] for choice in answer["choices"]] == [names(one) for one in best]
    assert [choice["finish_reason"] for choice in answer["choices"]] == [
        "length" if one.end is None else "stop" for one in best
    ]
    assert answer["usage"]["prompt_tokens"] == 2 and answer["usage"]["completion_tokens"] == sum(
        one.beam.length for one in best
    )
    assert all(generate.sampling.max_tokens == 1 for generate in server.stack.generates())


def test_beam_search_shows_log_probabilities_and_ids(server) -> None:
    body = server.complete(
        [5, 6], **BEAMS, n=2, max_tokens=3, logprobs=1, return_token_ids=True, stop_token_ids=[1]
    ).json()
    best = searched(3, 3, {1, 2})[:2]
    assert [choice["token_ids"] for choice in body["choices"]] == [
        one.beam.tokens() for one in best
    ]
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[5, 6]] * 2
    for choice, hypothesis in zip(body["choices"], best, strict=True):
        tokens = hypothesis.beam.tokens()
        assert choice["logprobs"]["token_logprobs"] == [-0.5 * (token + 1) for token in tokens]
        assert choice["stop_reason"] == (1 if hypothesis.end == 1 else None)
        assert choice["logprobs"]["top_logprobs"][0].keys() >= {choice["logprobs"]["tokens"][0]}


def test_beam_search_of_a_chat_and_as_a_stream(server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    whole = server.chat("hi", use_beam_search=True, n=2, max_tokens=4).json()
    best = [names(one) for one in searched(2, 4, {2})]
    assert [choice["message"]["content"] for choice in whole["choices"]] == best
    options = {"include_usage": True}
    events = server.events(
        "/v1/chat/completions",
        messages=messages,
        use_beam_search=True,
        n=2,
        max_tokens=4,
        stream_options=options,
    )
    texts = ["", ""]
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == best and events[-1]["usage"]["completion_tokens"] > 0


def test_beam_search_without_max_tokens_may_use_the_context(server) -> None:
    body = server.chat(
        "hi", use_beam_search=True, n=2, stop_token_ids=[0], early_stopping=True
    ).json()
    assert body["choices"][0]["finish_reason"] == "stop" and body["choices"][0]["stop_reason"] == 0


def test_a_beam_that_is_refused_ends_the_search(server) -> None:
    check_error(server.complete("refuse400 me", **BEAMS), 400, "BadRequestError", "messages")
    server.settle(lambda: len(server.owner) == 0)


def test_prompts_are_searched_side_by_side(server) -> None:
    body = server.complete(["one", "two three"], **BEAMS, n=2, max_tokens=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == [
        names(one) for one in searched(3, 3, {2})[:2]
    ] * 2
    assert body["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_search(server, stream: bool) -> None:
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.3) as client:
        client.post(
            "/v1/completions", json={"prompt": [HANG], **BEAMS, "stream": stream, "max_tokens": 5}
        )
    server.settle(lambda: len(server.owner) == 0)
    assert server.stack.generates()
