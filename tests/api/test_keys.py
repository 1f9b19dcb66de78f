"""API keys over HTTP: deny by default, whatever the header holds."""

import http.client

import openai
import pytest
from api.conftest import serve
from pagewire.frontend.app import make_app
from pagewire.frontend.auth import configured_keys


@pytest.fixture(scope="module")
def guarded():
    with serve(keys=("s3cret", "schlüssel")) as server:
        yield server


ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/alias"),
    ("HEAD", "/v1/models"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/load"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
]


def raw(server, method: str, path: str, *headers: tuple[str, bytes]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.frontend.port, timeout=10)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers:
        connection.putheader(name, value)
    try:
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (BrokenPipeError, ConnectionResetError):
        return 400, b""
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [*ROUTES, ("PUT", "/v1/models"), ("GET", "//v1/models"), ("GET", "/v1/%2e%2e/v1/models")],
)
@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        b"s3cret",
        b"Basic s3cret",
        "Bearer schlüssé".encode(),
    ],
)
def test_no_key_no_entry(guarded, method: str, path: str, value: bytes | None) -> None:
    headers = [] if value is None else [("Authorization", value)]
    status, body = raw(guarded, method, path, *headers)
    assert status == 401 and body == (b"" if method == "HEAD" else b'{"error": "Unauthorized"}')


@pytest.mark.parametrize("key", ["s3cret", "schlüssel"])
def test_each_key_opens(guarded, key: str) -> None:
    assert raw(guarded, "GET", "/v1/models", ("Authorization", f"Bearer {key}".encode()))[0] == 200
    assert raw(guarded, "GET", "/v1/models", ("authorization", f"bearer {key}".encode()))[0] == 200


def test_strange_headers_are_refused_not_answered_with_500(guarded) -> None:
    good = ("Authorization", b"Bearer s3cret")
    assert raw(guarded, "GET", "/v1/models", good, good)[0] in (400, 401)
    assert raw(guarded, "GET", "/v1/models", ("Authorization", b"Bearer \xff\xfe\x80"))[0] == 401
    assert (
        raw(guarded, "GET", "/v1/models", ("Authorization", b"Bearer " + b"x" * (1 << 20)))[0]
        == 431
    )
    assert raw(guarded, "GET", "/v1/models", ("Authorization", b"Bearer s3\x00cret"))[0] in (
        400,
        401,
    )


def test_probes_stay_open_and_nothing_else(guarded) -> None:
    opened = set()
    for route in make_app(guarded.frontend.service.state).router.routes():
        path = route.resource.canonical.replace("{id}", "alias")
        if raw(guarded, route.method, path)[0] != 401:
            opened.add(path)
    probes = {"/health", "/live", "/accepting", "/ready", "/version", "/metrics", "/ping"}
    assert opened == probes | {"/", "/v1", "/v1/"}


def test_the_openai_client_is_told(guarded) -> None:
    assert guarded.client.models.list().data
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=guarded.url + "/v1", api_key="no", max_retries=0) as client,
    ):
        client.models.list()


def test_keys_come_from_the_environment_when_no_flag_does(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "v")
    assert configured_keys(()) == ("v",) and configured_keys(("f", "g")) == ("f", "g")
    monkeypatch.setenv("PAGEWIRE_API_KEY", "p")
    assert configured_keys(()) == ("p",)
    with pytest.raises(ValueError, match="--api-key"):
        configured_keys(("",))
