"""/tokenize and /detokenize."""

import pytest
from api.checks import check_error, refused
from pagewire_protocol.messages import Tokenize


def test_a_text(server) -> None:
    body = server.post("/tokenize", prompt="one two").json()
    assert set(body) == {"count", "max_model_len", "tokens", "token_strs"}
    assert (
        body["count"] == 2 == len(body["tokens"])
        and body["max_model_len"] == 4096
        and body["token_strs"] is None
    )
    body = server.post(
        "/tokenize",
        model="alias",
        prompt="one two",
        return_token_strs=True,
        add_special_tokens=False,
    ).json()
    assert body["token_strs"] == ["one", " two"]
    questions = [question for question in server.stack.received if isinstance(question, Tokenize)]
    assert [question.add_special_tokens for question in questions] == [True, False]
    assert server.post("/detokenize", tokens=body["tokens"]).json() == {"prompt": "one two"}
    assert server.post("/tokenize", prompt="").json()["count"] == 0
    assert server.post("/detokenize", tokens=[]).json() == {"prompt": ""}


def test_a_conversation(server) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = server.post(
        "/tokenize",
        messages=messages,
        return_token_strs=True,
        add_generation_prompt=False,
        chat_template_kwargs={"a": 1},
        tools=None,
    ).json()
    assert body["token_strs"] == [" user:", " hi"]
    (question,) = server.stack.received
    chat = question.prompt.chat
    assert (
        not question.add_special_tokens
        and not chat.add_generation_prompt
        and chat.template_kwargs == b'{"a":1}'
    )


@pytest.mark.parametrize(
    ("path", "body", "param", "part"),
    [
        ("/tokenize", {}, "prompt", "Exactly one"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt", "Exactly one"),
        ("/tokenize", {"messages": []}, "messages", "got 0"),
        ("/tokenize", {"prompt": ["x"]}, "prompt", "str"),
        ("/tokenize", {"prompt": "refuse"}, "prompt", "There is a word that cannot be."),
        ("/tokenize", {"prompt": "x", "top_k": 1}, "top_k", "not supported"),
        ("/detokenize", {}, "tokens", "missing"),
        ("/detokenize", {"tokens": "x"}, "tokens", "array"),
        ("/detokenize", {"tokens": [1000]}, "tokens", "1000"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "-1"),
        ("/detokenize", {"tokens": [2**40]}, "tokens", "1000"),
        ("/detokenize", {"tokens": [1.5]}, "tokens", "int"),
    ],
)
def test_what_is_wrong(server, path: str, body: dict, param: str, part: str) -> None:
    refused(server.post(path, **body), param, part)


def test_another_model_and_another_method(server) -> None:
    check_error(server.post("/tokenize", model="X", prompt="x"), 404, "NotFoundError", "model")
    check_error(server.http.get("/tokenize"), 405, "MethodNotAllowedError")


def test_without_a_tokenizer(serve) -> None:
    with serve(has_text=False) as server:
        refused(server.post("/tokenize", prompt="x"), "prompt", "--skip-tokenizer-init")


def test_the_prompt_of_a_request_for_an_answer(server) -> None:
    body = {"messages": [{"role": "user", "content": "hi there"}], "max_tokens": 5, "stream": True}
    rendered = server.post("/v1/chat/completions/render", **body).json()
    answer = server.post("/v1/chat/completions", **{**body, "stream": False}, return_token_ids=True)
    assert rendered["token_ids"] == answer.json()["prompt_token_ids"] != []
    prompts = ["one two", "three"]
    rendered = server.post("/v1/completions/render", prompt=prompts, n=2, no_stop_trim=False).json()
    tokens = [server.post("/tokenize", prompt=prompt).json()["tokens"] for prompt in prompts]
    assert [one["token_ids"] for one in rendered] == tokens
    assert server.post("/v1/completions/render", prompt=[5, 6]).json()[0]["token_ids"] == [5, 6]
    refused(server.post("/v1/completions/render", prompt="x", max_tokens=0), "max_tokens", "0")
    refused(
        server.post("/v1/completions/render", prompt="x", truncate_prompt_tokens=1),
        "truncate_prompt_tokens",
        "not supported here",
    )
