"""What happens around requests: other origins, HTTPS, request ids, content types, silent streams,
who shares a cache with whom."""

import json
import re
import ssl
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from api.checks import check_error
from api.conftest import MODEL, serve
from pagewire.config import FrontendConfig
from pagewire.frontend.cors import cors_of
from pagewire.frontend.tls import context_of

TLS = Path(__file__).parent / "tls"
CERT, KEY = str(TLS / "cert.pem"), str(TLS / "key.pem")
PREFLIGHT = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}


# --- other origins ---


def test_by_default_no_page_of_another_origin_may_use_a_server(server) -> None:
    for answer in (
        server.http.get("/v1/models", headers={"Origin": "https://a.example"}),
        server.http.options("/v1/chat/completions", headers=PREFLIGHT),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.status_code == 400 and "origin" in answer.text


@pytest.fixture(scope="module")
def open_to_all():
    with serve(config=FrontendConfig(allowed_origins=("*",), max_body_mb=1)) as server:
        yield server


def test_any_page_may_use_a_server_that_says_so(open_to_all) -> None:
    server = open_to_all
    answer = server.http.get("/v1/models", headers={"Origin": "https://a.example"})
    assert (
        answer.headers["access-control-allow-origin"] == "*"
        and "access-control-allow-credentials" not in answer.headers
    )
    assert "access-control-allow-origin" not in server.http.get("/v1/models").headers
    asked = {**PREFLIGHT, "Access-Control-Request-Headers": "authorization, X-Stainless-Lang"}
    answer = server.http.options("/v1/chat/completions", headers=asked)
    assert answer.status_code == 200 and "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-lang"


def test_streams_and_errors_carry_the_headers_too(open_to_all) -> None:
    server = open_to_all
    for body in ({"prompt": "hi", "stream": True}, {"prompt": ""}):
        answer = server.http.post(
            "/v1/completions",
            json=body,
            headers={"Origin": "https://a.example", "X-Request-Id": "abc"},
        )
        assert (
            answer.headers["access-control-allow-origin"] == "*"
            and answer.headers["x-request-id"] == "abc"
        )


@pytest.fixture(scope="module")
def choosy():
    config = FrontendConfig(
        allowed_origins=('["https://a.example", "https://b.example"]', "https://c.example"),
        allowed_methods=("get", "POST"),
        allowed_headers=("Authorization",),
        allow_credentials=True,
    )
    with serve(keys=("k",), config=config) as server:
        yield server


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 200),
        ({"Origin": "https://c.example"}, 200),
        ({"Origin": "https://evil.example"}, 400),
        ({"Access-Control-Request-Method": "DELETE"}, 400),
        ({"Access-Control-Request-Headers": "authorization, content-type"}, 200),
        ({"Access-Control-Request-Headers": "x-other"}, 400),
    ],
)
def test_listed_origins_methods_and_headers(choosy, change: dict[str, str], status: int) -> None:
    answer = choosy.http.options("/v1/completions", headers={**PREFLIGHT, **change})
    assert answer.status_code == status
    origin = {**PREFLIGHT, **change}["Origin"]
    allowed = None if "evil" in origin else origin
    assert answer.headers.get("access-control-allow-origin") == allowed
    assert answer.headers.get("access-control-allow-credentials") == (allowed and "true")
    assert answer.headers.get("vary") == (allowed and "Origin")


def test_a_refusal_for_want_of_a_key_can_be_read_by_the_page(choosy) -> None:
    answer = choosy.http.get("/v1/models", headers={"Origin": "https://a.example"})
    assert (
        answer.status_code == 401
        and answer.headers["access-control-allow-origin"] == "https://a.example"
    )
    assert (
        "access-control-allow-origin"
        not in choosy.http.get("/v1/models", headers={"Origin": "https://evil.example"}).headers
    )


def test_options_without_an_origin_needs_no_key_and_gives_nothing(choosy) -> None:
    check_error(choosy.http.options("/v1/models"), 405, "MethodNotAllowedError")
    check_error(choosy.http.options("/nowhere"), 404, "NotFoundError")


def test_a_list_that_is_none() -> None:
    with pytest.raises(ValueError, match="--allowed-origins"):
        cors_of(FrontendConfig(allowed_origins=("[1]",)))


# --- HTTPS ---


def test_https() -> None:
    with serve(config=FrontendConfig(ssl_certfile=CERT, ssl_keyfile=KEY), tls=True) as server:
        assert server.url.startswith("https://")
        assert server.complete("hi", max_tokens=2).status_code == 200
        assert len(server.events("/v1/completions", prompt="hi", max_tokens=40)) == 40
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/live")
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http") + "/live")


def test_clients_may_have_to_show_a_certificate() -> None:
    config = FrontendConfig(ssl_certfile=CERT, ssl_keyfile=KEY, ssl_ca_certs=CERT, ssl_cert_reqs=2)
    with serve(config=config, tls=True) as server:
        assert server.http.get("/live").status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url + "/live", verify=ssl.create_default_context(cafile=CERT))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ssl_keyfile": KEY}, "--ssl-keyfile needs --ssl-certfile"),
        ({"ssl_certfile": "/no/such.pem"}, "--ssl-certfile /no/such.pem: there is no such file"),
        ({"ssl_certfile": CERT}, "no --ssl-keyfile"),
        ({"ssl_certfile": KEY, "ssl_keyfile": KEY}, "--ssl-certfile: no certificate"),
        ({"ssl_certfile": CERT, "ssl_keyfile": KEY, "ssl_ca_certs": KEY}, "--ssl-ca-certs"),
    ],
)
def test_files_that_will_not_do(settings: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        context_of(FrontendConfig(**settings))
    assert context_of(FrontendConfig()) is None


# --- content types ---


@pytest.mark.parametrize(
    "kind",
    [None, "application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"],
)
def test_json_by_any_name_or_none(server, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    assert (
        server.http.post(
            "/v1/completions", content=b'{"prompt": "hi"}', headers=headers
        ).status_code
        == 200
    )


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "x+json",
    ],
)
def test_other_types_are_refused(server, kind: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = server.http.post(path, content=b'{"prompt": "hi"}', headers={"Content-Type": kind})
        assert (
            "application/json" in check_error(answer, 415, "UnsupportedMediaTypeError")["message"]
        )


# --- request ids ---


def test_an_answer_is_named_after_its_request(server) -> None:
    answer = server.http.post(
        "/v1/completions",
        json={"prompt": "hi", "request_id": "body"},
        headers={"X-Request-Id": "head"},
    )
    assert answer.json()["id"] == "cmpl-head" and answer.headers["x-request-id"] == "head"
    answer = server.chat("hi", request_id="body")
    assert answer.json()["id"] == "chatcmpl-body" and answer.headers["x-request-id"] == "body"
    answer = server.complete("hi", stream=True)
    assert (
        f"cmpl-{answer.headers['x-request-id']}" == json.loads(answer.text.split("\n")[0][6:])["id"]
    )


# --- silence ---


def test_a_silent_stream_says_that_it_lives() -> None:
    with serve(config=FrontendConfig(sse_keep_alive_interval=0.2)) as server:
        began, text = time.monotonic(), ""
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "hang", "stream": True}
        ) as answer:
            for piece in answer.iter_text():
                text += piece
                if text.count(": ping\n\n") == 2:
                    break
        assert time.monotonic() - began > 0.35
        blocks = text.split("\n\n")
        assert blocks[0].startswith("data: {") and blocks[2:4] == [": ping", ": ping"]


def test_a_stream_that_waits_for_its_turn_begins_with_pings() -> None:
    with serve(config=FrontendConfig(sse_keep_alive_interval=0.2)) as server:
        body = {"prompt": "mum", "stream": True, "max_tokens": 2}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            text = "".join(answer.iter_text())
        assert (
            text.startswith(": ping\n\n") and text.endswith("data: [DONE]\n\n") and "Hello" in text
        )


def test_pings_can_be_switched_off() -> None:
    with serve(config=FrontendConfig(sse_keep_alive_interval=0)) as server:
        answer = server.complete("mum", stream=True, max_tokens=2)
        assert "ping" not in answer.text and answer.text.endswith("data: [DONE]\n\n")


# --- time ---


def test_a_request_that_takes_too_long_ends_everywhere() -> None:
    with serve(config=FrontendConfig(request_timeout=0.3)) as server:
        assert (
            "within 0.3 s (--request-timeout)"
            in check_error(server.complete("hang"), 504, "GatewayTimeoutError")["message"]
        )
        answer = server.complete("hang", stream=True)
        assert answer.status_code == 200
        last = answer.text.strip().split("\n\n")[-2:]
        assert json.loads(last[0][6:])["error"]["code"] == 504 and last[1] == "data: [DONE]"
        wanted = {(generate.rid, generate.attempt) for generate in server.stack.generates()}
        assert all(0 < generate.timeout_ms <= 300 for generate in server.stack.generates())
        until = time.monotonic() + 5
        while not server.stack.cancels() >= wanted and time.monotonic() < until:
            time.sleep(0.01)
        assert server.stack.cancels() >= wanted and len(wanted) == 2
        assert server.complete("hi", max_tokens=2).status_code == 200


# --- tenants ---


def test_holders_of_different_keys_share_no_cache() -> None:
    with serve(keys=("one", "two")) as server:
        salts = []
        for key, salt in (
            ("one", None),
            ("one", None),
            ("two", None),
            ("one", "x"),
            ("two", "x"),
            ("one", "y"),
        ):
            headers = {"Authorization": f"Bearer {key}"}
            server.http.post(
                "/v1/completions", json={"prompt": "hi", "cache_salt": salt}, headers=headers
            )
            salts.append(server.stack.generates()[-1].cache_salt)
        assert (
            salts[0] == salts[1]
            and len(set(salts)) == 5
            and all(0 < len(salt) <= 128 for salt in salts)
        )
        assert not any(key in salt for key in ("one", "two") for salt in salts)
    with serve() as server:
        server.complete("hi")
        assert server.stack.generates()[0].cache_salt == ""


# --- routes ---


def test_ping_and_load(server) -> None:
    for answer in (server.http.get("/ping"), server.http.post("/ping")):
        assert answer.status_code == 200 and answer.content == b""
    assert server.http.get("/load").json() == {"server_load": 0}


def test_the_model_list_is_complete(server) -> None:
    card = server.http.get("/v1/models").json()["data"][0]
    assert set(card) == {
        "id",
        "object",
        "created",
        "owned_by",
        "root",
        "parent",
        "max_model_len",
        "permission",
    }
    (permission,) = card["permission"]
    assert (
        permission["object"] == "model_permission"
        and permission["allow_sampling"]
        and card["id"] == MODEL
    )
