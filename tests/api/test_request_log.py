"""The line that `--enable-log-requests` writes at a request's end, by how the request ended."""

import logging
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from api.conftest import Server, serve
from pagewire.config import FrontendConfig

KEY = "s3cret"
SAID = "hang on to this"


@pytest.fixture(scope="module")
def logging_server() -> Iterator[Server]:
    config = FrontendConfig(max_body_mb=1, enable_log_requests=True)
    with serve(keys=(KEY,), config=config) as server:
        server.http.headers["Authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture
def entry(logging_server: Server, caplog: pytest.LogCaptureFixture) -> Any:
    """The fields of the only line so far, which has them in its text as well."""
    caplog.set_level(logging.INFO, "pagewire.frontend.requests")

    def only() -> dict[str, Any]:
        def lines() -> list[logging.LogRecord]:
            return [one for one in caplog.records if one.name == "pagewire.frontend.requests"]

        logging_server.settle(lines)
        (record,) = lines()
        fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
        text = record.getMessage()
        assert text == " ".join(f"{name}={value}" for name, value in fields.items())
        assert KEY not in text and SAID not in text
        return fields

    return only


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_an_answer(logging_server: Server, entry: Any, chat: bool, stream: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    prompt: Any = (
        {"messages": [{"role": "user", "content": "slow"}]} if chat else {"prompt": "slow"}
    )
    headers = {"X-Request-Id": "abc"}
    body = {**prompt, "max_tokens": 4, "stream": stream}
    assert logging_server.http.post(path, json=body, headers=headers).status_code == 200
    fields = entry()
    assert (fields["method"], fields["route"], fields["status"]) == ("POST", path, 200)
    assert fields["request_id"] == "abc" and fields["reason"] == "length"
    # What the stack says of every request: 3 prompt tokens, of which 2 were cached.
    counts = [fields[f"{name}_tokens"] for name in ("prompt", "cached", "output")]
    assert counts == [3, 2, 4]
    assert 0 < fields["ttft_s"] < fields["total_s"] < 60


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"prompt": "stop"}, 200, "stop"),
        ({"prompt": ["stop", "go"], "max_tokens": 6}, 200, "length,stop"),
        ({"prompt": "refuse400"}, 400, "refused"),
        ({"prompt": "refuse429"}, 429, "overloaded"),
        ({"prompt": "hi", "top_p": 7}, 400, "refused"),
        ({"prompt": "hi", "model": "no/such"}, 404, "refused"),
        ({"prompt": "failed", "max_tokens": 8}, 500, "failed"),
    ],
)
def test_reasons(
    logging_server: Server, entry: Any, body: dict[str, Any], status: int, reason: str
) -> None:
    assert logging_server.post("/v1/completions", **body).status_code == status
    fields = entry()
    assert (fields["status"], fields["reason"]) == (status, reason)


def test_a_stream_that_fails_is_no_success(logging_server: Server, entry: Any) -> None:
    logging_server.events("/v1/completions", prompt="failed", max_tokens=8)
    fields = entry()
    assert (fields["status"], fields["reason"]) == (200, "failed")
    assert fields["output_tokens"] == 3


def test_a_client_that_leaves(logging_server: Server, entry: Any) -> None:
    headers = logging_server.http.headers
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=logging_server.url, timeout=0.5, headers=headers) as client,
    ):
        client.post("/v1/completions", json={"prompt": SAID, "stream": True})
    fields = entry()
    assert (fields["status"], fields["reason"], fields["output_tokens"]) == (499, "cancelled", 2)


def test_routes_stand_for_paths_and_probes_are_left_out(logging_server: Server, entry: Any) -> None:
    for path in ("/health", "/ready", "/live", "/metrics", "/version", "/"):
        logging_server.http.get(path)
    assert logging_server.http.get(f"/v1/models/alias?text={SAID}").status_code == 200
    assert entry()["route"] == "/v1/models/{id}"


def test_a_wrong_key(logging_server: Server, entry: Any) -> None:
    answer = logging_server.http.post(
        "/v1/completions", json={"prompt": SAID}, headers={"Authorization": "Bearer other"}
    )
    assert answer.status_code == 401
    assert (entry()["status"], entry()["reason"]) == (401, "refused")
