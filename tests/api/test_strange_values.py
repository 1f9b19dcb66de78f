"""Every parameter with every kind of value that does not belong there: an answer or a refusal,
never a failure, and the next request is served."""

import json

import pytest
from pagewire.frontend.neutral import NEUTRAL
from pagewire.frontend.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**31,
    -(2**31) - 1,
    2**63,
    2**64,
    10**400,
    1e308,
    "",
    "x",
    "é" * 300,
    [],
    [-1],
    [None],
    [[]],
    {},
]
VALUES += [{"x": 1}, {"1": None}, [[1], "a"], "\u0000", "\U0001f999"]
BODIES = {
    "/v1/completions": (CompletionRequest, {"prompt": "hi", "max_tokens": 2}),
    "/v1/chat/completions": (
        ChatRequest,
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    ),
    "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}


@pytest.mark.parametrize("path", BODIES)
def test_strange_values(server, path: str) -> None:
    kind, body = BODIES[path]
    for name in [*kind.__struct_fields__, *NEUTRAL, "no_such_thing"]:
        for value in VALUES:
            answer = server.http.post(path, content=json.dumps({**body, name: value}))
            assert answer.status_code in (200, 400, 404), (name, value, answer.text)
            if answer.status_code == 400:
                assert answer.json()["message"] and len(answer.text) < 5000, (name, value)
    server.settle(lambda: len(server.owner) == 0)


@pytest.mark.parametrize("path", BODIES)
def test_strange_bodies(server, path: str) -> None:
    _, body = BODIES[path]
    whole = json.dumps(body).encode()
    for content in (
        whole[:-1],
        whole + b"x",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        whole.replace(b"{", b"{{"),
        whole.replace(b'"', b"'"),
        b"\xff\xfe",
    ):
        answer = server.http.post(path, content=content)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "BadRequestError", (
            content
        )
    twice = whole[:-1] + b"," + whole[1:]
    assert server.http.post(path, content=twice).status_code == 200
