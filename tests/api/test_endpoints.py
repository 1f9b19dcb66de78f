"""Everything around generation: probes, models, metrics, keys, and the error for each way to be
wrong."""

import json
import re
from typing import Any

import pytest
from api.checks import LEAK, check_error, refused
from api.fake_stack import expected
from pagewire.frontend.stack import Stack
from pagewire.requests.counter_exchange import UNITS
from pagewire_protocol.messages import Roster
from pagewire_protocol.structs import SILENCE_S, Peer, Role
from prometheus_client.parser import text_string_to_metric_families

MODEL = "/models/tiny one/"


# --- probes ---


def test_probes_of_a_ready_stack(server) -> None:
    health = server.http.get("/health")
    assert health.status_code == 200 and health.content == b""
    assert server.http.get("/ready").json() == {"status": "ready"}
    assert server.http.get("/live").json()["status"] == "live"
    assert re.match(r"\d+\.\d+", server.http.get("/version").json()["version"])


def test_while_loading_everything_says_so(serve) -> None:
    with serve(ready=False) as server:
        for answer in (
            server.http.get("/health"),
            server.http.get("/ready"),
            server.complete("hi"),
            server.chat("hi", stream=True),
        ):
            body = check_error(answer, 503, "ServiceUnavailableError")
            assert (
                body["status"] == "loading"
                and "reading weights" in body["message"]
                and "42%" in body["message"]
            )
            assert {(row["role"], row["fraction"]) for row in body["loading"]} == {
                ("worker", 0.42),
                ("tokenizer", 0.42),
            }
            assert int(answer.headers["retry-after"]) > 0
        assert (
            server.http.get("/live").status_code == 200
            and server.http.get("/v1/models").json()["data"][0]["max_model_len"] is None
        )
        assert ready_metric(server) == 0
        server.stack.change(ready=True)
        server.wait_health(200)
        assert ready_metric(server) == 1
        assert server.complete("hi").status_code == 200


def ready_metric(server: Any) -> float:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    (sample,) = (
        one for family in families if family.name == "pagewire:ready" for one in family.samples
    )
    return sample.value


def test_a_silent_scheduler_is_not_ready() -> None:
    stack = Stack()
    assert not stack.ready(0.0) and "scheduler: waiting" in stack.unavailable(0.0).message
    peers = tuple(Peer(role, "x", "ipc:///x", role, True) for role in (Role.TOKENIZER, Role.WORKER))
    stack.on_roster(Roster(1, peers, 10, 10, (), True, True), 100.0)
    assert stack.ready(100.0 + SILENCE_S) and not stack.ready(100.1 + SILENCE_S)
    stack.draining = True
    assert not stack.ready(100.0) and "shutting down" in stack.unavailable(100.0).message


def test_figures_stay_where_a_roster_has_none() -> None:
    """As that of a new scheduler, before it knows who is a frontend: a count must not fall to 0."""
    stack = Stack()
    stack.on_roster(Roster(1, (), 0, 0, (), False, False, stats={"steps": 7.0}), 1.0)
    stack.on_roster(Roster(2, (), 0, 0, (), False, False), 2.0)
    assert stack.stats == {"steps": 7.0}


def test_counts_of_a_scheduler_that_was_not_heard_of_are_left_out(serve) -> None:
    with serve(stats={}) as server:
        text = server.http.get("/metrics").text
        assert "scheduler_steps_total" not in text and "vllm:num_requests_running" in text
        assert 'enable_prefix_caching="False"' in text


def test_models(server) -> None:
    cards = server.http.get("/v1/models").json()
    assert cards["object"] == "list" and [card["id"] for card in cards["data"]] == [MODEL, "alias"]
    card = cards["data"][0]
    assert (
        card["object"] == "model"
        and card["max_model_len"] == 4096
        and card["root"] == MODEL
        and card["parent"] is None
    )
    assert isinstance(card["created"], int) and card["owned_by"] and card["permission"]
    for path in ("%2Fmodels%2Ftiny%20one%2F", "/models/tiny%20one/", "alias"):
        assert server.http.get("/v1/models/" + path).status_code == 200
    check_error(server.http.get("/v1/models/tiny"), 404, "NotFoundError", "model")


def test_metrics(serve) -> None:
    with serve(
        stats={
            "num_requests_running": 3,
            "kv_cache_usage_perc": 0.25,
            "prefix_cache_hits": 7,
            "steps_in_flight": 2,
            "iteration_tokens_le_8": 3,
            "iteration_tokens_le_inf": 4,
            "iteration_tokens_sum": 40,
            "kv_block_size": 16,
            "prefix_caching": 1,
        }
    ) as server:
        server.complete("stop", max_tokens=8)
        server.complete("refuse400")
        text = server.http.get("/metrics").text
    samples = {}
    helps: dict[str, str] = {}
    for family in text_string_to_metric_families(text):
        assert family.type in ("counter", "gauge", "histogram"), family.name
        # Of the library's own: metrics of the process.
        assert family.documentation and family.documentation not in helps.values(), family.name
        helps[family.name] = family.documentation
        names = {sample.name for sample in family.samples}
        assert family.type != "counter" or all(name.endswith("_total") for name in names)
        for sample in family.samples:
            if family.name.startswith("vllm:"):
                labels = sample.labels
                assert (labels["engine"], labels["model_name"]) == ("0", MODEL), sample.name
            label = next(
                (
                    sample.labels[k]
                    for k in ("finished_reason", "code", "le", "role")
                    if k in sample.labels
                ),
                "",
            )
            samples[sample.name, label] = sample.value
    assert (
        samples["vllm:num_requests_running", ""] == 3
        and samples["vllm:kv_cache_usage_perc", ""] == 0.25
    )
    assert (
        samples["vllm:prefix_cache_hits_total", ""] == 7
        and samples["vllm:num_preemptions_total", ""] == 0
    )
    assert samples["pagewire:scheduler_steps_in_flight", ""] == 2
    assert samples["vllm:gpu_prefix_cache_hits_total", ""] == 7
    assert samples["vllm:iteration_tokens_total_bucket", "8.0"] == 3
    assert samples["vllm:iteration_tokens_total_count", ""] == 4
    assert samples["vllm:iteration_tokens_total_sum", ""] == 40
    assert 'enable_prefix_caching="True"' in text and 'block_size="16"' in text
    assert samples["process_resident_memory_bytes", ""] > 1e6
    for name in ("http_responses", "resubmissions"):
        assert f"# TYPE pagewire:frontend_{name}_total counter" in text
    assert (
        samples["vllm:prompt_tokens_total", ""] == 3
        and samples["vllm:generation_tokens_total", ""] == 5
    )
    assert (
        samples["vllm:request_success_total", "stop"] == 1
        and samples["vllm:request_success_total", "error"] == 1
    )
    assert (
        samples["vllm:time_to_first_token_seconds_count", ""]
        == 1
        == samples["vllm:time_to_first_token_seconds_bucket", "+Inf"]
    )
    assert (
        samples["vllm:gpu_cache_usage_perc", ""] == 0.25
        and samples["vllm:request_params_n_sum", ""] == 2
    )
    for name, total in (
        ("prompt_tokens", 3),
        ("generation_tokens", 5),
        ("max_num_generation_tokens", 5),
        ("params_max_tokens", 8),
    ):
        assert (
            samples[f"vllm:request_{name}_sum", ""] == total
            and samples[f"vllm:request_{name}_count", ""] == 1
        )
    parts = [
        samples[f"vllm:request_{name}_time_seconds_sum", ""]
        for name in ("queue", "prefill", "decode")
    ]
    assert all(part > 0 for part in parts)
    # Each sum of seconds is rounded down.
    rounding = 3 / UNITS
    inference = samples["vllm:request_inference_time_seconds_sum", ""]
    assert sum(parts[1:]) == pytest.approx(inference, abs=rounding)
    assert sum(parts) <= samples["vllm:e2e_request_latency_seconds_sum", ""] + rounding
    first_token = samples["vllm:time_to_first_token_seconds_sum", ""]
    assert first_token == pytest.approx(sum(parts[:2]), abs=rounding)
    per_token = samples["vllm:request_time_per_output_token_seconds_sum", ""]
    assert per_token == pytest.approx(parts[2] / 4, abs=rounding)
    assert samples["vllm:time_per_output_token_seconds_count", ""] == 4
    assert (
        samples["vllm:inter_token_latency_seconds_count", ""] == 4
        and samples["vllm:e2e_request_latency_seconds_count", ""] == 1
    )
    assert (
        'http_responses_total{code="400",method="POST",route="/v1/completions"} 1.0' in text
        and samples["pagewire:service_ready", "worker"] == 1
    )


# --- requests that are wrong ---


def test_unknown_model(server) -> None:
    for answer in (server.complete("hi", model="X"), server.chat("hi", model="X")):
        assert (
            check_error(answer, 404, "NotFoundError", "model")["message"]
            == f"The model `X` does not exist. This server has `{MODEL}`, `alias`."
        )
    assert server.complete("hi", model=MODEL).status_code == 200
    assert server.complete("hi", model=MODEL.rstrip("/")).status_code == 404
    for nothing in (None, ""):
        assert server.complete("hi", model=nothing).status_code == 200
        assert server.chat("hi", model=nothing).status_code == 200


def test_unknown_routes_and_methods(server) -> None:
    check_error(server.http.get("/v1/nothing"), 404, "NotFoundError")
    answer = server.http.get("/v1/completions")
    assert (
        check_error(answer, 405, "MethodNotAllowedError")["message"].endswith("use POST.")
        and answer.headers["allow"] == "POST"
    )
    check_error(server.http.post("/health"), 405, "MethodNotAllowedError")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"nonsense",
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "zzz": ' + b"[" * 90000,
        b'{"prompt": "a", "n": 1' + b"0" * 9000 + b"}",
        b'{"prompt": "a", "best_of": ' + b"[" * 90000,
        b'{"prompt": "\\ud800"}',
    ],
)
def test_bodies_that_are_no_request(server, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = server.http.post(path, content=body)
        assert (
            answer.status_code == 400
            and answer.json()["error"]["code"] == 400
            and not LEAK.search(answer.text)
        )


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("n", 0, ("1", "1024", "got 0")),
        ("n", 1025, ("1024", "got 1025")),
        ("n", 2**63, ("n",)),
        ("n", True, ("int", "bool")),
        ("max_tokens", 0, ("1", "got 0")),
        ("max_tokens", -1, ("got -1",)),
        ("max_tokens", 2**31, ("2147483647",)),
        ("max_tokens", "9", ("int", "str")),
        ("temperature", -0.1, ("0", "got -0.1")),
        ("temperature", 101, ("100", "got 101")),
        ("top_p", 0, ("above 0",)),
        ("top_p", 1.1, ("1", "got 1.1")),
        ("top_k", -2, ("-1", "got -2")),
        ("min_p", 2, ("1", "got 2")),
        ("presence_penalty", 3, ("-2", "2", "got 3")),
        ("frequency_penalty", -3, ("-2", "got -3")),
        ("repetition_penalty", 0, ("above 0",)),
        ("min_tokens", 17, ("17", "16")),
        ("logprobs", 21, ("20", "got 21")),
        ("logprobs", True, ("bool",)),
        ("stop", [""], ("1", "1024", "got 0")),
        ("stop", ["x"] * 17, ("16", "got 17")),
        ("stop", "x" * 1025, ("1024", "got 1025")),
        ("stop_token_ids", [-1], ("0", "got -1")),
        ("stop_token_ids", list(range(129)), ("128", "129")),
        ("priority", 2**31, ("2147483647",)),
        ("cache_salt", "x" * 129, ("128", "129")),
        ("seed", 2**63, (str(2**63 - 1), f"got {2**63}")),
        ("seed", -(2**63) - 1, (str(-(2**63)), f"got {-(2**63) - 1}")),
        ("stream_options", {"include_usage": True}, ("stream=True",)),
        ("response_format", {"type": "yaml"}, ("yaml", "json_schema")),
        ("response_format", {"type": "json_schema"}, ("json_schema.schema",)),
        ("structured_outputs", {}, ("exactly one", "none")),
        ("structured_outputs", {"json": {}, "regex": "a"}, ("exactly one", "json and regex")),
        ("structured_outputs", {"choice": []}, ("at least one",)),
        ("structured_outputs", {"choice": ["x"] * 4097}, ("4097", "4096")),
        ("guided_json", [1], ("object",)),
        ("guided_json", "{", ("no JSON",)),
        ("guided_json", {"enum": list(range(20_000))}, ("20000", "4096")),
        ("guided_json", {"title": "x" * 200_000}, ("200012", "131072")),
        ("guided_json", {"properties": {str(i): {} for i in range(1001)}}, ("1001", "1000")),
        ("guided_json", {"items": {"pattern": "a\\"}}, ("single backslash",)),
        ("guided_json", {"patternProperties": {"\\\\\\": {}}}, ("single backslash",)),
        ("guided_regex", 7, ("str",)),
        ("guided_choice", [""], ("not empty",)),
        ("json_schema", json.loads('{"items":' * 70 + "{}" + "}" * 70), ("64 levels",)),
        ("json_schema", 5, ("object",)),
        ("prompt", [], ("empty",)),
        ("prompt", [[]], ("empty",)),
        ("prompt", ["a", [1]], ("mixes",)),
        ("prompt", [1, "a"], ("mixes",)),
        ("prompt", [1, 1000], ("token id 1000 is outside", "vocabulary of 1000")),
        ("prompt", [-1], ("token id -1 is outside", "vocabulary of 1000")),
        ("prompt", [1] * 4097, ("4097", "4096")),
        ("prompt", ["a"] * 1025, ("1025", "1024")),
        ("prompt", None, ("prompt",)),
        ("prompt", {"a": 1}, ("object",)),
    ],
)
def test_values_out_of_range(server, name: str, value: object, parts: tuple[str, ...]) -> None:
    refused(server.post("/v1/completions", **{"prompt": "hi", name: value}), name, *parts)
    assert not server.stack.received


def test_nothing_follows_the_end_of_a_stream(server) -> None:
    """One of several prompts is refused while the others run."""
    answer = server.post("/v1/completions", prompt=["a", "b", "", "c"], stream=True, max_tokens=64)
    assert "0 tokens" in answer.text and answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(("prompt", "stream"), [("", False), ("", True), (["a", ""], False)])
def test_whether_a_text_is_empty_the_tokenizer_says(server, prompt, stream: bool) -> None:
    """A model that begins each text with a token of its own continues an empty one."""
    refused(server.post("/v1/completions", prompt=prompt, stream=stream), "prompt", "0 tokens")


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({}, "messages", "missing"),
        ({"messages": []}, "messages", "got 0"),
        ({"messages": [{"content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages", "got 0"),
        ({"messages": [{"role": "user"}]}, "messages", "content"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "messages",
            "image_url",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages",
            "messages[0].tool_calls[0]",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
            "top_logprobs",
            "logprobs",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 21},
            "top_logprobs",
            "21",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "logprobs": 1}, "logprobs", "bool"),
        (
            {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0},
            "max_completion_tokens",
            "got 0",
        ),
    ],
)
def test_chats_that_are_wrong(server, body: dict, param: str, part: str) -> None:
    refused(server.http.post("/v1/chat/completions", json=body), param, part)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("suffix", "x"),
        ("truncation_side", "right"),
        ("chat_template", "{{ 1 }}"),
        ("no_such_thing", False),
        ("temprature", 1),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, name: str, value: object) -> None:
    refused(server.complete("hi", **{name: value}), name, f"`{name}`", "not supported")
    refused(server.chat("hi", **{name: value}), name, f"`{name}`", "not supported")


def test_neutral_values_of_what_is_not_supported_pass(server) -> None:
    neutral = {
        "tools": None,
        "logit_bias": None,
        "echo": False,
        "use_beam_search": False,
        "best_of": 2,
        "suffix": None,
        "length_penalty": 1,
    }
    answer = server.complete("hi", n=2, max_tokens=3, temperature=None, stop=None, **neutral)
    assert (
        answer.status_code == 200
        and [choice["text"] for choice in answer.json()["choices"]] == [expected(3)] * 2
    )
    assert server.complete("hi", best_of=1).status_code == 200


def test_a_model_without_a_chat_template(serve) -> None:
    with serve(has_chat_template=False) as server:
        refused(server.chat("hi"), "messages", "--chat-template")


def test_encodings_and_sizes(serve) -> None:
    with serve() as server:
        for encoding in ("gzip", "deflate, gzip", "br"):
            answer = server.http.post(
                "/v1/completions", content=b"\x1f\x8b\x08", headers={"Content-Encoding": encoding}
            )
            check_error(answer, 415, "UnsupportedMediaTypeError")
        body = json.dumps({"prompt": "x" * (1 << 20)}).encode()
        answers = [
            server.http.post("/v1/completions", content=body),
            server.http.post("/v1/completions", content=iter([body])),
        ]
        for answer in answers:
            assert "1048576" in check_error(answer, 413, "RequestEntityTooLargeError")["message"]


def test_request_ids(server) -> None:
    given = "abc-123"
    answers = [
        server.http.get("/live", headers={"X-Request-Id": given}),
        server.http.get("/v1/x", headers={"X-Request-Id": given}),
    ]
    assert [answer.headers["x-request-id"] for answer in answers] == [given, given]
    made = {
        server.complete("hi", stream=stream).headers["x-request-id"] for stream in (True, False)
    }
    assert len(made) == 2 and all(re.fullmatch("[0-9a-f]{32}", value) for value in made)
    assert (
        server.http.get("/live", headers={"X-Request-Id": "x" * 129}).headers["x-request-id"]
        != "x" * 129
    )
