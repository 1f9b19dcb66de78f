"""vLLM's parameters beyond OpenAI's: each at its limit, one beyond it, of a wrong type, null, and
where it arrives."""

import pytest
from api.checks import refused
from pagewire.config import FrontendConfig
from pagewire_protocol.columns import unpack

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("best_of", 0, ("1", "1024", "got 0")),
        ("best_of", 1025, ("1024", "got 1025")),
        ("n", 1025, ("1024", "got 1025")),
        ("best_of", "2", ("int", "str")),
        ("best_of", 1.5, ("int",)),
        ("echo", 1, ("bool", "int")),
        ("suffix", "x", ("suffix", "fill in")),
        ("max_tokens", 0, ("between 1 and", "got 0")),
        ("logprobs", -1, ("0", "20", "got -1")),
        ("prompt_logprobs", 21, ("20", "got 21")),
        ("prompt_logprobs", -1, ("0", "got -1")),
        ("prompt_logprobs", True, ("int", "bool")),
        ("logit_bias", {"1": 100.5}, ("-100", "100", "got 100.5")),
        ("logit_bias", {"1": -101}, ("got -101",)),
        ("logit_bias", {"1000": 1}, ("1000", "999")),
        ("logit_bias", {"-1": 1}, ("'-1'", "token ids")),
        ("logit_bias", {"x": 1}, ("'x'", "token ids")),
        ("logit_bias", {"1" * 5000: 1}, ("token ids",)),
        ("logit_bias", {"²": 1}, ("token ids",)),
        ("logit_bias", {str(i): 1 for i in range(1025)}, ("1024", "got 1025")),
        ("logit_bias", {"1": "2"}, ("float", "str")),
        ("logit_bias", [1], ("object", "array")),
        ("allowed_token_ids", [], ("empty",)),
        ("allowed_token_ids", [1000], ("1000", "999")),
        ("allowed_token_ids", [-1], ("-1",)),
        ("allowed_token_ids", [1] * 65537, ("65536", "got 65537")),
        ("allowed_token_ids", ["1"], ("int", "str")),
        ("bad_words", [""], ("1", "256", "got 0")),
        ("bad_words", ["x" * 257], ("256", "got 257")),
        ("bad_words", ["x"] * 129, ("128", "got 129")),
        ("bad_words", "x", ("array", "str")),
        ("truncate_prompt_tokens", -2, ("-1", "got -2")),
        ("truncate_prompt_tokens", 0, ("-1", "at least 1", "got 0")),
        ("truncate_prompt_tokens", 2**31, ("got 2147483648",)),
        ("stop_token_ids", [2**31], ("2147483647",)),
        ("priority", -(2**31) - 1, ("-2147483648",)),
        ("cache_salt", "", ("1", "128", "got 0")),
        ("request_id", "a\r\nb", ("printable",)),
        ("request_id", "x" * 129, ("128",)),
        (
            "length_penalty",
            1.5,
            (
                "length_penalty is not effective and must be the default value of 1.0 when not using beam search.",
            ),
        ),
        (
            "early_stopping",
            True,
            ("early_stopping is not effective and must be False when not using beam search.",),
        ),
        ("return_token_ids", "yes", ("bool", "str")),
        ("return_tokens_as_token_ids", 1, ("bool", "int")),
        ("use_beam_search", 1, ("bool", "int")),
    ],
)
def test_limits(server, name: str, value: object, parts: tuple[str, ...]) -> None:
    refused(server.complete("hi", **{name: value}), name, *parts)
    assert not server.stack.received


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 1024),
        ("n", 1024),
        ("logit_bias", {str(i): -100 for i in range(999)}),
        ("logit_bias", {"999": 100}),
        ("logit_bias", {}),
        ("allowed_token_ids", list(range(1000))),
        ("bad_words", ["x" * 256] * 128),
        ("bad_words", []),
        ("stop", ["x" * 1024] * 16),
        ("stop_token_ids", [2**31 - 1] * 128),
        ("truncate_prompt_tokens", -1),
        ("truncate_prompt_tokens", 2**31 - 1),
        ("prompt_logprobs", 20),
        ("logprobs", 20),
        ("top_k", 0),
        ("top_k", -1),
        ("temperature", 3),
        ("priority", -(2**31)),
        ("cache_salt", "x" * 128),
        ("seed", -(2**63)),
        ("length_penalty", 1),
        ("early_stopping", False),
        ("suffix", ""),
        ("service_tier", "auto"),
        ("safety_identifier", "a"),
        ("prompt_cache_key", "b"),
        ("store", True),
        ("metadata", {"a": "b"}),
    ],
)
def test_what_is_just_allowed(server, name: str, value: object) -> None:
    assert server.complete("hi", max_tokens=1, **{name: value}).status_code == 200


def test_null_is_as_good_as_nothing(server) -> None:
    names = [
        "best_of",
        "echo",
        "suffix",
        "logprobs",
        "prompt_logprobs",
        "logit_bias",
        "allowed_token_ids",
        "bad_words",
        "truncate_prompt_tokens",
        "stop",
        "stop_token_ids",
        "priority",
        "cache_salt",
        "request_id",
        "length_penalty",
        "early_stopping",
        "use_beam_search",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "n",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "min_tokens",
        "stream",
        "stream_options",
        "user",
        "metadata",
        "tools",
        "tool_choice",
        "store",
        "service_tier",
        "response_format",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "ignore_eos",
        "skip_special_tokens",
        "add_special_tokens",
    ]
    assert server.complete("hi", **dict.fromkeys(names)).json()["usage"]["completion_tokens"] == 16
    chat = [
        *names,
        "top_logprobs",
        "max_completion_tokens",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
    ]
    assert server.chat("hi", **dict.fromkeys(chat)).status_code == 200


def test_biases_and_words_arrive(server) -> None:
    answer = server.complete(
        "hi",
        logit_bias={"5": -100, "7": 1.5},
        allowed_token_ids=[5, 7, 9],
        bad_words=["one", " two"],
        truncate_prompt_tokens=-1,
        prompt_logprobs=3,
        logprobs=2,
    )
    assert answer.status_code == 200
    (generate,) = server.stack.generates()
    sampling = generate.sampling
    assert unpack("i", sampling.bias_ids).tolist() == [5, 7] and unpack(
        "f", sampling.bias_values
    ).tolist() == [-100.0, 1.5]
    assert unpack("i", sampling.allowed_ids).tolist() == [5, 7, 9]
    assert (sampling.prompt_logprobs, sampling.logprobs) == (3, 2)
    assert generate.text.bad_words == ("one", " two") and generate.text.truncate_prompt == -1


def test_a_temperature_too_low_to_divide_by_is_raised(server) -> None:
    for given in (0.005, 0.000001, 2.5):
        server.complete("hi", temperature=given)
    assert [generate.sampling.temperature for generate in server.stack.generates()] == [
        0.01,
        0.000001,
        2.5,
    ]


def test_template_variables_arrive(server) -> None:
    assert (
        server.chat("hi", chat_template_kwargs={"enable_thinking": False, "who": ["a"]}).status_code
        == 200
    )
    assert (
        server.stack.generates()[0].prompt.chat.template_kwargs
        == b'{"enable_thinking":false,"who":["a"]}'
    )
    for name in ("messages", "chat_template", "tokenize"):
        refused(server.chat("hi", chat_template_kwargs={name: 1}), "chat_template_kwargs", name)
    refused(
        server.chat("hi", chat_template_kwargs={"x": "y" * 70_000}), "chat_template_kwargs", "65536"
    )
    refused(server.chat("hi", chat_template_kwargs=[1]), "chat_template_kwargs", "object")


def test_a_truncated_prompt_may_be_longer_than_the_context(server) -> None:
    refused(server.complete([1] * 5000), "prompt", "5000", "4096")
    assert server.complete([1] * 5000, truncate_prompt_tokens=10).status_code == 200


def test_more_choices_than_can_be_run(server) -> None:
    refused(server.complete(["a"] * 9, n=128), "prompt", "n=128", "1152", "1024")
    refused(server.complete(["a"] * 9, best_of=128), "prompt", "best_of=128", "1152")
    refused(
        server.complete(["a"] * 65, best_of=16, use_beam_search=True),
        "prompt",
        "best_of=16",
        "1040",
    )
    refused(
        server.complete(["a" * 4000] * 50, echo=True, logprobs=20), "prompt", "Scoring", "1048576"
    )
    refused(
        server.complete(["a"] * 8, n=128, allowed_token_ids=[1] * 60_000),
        "prompt",
        "n=128",
        "234 MiB",
        "16",
    )
    assert not server.stack.received


def test_many_copies_of_a_long_prompt(serve) -> None:
    with serve(config=FrontendConfig(max_body_mb=4)) as server:
        refused(server.complete("a" * (2 << 20), n=128), "prompt", "n=128", "256 MiB", "16")
        refused(server.chat("a" * (2 << 20), best_of=128), "prompt", "best_of=128", "256 MiB")
        assert not server.stack.received


def test_parameters_of_the_other_endpoint(server) -> None:
    refused(server.chat("hi", suffix="x"), "suffix", "not supported")
    refused(
        server.complete("hi", chat_template_kwargs={"a": 1}),
        "chat_template_kwargs",
        "not supported",
    )
    refused(server.complete("hi", top_logprobs=2), "top_logprobs", "not supported")
    refused(server.post("/v1/completions", **CHAT), "messages", "not supported")
